"""Twice-differentiable ops for unrolled training: reverse, forward-over-reverse and reverse-over-reverse mode.

Needs torch only. `kernels/README.md` says what each op computes and how to copy this folder into another project.
"""

from .activations import gelu, gelu_mul, relu, silu_mul
from .flash_attention import flash_attention
from .frozen_linear import frozen_linear
from .frozen_weight import Int8Weight
from .linear_cross_entropy import linear_cross_entropy
from .lora_linear import LoraLayer, lora_linear, lora_linears
from .nearest_embedding import nearest_embedding
from .norms import layer_norm, rms_norm
from .rotary import rotary_embedding
from .second_order import check_second_order
from .twice import bare_tangents, twice_differentiable

__all__ = [
    "Int8Weight",
    "LoraLayer",
    "bare_tangents",
    "check_second_order",
    "flash_attention",
    "frozen_linear",
    "gelu",
    "gelu_mul",
    "layer_norm",
    "linear_cross_entropy",
    "lora_linear",
    "lora_linears",
    "nearest_embedding",
    "relu",
    "rms_norm",
    "rotary_embedding",
    "silu_mul",
    "twice_differentiable",
]
