"""Hugging Face models that matching knows, and the op that each of their modules runs on.

PyTorch's fused attention, SiLU and norms have missing or wrong second derivatives. So every module of a decoder is
looked up by its exact class: it runs on an op of nacd_kernels (OPS, a family's `ops`), or it is known to be right twice
as it is (AS_IT_IS, a family's `as_it_is`). Anything else is an InputError that names the module, as is an option of a
config that the ops do not honour: never a silently wrong derivative.

B samples, H heads, T tokens, d head width, D hidden, R LoRA rank.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation, SiLUActivation
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.gemma3 import modeling_gemma3 as gemma3
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.opt import modeling_opt as opt
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.smollm3 import modeling_smollm3 as smollm3
from transformers.pytorch_utils import Conv1D

from nacd_kernels import (
    flash_attention,
    frozen_linear,
    gelu,
    gelu_mul,
    layer_norm,
    lora_linear,
    relu,
    rms_norm,
    silu_mul,
)

from .errors import InputError

ADAPTER = "default"
ATTENTION = "nacd_causal"  # transformers takes a name with "flash" for one of its own
DROPOUTS = (  # config fields and attributes that hold a probability
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "layerdrop",
    "hidden_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
)
ROPES = ("default", "linear", "llama3", "yarn")  # the others depend on the longest sample of the batch

Forward = Callable[..., Any]  # (module, *its arguments) -> its result


# --- what a module's forward becomes --------------------------------------------------------------------------------


def weight_of(linear: Any) -> Tensor:
    """[D_out, D_in]; GPT-2's Conv1D holds it transposed."""
    return linear.weight.T if type(linear) is Conv1D else linear.weight


def linear_forward(linear: Any, x: Tensor) -> Tensor:
    return frozen_linear(x, weight_of(linear), linear.bias)


def lora_forward(layer: Any, x: Tensor) -> Tensor:
    """The factors are those that `Student` put there for this call: (A [R, D_in], B [D_out, R])."""
    a, b = layer.factors
    return lora_linear(x, weight_of(layer.base_layer), layer.base_layer.bias, a, b, layer.scaling[ADAPTER])


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
    return mlp.down_proj(GATES[type(mlp.act_fn)](mlp.gate_proj(x), mlp.up_proj(x)))


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

    cu_seqlens: the borders of the samples in a packed row. What else a family passes must be nothing, or not matter.
    """
    options |= {"attention_mask": attention_mask, "dropout": dropout or None}
    for name, given in options.items():
        if given is not None and name not in ("position_ids", "use_cache"):
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


# --- the tables -----------------------------------------------------------------------------------------------------

GELUS = {GELUActivation: "none", NewGELUActivation: "tanh", GELUTanh: "tanh"}
GATES: Mapping[type, Callable[[Tensor, Tensor], Tensor]] = {
    SiLUActivation: silu_mul,
    nn.SiLU: silu_mul,
    **{kind: partial(gelu_mul, approximate=approximate) for kind, approximate in GELUS.items()},
}
OPS: Mapping[type, Forward] = {
    nn.Linear: linear_forward,
    Conv1D: linear_forward,
    LoraLinear: lora_forward,
    nn.LayerNorm: layer_norm_forward,
    nn.ReLU: relu_forward,
    **dict.fromkeys(GELUS, gelu_forward),
}
AS_IT_IS = (nn.Embedding, nn.ModuleList, nn.Dropout)  # a Dropout that drops nothing


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model class of transformers, and the modules of its own in its decoder."""

    model: type[PreTrainedModel]
    layer: type[nn.Module]
    """What checkpointing recomputes as one."""
    as_it_is: tuple[type[nn.Module], ...]
    """Right twice as they are: they call other modules and operations with complete derivatives."""
    ops: Mapping[type, Forward] = field(default_factory=dict)
    """Those that run on an op."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the config with the one value that is honoured."""
    softcap: str = ""
    """Field of the config that bounds the logits: c tanh(z / c)."""


