"""Hugging Face models that matching knows, and the op that each of their modules runs on.

PyTorch's fused attention, SiLU and norms have missing or wrong second derivatives. So every module of a decoder is
looked up by its exact class: it runs on an op of nacd_kernels (OPS, a family's `ops`), or it is known to be right twice
as it is (AS_IT_IS, a family's `as_it_is`). Anything else is an InputError that names the module, as is an option of a
config that the ops do not honour: never a silently wrong derivative.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers import PreTrainedModel
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

from .errors import InputError
from .forwards import (
    ADAPTER,
    ATTENTION,
    GATES,
    GELUS,
    Forward,
    checkpointed_forward,
    gated_mlp_forward,
    gelu_forward,
    gemma_norm_forward,
    layer_norm_forward,
    linear_forward,
    lora_forward,
    relu_forward,
    rms_norm_forward,
)

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


# --- the tables -----------------------------------------------------------------------------------------------------

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
