"""What the forward of a module of transformers becomes: an op of nacd_kernels on the module's own weights.

Each takes the module and what its own forward took. families.py says which module gets which.

B samples, H heads, T tokens, d head width, D hidden, R LoRA rank.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation, SiLUActivation
from transformers.pytorch_utils import Conv1D

from nacd_kernels import (
    LoraLayer,
    flash_attention,
    frozen_linear,
    gelu,
    gelu_mul,
    layer_norm,
    lora_linear,
    lora_linears,
    relu,
    rms_norm,
    silu_mul,
)

from .errors import InputError

ADAPTER = "default"
ATTENTION = "nacd_causal"  # transformers takes a name with "flash" for one of its own

Forward = Callable[..., Any]  # (module, *its arguments) -> its result

GELUS = {GELUActivation: "none", NewGELUActivation: "tanh", GELUTanh: "tanh"}
GATES: Mapping[type, Callable[[Tensor, Tensor], Tensor]] = {
    SiLUActivation: silu_mul,
    nn.SiLU: silu_mul,
    **{kind: partial(gelu_mul, approximate=approximate) for kind, approximate in GELUS.items()},
}


def weight_of(linear: Any) -> Tensor:
    """[D_out, D_in]; GPT-2's Conv1D holds it transposed."""
    return linear.weight.T if type(linear) is Conv1D else linear.weight


def linear_forward(linear: Any, x: Tensor) -> Tensor:
    return frozen_linear(x, weight_of(linear), linear.bias)


def lora_forward(layer: Any, x: Tensor) -> Tensor:
    return lora_linear(x, *lora_layer(layer))


def lora_layer(linear: Any) -> LoraLayer:
    """A linear layer with its adapter, or without one.

    The factors are those that `Student` put there for this call: (A [R, D_in], B [D_out, R]).
    """
    if not isinstance(linear, LoraLinear):
        return LoraLayer(weight_of(linear), linear.bias, None, None, 1.0)
    base, (a, b) = linear.base_layer, linear.factors
    return LoraLayer(weight_of(base), base.bias, a, b, linear.scaling[ADAPTER])


def relu_forward(module: Any, x: Tensor) -> Tensor:
    return relu(x)


def gelu_forward(module: Any, x: Tensor) -> Tensor:
    return gelu(x, GELUS[type(module)])


def layer_norm_forward(norm: Any, x: Tensor) -> Tensor:
    return layer_norm(x, norm.weight, norm.bias, norm.eps)


def rms_norm_forward(norm: Any, x: Tensor) -> Tensor:
    return rms_norm(x, norm.weight, norm.variance_epsilon)


def gemma_norm_forward(norm: Any, x: Tensor) -> Tensor:
    return rms_norm(x, norm.weight, norm.eps, offset=1.0)


def gated_mlp_forward(mlp: Any, x: Tensor) -> Tensor:
    gate, up = lora_linears(x, [lora_layer(mlp.gate_proj), lora_layer(mlp.up_proj)])
    return mlp.down_proj(GATES[type(mlp.act_fn)](gate, up))


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seqlens: list[int] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; [B, H, T, d] in, [B, T, H, d] out.

    cu_seqlens: the borders of the samples in a packed row. Of what else a family passes only the positions may be
    given, which the queries and keys have in them.
    """
    options |= {"attention_mask": attention_mask, "dropout": dropout or None}
    for name, given in options.items():
        if name != "position_ids" and given is not None and given is not False:
            raise InputError(f"{type(module).__name__} passes {name} to its attention, which matching does not know")
    out = flash_attention(query, key, value, scaling, cu_seqlens=cu_seqlens, window=sliding_window, softcap=softcap)
    return out.transpose(1, 2), None


AttentionInterface.register(ATTENTION, attention_forward)  # registers no mask function: transformers makes no mask


def checkpointed_forward(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """A decoder layer that is recomputed in the backward pass with the factors it had in the forward pass."""
    factors = [(module, module.factors) for module in layer.modules() if isinstance(module, LoraLinear)]

    def run(*args: Any, **kwargs: Any) -> Any:
        for module, value in factors:
            module.factors = value
        return type(layer).forward(layer, *args, **kwargs)

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
