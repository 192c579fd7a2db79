"""Tiny models of every family, and what a student is compared with: transformers' own model, one sample after another.

transformers computes its softmax and its RMSNorms in float32 whatever the model is; an oracle in float64 must not, so
`exact` puts plain ones in that stay in the model's precision.
"""

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from nacd_fast.config import ModelConfig
from nacd_fast.data import IGNORE, Encoded
from nacd_fast.student import Student, add_lora

V, D, POSITIONS = 29, 16, 64
SIZES: dict[str, Any] = dict(
    vocab_size=V,
    max_position_embeddings=POSITIONS,
    num_hidden_layers=2,
    num_attention_heads=4,
    hidden_size=D,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
OPT: dict[str, Any] = SIZES | dict(ffn_dim=24, init_std=0.2, dropout=0.0)
GPT2: dict[str, Any] = SIZES | dict(initializer_range=0.2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
GATED: dict[str, Any] = SIZES | dict(num_key_value_heads=2, intermediate_size=24, initializer_range=0.2)
SLIDING: dict[str, Any] = GATED | dict(sliding_window=3, layer_types=["sliding_attention", "full_attention"])
GEMMA: dict[str, Any] = SLIDING | dict(head_dim=6, hidden_size=20, query_pre_attn_scalar=7)
ROPE_3 = dict(
    rope_type="llama3",
    rope_theta=100.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
# Gemma 3 turns its two kinds of layers by two bases
ROPE_2 = dict(
    sliding_attention=dict(rope_type="default", rope_theta=50.0),
    full_attention=dict(rope_type="linear", factor=2.0, rope_theta=900.0),
)

MODELS: dict[str, Callable[[], Any]] = {
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**OPT, word_embed_proj_dim=D)),
    "opt, as 350m": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**OPT, word_embed_proj_dim=8, do_layer_norm_before=False, activation_function="gelu")
    ),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GATED, tie_word_embeddings=True)),
    "llama, rope 3, biases": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**GATED, attention_bias=True, mlp_bias=True, rope_parameters=ROPE_3)
    ),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SLIDING, use_sliding_window=True)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SLIDING, use_sliding_window=True, head_dim=6)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GATED, sliding_window=4)),
    "smollm3": lambda: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**GATED, no_rope_layers=[1, 0])),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, rope_parameters=ROPE_2)
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "gpt2, scaled by layer": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False, n_inner=24)
    ),
}


def model_of(name: str, dtype: torch.dtype) -> Any:
    """A random model, always the same. Norms and biases are none that an error could hide behind."""
    torch.manual_seed(0)
    model = MODELS[name]()
    if "biases" in name:
        model.lm_head = nn.Linear(D, V)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p += 0.2 * torch.randn(p.shape, generator=g)
    return model.to(dtype).eval().requires_grad_(False)


def linear_names(model: nn.Module) -> tuple[str, ...]:
    """Every linear layer but the head."""
    kinds = (nn.Linear, hf.pytorch_utils.Conv1D)
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, kinds)}
    return tuple(sorted(names - {"lm_head"}))


def peft_model(name: str, dtype: torch.dtype, targets: Sequence[str] | None = None) -> Any:
    """With adapters, also of `dtype`, on every linear layer or on `targets`."""
    model = model_of(name, dtype)
    chosen = tuple(linear_names(model) if targets is None else targets)
    return add_lora(model, ModelConfig(rank=3, lora_alpha=6.0, targets=chosen), seed=1).to(dtype)


# --- the oracle -----------------------------------------------------------------------------------------------------


def plain_attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: None,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = q @ k.mT * scaling
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    at = torch.arange(q.shape[2])
    behind = at[:, None] - at
    hidden = (behind < 0) | (behind >= (sliding_window or len(at)))
    return (s.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2), None


hf.AttentionInterface.register("plain_test_attention", plain_attention)


def plain_norm(norm: Any, x: Tensor) -> Tensor:
    gemma = "Gemma" in type(norm).__name__
    weight, eps = (norm.weight + 1, norm.eps) if gemma else (norm.weight, norm.variance_epsilon)
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def exact(peft: Any) -> Any:
    """The model, in its own precision throughout."""
    peft.get_base_model().set_attn_implementation("plain_test_attention")
    for module in peft.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(plain_norm, module)
    return peft


def plain_logits(peft: Any, adapters: dict[str, Tensor], prompt: Tensor, row: Encoded) -> Tensor:
    """[k + T, V] of one sample with its prompt [k, D]; adapters by their full names."""
    x = torch.cat([prompt, peft.get_base_model().get_input_embeddings()(torch.tensor(row.input_ids))])
    return torch.func.functional_call(peft, adapters, kwargs={"inputs_embeds": x[None], "use_cache": False}).logits[0]


def plain_loss(peft: Any, adapters: dict[str, Tensor], prompts: Tensor, rows: Sequence[Encoded]) -> Tensor:
    """Mean over the supervised tokens of samples that never meet; prompts [B, k, D]."""
    total, count = torch.zeros((), dtype=prompts.dtype), 0
    for prompt, row in zip(prompts, rows, strict=True):
        logits = plain_logits(peft, adapters, prompt, row)
        labels = torch.tensor([IGNORE] * len(prompt) + row.labels)
        total = total + nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE, reduction="sum")
        count += int((labels[1:] != IGNORE).sum())
    return total / count


# --- what both are given --------------------------------------------------------------------------------------------


def pair(
    name: str, dtype: torch.dtype, *, checkpointing: bool = False, targets: Sequence[str] | None = None
) -> tuple[Student, Any]:
    """A student, and the oracle: another copy of its model."""
    student = Student(peft_model(name, dtype, targets), checkpointing=checkpointing)
    return student, exact(peft_model(name, dtype, targets))


def make_rows(lengths: Sequence[tuple[int, int]], seed: int = 0) -> list[Encoded]:
    """Samples of (context, response) tokens; one token of every response but the last is not supervised either."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for context, response in lengths:
        ids = torch.randint(3, V, (context + response,), generator=g).tolist()
        labels = [IGNORE] * context + ids[context:]
        if response > 2:
            labels[context + 1] = IGNORE
        rows.append(Encoded(ids, labels))
    return rows


def random_theta(student: Student, dtype: torch.dtype, seed: int = 3) -> Tensor:
    size = sum(shape.numel() for shape in student.shapes.values())
    drawn = 0.1 * torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(dtype).requires_grad_()


def random_prompts(student: Student, count: int, k: int, dtype: torch.dtype) -> Tensor:
    """[count, k, D]"""
    shape = (count, k, student.embedding.shape[1])
    drawn = 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return drawn.to(dtype).requires_grad_()
