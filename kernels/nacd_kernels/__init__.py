"""Twice-differentiable ops for unrolled training: reverse, forward-over-reverse and reverse-over-reverse mode.

Needs torch only. `kernels/README.md` says what each op computes and how to copy this folder into another project.
"""

from .activations import silu_mul
from .flash_attention import flash_attention
from .linear_cross_entropy import linear_cross_entropy
from .lora_linear import lora_linear
from .norms import layer_norm, rms_norm
from .twice import twice_differentiable

__all__ = ["flash_attention", "layer_norm", "linear_cross_entropy", "lora_linear", "rms_norm", "silu_mul", "twice_differentiable"]