FAMILIES = (
    Family(
        model=opt.OPTForCausalLM,
        layer=opt.OPTDecoderLayer,
        as_it_is=(opt.OPTDecoder, opt.OPTAttention, opt.OPTLearnedPositionalEmbedding),
    ),
    Family(
        model=llama.LlamaForCausalLM,
        layer=llama.LlamaDecoderLayer,
        as_it_is=(llama.LlamaModel, llama.LlamaAttention, llama.LlamaRotaryEmbedding),
        ops={llama.LlamaRMSNorm: rms_norm_forward, llama.LlamaMLP: gated_mlp_forward},
    ),
    Family(
        model=mistral.MistralForCausalLM,
        layer=mistral.MistralDecoderLayer,
        as_it_is=(mistral.MistralModel, mistral.MistralAttention, mistral.MistralRotaryEmbedding),
        ops={mistral.MistralRMSNorm: rms_norm_forward, mistral.MistralMLP: gated_mlp_forward},
    ),
    Family(
        model=qwen2.Qwen2ForCausalLM,
        layer=qwen2.Qwen2DecoderLayer,
        as_it_is=(qwen2.Qwen2Model, qwen2.Qwen2Attention, qwen2.Qwen2RotaryEmbedding),
        ops={qwen2.Qwen2RMSNorm: rms_norm_forward, qwen2.Qwen2MLP: gated_mlp_forward},
    ),
    Family(
        model=qwen3.Qwen3ForCausalLM,
        layer=qwen3.Qwen3DecoderLayer,
        as_it_is=(qwen3.Qwen3Model, qwen3.Qwen3Attention, qwen3.Qwen3RotaryEmbedding),
        ops={qwen3.Qwen3RMSNorm: rms_norm_forward, qwen3.Qwen3MLP: gated_mlp_forward},
    ),
    Family(
        model=smollm3.SmolLM3ForCausalLM,
        layer=smollm3.SmolLM3DecoderLayer,
        as_it_is=(smollm3.SmolLM3Model, smollm3.SmolLM3Attention, smollm3.SmolLM3RotaryEmbedding),
        ops={smollm3.SmolLM3RMSNorm: rms_norm_forward, smollm3.SmolLM3MLP: gated_mlp_forward},
    ),
    Family(
        model=gemma2.Gemma2ForCausalLM,
        layer=gemma2.Gemma2DecoderLayer,
        as_it_is=(
            gemma2.Gemma2Model,
            gemma2.Gemma2Attention,
            gemma2.Gemma2RotaryEmbedding,
            gemma2.Gemma2TextScaledWordEmbedding,
        ),
        ops={gemma2.Gemma2RMSNorm: gemma_norm_forward, gemma2.Gemma2MLP: gated_mlp_forward},
        options={"use_bidirectional_attention": False},
        softcap="final_logit_softcapping",
    ),
    Family(
        model=gemma3.Gemma3ForCausalLM,
        layer=gemma3.Gemma3DecoderLayer,
        as_it_is=(
            gemma3.Gemma3TextModel,
            gemma3.Gemma3Attention,
            gemma3.Gemma3RotaryEmbedding,
            gemma3.Gemma3TextScaledWordEmbedding,
        ),
        ops={gemma3.Gemma3RMSNorm: gemma_norm_forward, gemma3.Gemma3MLP: gated_mlp_forward},
        options={"use_bidirectional_attention": False},
        softcap="final_logit_softcapping",
    ),
    Family(
        model=gpt2.GPT2LMHeadModel,
        layer=gpt2.GPT2Block,
        as_it_is=(gpt2.GPT2Model, gpt2.GPT2Attention, gpt2.GPT2MLP),
        options={"add_cross_attention": False, "reorder_and_upcast_attn": False},
    ),
)


# --- putting the ops in ---------------------------------------------------------------------------------------------


def family_of(model: PreTrainedModel) -> Family:
    """Raises InputError for a model that matching does not know, or one with an option that the ops do not honour."""
    family = next((f for f in FAMILIES if f.model is type(model)), None)
    if family is None:
        known = ", ".join(f.model.__name__ for f in FAMILIES)
        raise InputError(f"model type {model.config.model_type!r} ({type(model).__name__}): matching knows {known}")
    honoured: dict[str, Any] = {**dict.fromkeys(DROPOUTS, 0), "is_causal": True, **family.options}
    for name, value in honoured.items():
        given = getattr(model.config, name, None)
        if given is not None and given != value:
            raise InputError(f"{name}={given!r} in the model's config: matching honours {value!r} only")
    ropes = getattr(model.config, "rope_parameters", None) or {}
    for rope in [ropes, *(part for part in ropes.values() if isinstance(part, dict))]:
        kind = rope.get("rope_type", "default")
        if kind not in ROPES:
            raise InputError(f"rope_type={kind!r} in the model's config: matching honours {', '.join(ROPES)} only")
    return family


def use_twice_differentiable_ops(model: PreTrainedModel, family: Family, *, checkpointing: bool = False) -> None:
    """Swap the ops in below the decoder of `model`, which stays as it was where InputError is raised."""
    decoder = model.get_decoder()
    path = next(name for name, module in model.named_modules() if module is decoder)
    for module, forward in list(forwards_below(family, path, decoder)):
        module.forward = MethodType(forward, module)
    if checkpointing:
        for module in decoder.modules():
            if type(module) is family.layer:
                module.forward = MethodType(checkpointed_forward, module)
    model.set_attn_implementation(ATTENTION)


def forwards_below(family: Family, path: str, module: Any) -> Iterator[tuple[Any, Forward]]:
    """Every module that runs on an op, with its new forward. Raises InputError at the first unknown one."""
    kind, children = type(module), dict(module.named_children())
    forward = family.ops.get(kind) or OPS.get(kind)
    if forward is None and kind not in (family.layer, *family.as_it_is, *AS_IT_IS):
        raise InputError(f"{path} is a {full_name(kind)}: matching knows no second derivative of it")
    if kind is nn.Dropout and module.p > 0:
        raise InputError(f"{path} drops out with probability {module.p}: matching needs 0")
    if forward is lora_forward:
        check_lora(path, module)
        children = {}
    if forward is gated_mlp_forward:
        act = type(children.pop("act_fn"))
        if act not in GATES:
            raise InputError(
                f"{path}.act_fn is a {full_name(act)}: matching knows no second derivative of it as a gate"
            )
    if forward is not None:
        yield module, forward
    for name, child in children.items():
        yield from forwards_below(family, f"{path}.{name}", child)


def check_lora(path: str, layer: Any) -> None:
    """The plain LoRA of `add_lora`, on a layer whose product is known."""
    base = type(layer.base_layer)
    if base not in (nn.Linear, Conv1D):
        raise InputError(f"{path} adapts a {full_name(base)}: matching knows no second derivative of it")
    alone = list(layer.scaling) == [ADAPTER] and not layer.merged_adapters
    plain = alone and not layer.lora_variant and not layer.lora_bias[ADAPTER]
    if not plain or type(layer.lora_dropout[ADAPTER]) is not nn.Identity:
        raise InputError(f"{path}: matching knows one plain LoRA adapter a layer, without a variant, bias or dropout")


def full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
