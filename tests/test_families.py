"""Every family against transformers' own model: logits, gradients, hypergradients, packed and one by one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from nacd_fast.data import Encoded, Packed, pack
from nacd_fast.errors import InputError
from nacd_fast.families import FAMILIES
from nacd_fast.forwards import ATTENTION, attention_forward
from nacd_fast.student import Student
from nacd_fast.unroll import unrolled_sgd
from tests.oracle import (
    GATED,
    GEMMA,
    GPT2,
    MODELS,
    OPT,
    ROPE_2,
    exact,
    make_rows,
    pair,
    peft_model,
    plain_logits,
    plain_loss,
    random_prompts,
    random_theta,
)

ROWS = make_rows([(3, 4), (1, 1), (0, 5), (30, 9), (6, 1)])  # a response of one token, none ahead, one far longer


def our_logits(student: Student, adapters: dict[str, Tensor], prompts: Tensor, rows: list[Encoded]) -> list[Tensor]:
    """[k + T - 1, V] of every sample."""
    batch = pack(rows, prompts.shape[1])
    z = nn.functional.linear(student.hidden(adapters, prompts, batch), student.head.weight, student.head.bias)
    z = z if student.softcap is None else student.softcap * torch.tanh(z / student.softcap)
    return list(z.split([b - a for a, b in zip(batch.cu_seqlens, batch.cu_seqlens[1:])]))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_every_family_is_tested() -> None:
    assert {type(make()) for make in MODELS.values()} == {family.model for family in FAMILIES}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_as_exact_as_transformers(name: str, dtype: torch.dtype) -> None:
    """Against float64, on the same weights rounded to `dtype`."""
    student, theirs = Student(peft_model(name, dtype)), peft_model(name, dtype)
    theirs.get_base_model().set_attn_implementation("eager")
    truth = exact(peft_model(name, dtype).double())
    theta, prompts = (t.detach() for t in (random_theta(student, dtype), random_prompts(student, 5, 2, dtype)))
    ours = our_logits(student, student.unflatten(theta), prompts, ROWS)
    adapters = {n: t.double() for n, t in student.unflatten(theta).items()}
    errors = []
    for logits, prompt, row in zip(ours, prompts, ROWS, strict=True):
        true = plain_logits(truth, adapters, prompt.double(), row)[:-1]
        plain = plain_logits(theirs, student.unflatten(theta), prompt, row)[:-1]
        errors.append([(z.double() - true).abs().max().item() for z in (logits, plain)] + [true.abs().max().item()])
    error, base, size = (max(column) for column in zip(*errors, strict=True))
    assert base < 30 * torch.finfo(dtype).eps * size, "the oracle is another model"
    assert error <= 2 * base + torch.finfo(dtype).eps * size, f"error {error:.2e}, transformers' own {base:.2e}"


WAYS = [(name, *way) for name in MODELS for way in ((False, 0), (True, 0), (False, 2))]


@pytest.mark.parametrize(("name", "checkpointing", "retain"), [*WAYS, ("llama", True, 1)])
def test_hypergradient_equals_create_graph(name: str, checkpointing: bool, retain: int) -> None:
    """With respect to the prompts, alpha and theta_0, for two steps that share a sample."""
    student, plain = pair(name, torch.float64, checkpointing=checkpointing)
    prompts = random_prompts(student, 5, 2, torch.float64)
    picks = [[0, 1, 3], [3, 4, 2]]
    results = []
    for flat in (True, False):
        theta0 = random_theta(student, torch.float64)
        alpha = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
        target = torch.linspace(-1, 1, theta0.numel(), dtype=torch.float64)
        if flat:
            inputs = [(prompts[rows], pack([ROWS[i] for i in rows], 2)) for rows in picks]

            def inner_loss(p: Tensor, b: tuple[Tensor, Packed]) -> Tensor:
                return student.loss(student.unflatten(p), *b, retain=retain > 0)

            theta = unrolled_sgd(inner_loss, theta0, alpha, inputs, retain=retain)
        else:
            theta = theta0
            for rows in picks:
                loss = plain_loss(plain, student.unflatten(theta), prompts[rows], [ROWS[i] for i in rows])
                theta = theta - alpha * torch.autograd.grad(loss, theta, create_graph=True)[0]
        loss = (theta - target).square().sum()
        results.append([theta.detach(), *torch.autograd.grad(loss, (prompts, alpha, theta0))])
    for ours, theirs in zip(*results, strict=True):
        assert relative(ours, theirs) <= 1e-8


@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_one_by_one(name: str) -> None:
    """Loss, and its gradients in theta and in the prompts."""
    student, plain = pair(name, torch.float64)
    prompts, theta = random_prompts(student, 5, 2, torch.float64), random_theta(student, torch.float64)
    supervised = [int((pack([row], 2).targets != -100).sum()) for row in ROWS]
    together = student.loss(student.unflatten(theta), prompts, pack(ROWS, 2))
    alone = [student.loss(student.unflatten(theta), prompts[i : i + 1], pack([row], 2)) for i, row in enumerate(ROWS)]
    mean = torch.stack([loss * n for loss, n in zip(alone, supervised, strict=True)]).sum() / sum(supervised)
    oracle = plain_loss(plain, student.unflatten(theta), prompts, ROWS)
    results = [[loss.detach(), *torch.autograd.grad(loss, (theta, prompts))] for loss in (together, mean, oracle)]
    for packed, single, plainly in zip(*results, strict=True):
        assert relative(packed, single) <= 1e-12
        assert relative(packed, plainly) <= 1e-10


@pytest.mark.parametrize(("name", "targets"), [("llama", ["q_proj", "up_proj"]), ("gpt2", ["c_fc"])])
def test_layers_may_lack_adapters(name: str, targets: list[str]) -> None:
    student, plain = pair(name, torch.float64, targets=targets)
    prompts, theta = random_prompts(student, 5, 2, torch.float64), random_theta(student, torch.float64)
    ours = student.loss(student.unflatten(theta), prompts, pack(ROWS, 2))
    theirs = plain_loss(plain, student.unflatten(theta), prompts, ROWS)
    assert relative(ours, theirs) <= 1e-12
    for a, b in zip(*(torch.autograd.grad(loss, (theta, prompts)) for loss in (ours, theirs)), strict=True):
        assert relative(a, b) <= 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_of_tokens_is_those_tokens(name: str) -> None:
    """Prompts live where the decoder reads: a row of the embedding table in front is its token in front."""
    student = Student(peft_model(name, torch.float64))
    adapters = student.unflatten(random_theta(student, torch.float64).detach())
    tokens = torch.tensor([[4, 9], [7, 3], [28, 5], [6, 6], [11, 12]])
    longer = [Encoded([*p, *row.input_ids], [-100, -100, *row.labels]) for p, row in zip(tokens.tolist(), ROWS)]
    in_front = student.hidden(adapters, student.embedding[tokens], pack(ROWS, 2))
    assert torch.equal(in_front, student.hidden(adapters, None, pack(longer, 0)))
    losses = [
        student.loss(adapters, *given)
        for given in ((student.embedding[tokens], pack(ROWS, 2)), (None, pack(longer, 0)))
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize("name", MODELS)
def test_a_sample_changes_no_other(name: str) -> None:
    student = Student(peft_model(name, torch.float32))
    adapters = student.unflatten(random_theta(student, torch.float32).detach())
    prompts = random_prompts(student, 5, 2, torch.float32).detach()
    before = our_logits(student, adapters, prompts, ROWS)
    longest = Encoded([(t + 1) % 29 for t in ROWS[3].input_ids], ROWS[3].labels)
    after = our_logits(student, adapters, prompts, [*ROWS[:3], longest, *ROWS[4:]])
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, True, False, True]
    other = prompts.clone()
    other[0] += 1
    after = our_logits(student, adapters, other, ROWS)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False, True, True, True, True]


# --- what is refused ------------------------------------------------------------------------------------------------


class OtherNorm(nn.LayerNorm):
    """Not a LayerNorm, for all that one can tell."""


def student_of(model: Any, **lora: Any) -> Student:
    config = LoraConfig(r=2, **{"target_modules": ["q_proj", "c_attn", "qkv_proj"], **lora})
    return Student(get_peft_model(model.eval().requires_grad_(False), config))


def opt(**options: Any) -> Any:
    return hf.OPTForCausalLM(hf.OPTConfig(**{**OPT, "word_embed_proj_dim": 16, **options}))


def llama(**options: Any) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**GATED, **options))


def gpt2(**options: Any) -> Any:
    return hf.GPT2LMHeadModel(hf.GPT2Config(**{**GPT2, **options}))


def phi() -> Any:
    return hf.Phi3ForCausalLM(hf.Phi3Config(**GATED))


def changed(model: Any, path: str, **attributes: Any) -> Any:
    """The model with other attributes of a module."""
    for name, value in attributes.items():
        setattr(model.get_submodule(path), name, value)
    return model


def adapted_twice() -> Student:
    peft = get_peft_model(llama().requires_grad_(False), LoraConfig(r=2, target_modules=["q_proj"]))
    peft.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    return Student(peft)


def another_name() -> Student:
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    return Student(get_peft_model(llama().requires_grad_(False), lora, adapter_name="other"))


DYNAMIC = dict(rope_type="dynamic", rope_theta=100.0, factor=2.0)
Q_PROJ = "model.layers.0.self_attn.q_proj"
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "family": (lambda: student_of(phi()), r"model type 'phi3' \(Phi3ForCausalLM\): matching knows OPTForCausalLM, Ll"),
    "module": (
        lambda: student_of(changed(llama(), "model.layers.1", input_layernorm=OtherNorm(16))),
        "^model.layers.1.input_layernorm is a tests.test_families.OtherNorm: matching knows no second derivative of",
    ),
    "activation": (
        lambda: student_of(opt(activation_function="gelu_fast")),
        "^model.decoder.layers.0.activation_fn is a transformers.activations.FastGELUActivation: ",
    ),
    "a gate's activation by itself": (
        lambda: student_of(opt(activation_function="silu")),
        "^model.decoder.layers.0.activation_fn is a transformers.activations.SiLUActivation: ",
    ),
    "gate": (
        lambda: student_of(llama(hidden_act="relu")),
        "^model.layers.0.mlp.act_fn is a torch.nn.modules.activation.ReLU: .* as a gate$",
    ),
    "head": (
        lambda: student_of(changed(llama(), "", lm_head=nn.Bilinear(16, 16, 29))),
        "^the output head is a torch.nn.modules.linear.Bilinear: matching knows a linear layer only",
    ),
    "dropout of a module": (
        lambda: student_of(changed(gpt2(), "transformer.h.1.attn.resid_dropout", p=0.25)),
        "^transformer.h.1.attn.resid_dropout drops out with probability 0.25: matching needs 0",
    ),
    "dropout of a config": (lambda: student_of(opt(dropout=0.1)), "^dropout=0.1 in the model's config: .* 0 only"),
    "attention dropout": (lambda: student_of(llama(attention_dropout=0.2)), "^attention_dropout=0.2 in the model's"),
    "not causal": (lambda: student_of(llama(is_causal=False)), "^is_causal=False in the model's config: .* True only"),
    "both directions": (
        lambda: student_of(
            hf.Gemma2ForCausalLM(hf.Gemma2Config(**GEMMA, use_bidirectional_attention=True)),
        ),
        "^use_bidirectional_attention=True in",
    ),
    "cross attention": (lambda: student_of(gpt2(add_cross_attention=True)), "^add_cross_attention=True in"),
    "upcast attention": (lambda: student_of(gpt2(reorder_and_upcast_attn=True)), "^reorder_and_upcast_attn=True in"),
    "rope that follows the longest sample": (
        lambda: student_of(llama(rope_parameters=DYNAMIC)),
        "^rope_type='dynamic' in the model's config: matching honours default, linear",
    ),
    "one rope of two": (
        lambda: student_of(
            hf.Gemma3ForCausalLM(
                hf.Gemma3TextConfig(**GEMMA, rope_parameters={**ROPE_2, "full_attention": DYNAMIC}),
            )
        ),
        "^rope_type='dynamic'",
    ),
    "DoRA": (lambda: student_of(llama(), use_dora=True), f"^{Q_PROJ}: matching knows one plain LoRA adapter a layer"),
    "LoRA's dropout": (lambda: student_of(llama(), lora_dropout=0.1), f"^{Q_PROJ}: matching knows one plain"),
    "LoRA's bias": (lambda: student_of(llama(attention_bias=True), lora_bias=True), f"^{Q_PROJ}: matching knows one"),
    "adapted embedding": (
        lambda: student_of(llama(), target_modules=["embed_tokens"]),
        "^model.embed_tokens is a peft.tuners.lora.layer.Embedding: matching knows",
    ),
    "two adapters": (adapted_twice, f"^{Q_PROJ}: matching knows one plain"),
    "another adapter": (another_name, f"^{Q_PROJ}: matching knows one plain"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_is_named(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        call()


def test_a_refused_model_is_left_as_it_was() -> None:
    model = changed(llama(), "model", norm=OtherNorm(16))
    with pytest.raises(InputError, match=r"^model.norm is a"):
        student_of(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert model.config._attn_implementation != ATTENTION


@pytest.mark.parametrize(
    ("name", "value"), [("s_aux", torch.zeros(4)), ("attention_mask", torch.ones(1, 1, 3, 3)), ("dropout", 0.1)]
)
def test_what_attention_does_not_know_is_named(name: str, value: Any) -> None:
    q = torch.zeros(1, 4, 3, 8)
    given = {"attention_mask": None, name: value}
    with pytest.raises(InputError, match=f"^Linear passes {name} to its attention, which matching does not know"):
        attention_forward(nn.Linear(1, 1), q, q, q, scaling=1.0, position_ids=None, **given)
