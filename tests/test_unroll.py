"""The flat hypergradient against a create_graph unroll of independent, plain PyTorch models."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nacd_fast.config import ModelConfig
from nacd_fast.data import Encoded, pack
from nacd_fast.errors import NonFiniteError
from nacd_fast.student import Student
from nacd_fast.unroll import unrolled_sgd
from nacd_fast.updates import SGD, AdamW, Update
from tests.oracle import make_rows, pair, plain_loss, random_prompts, random_theta


def build(name: str, dtype: torch.dtype, checkpointing: bool = False) -> tuple[Student, Any]:
    """A student with adapters on its attention only, and the oracle."""
    return pair(name, dtype, checkpointing=checkpointing, targets=ModelConfig().targets)


def batches(steps: int) -> list[tuple[list[int], list[Encoded]]]:
    """For every step three of five samples, some in several steps: their numbers, and they."""
    rows = make_rows([(3, 4), (3, 4), (3, 2), (2, 5), (4, 3)])
    g = torch.Generator().manual_seed(2)
    picks = [torch.randperm(5, generator=g)[:3].tolist() for _ in range(steps)]
    return [(chosen, [rows[i] for i in chosen]) for chosen in picks]


def reference_step(update: Update, theta: Tensor, state: list, grad: Tensor, lr: Tensor, n: int) -> Tensor:
    """torch.optim's formulas, written out once more."""
    if isinstance(update, AdamW):
        b1, b2 = update.betas
        m, v = (
            (b1 * state[0] + (1 - b1) * grad, b2 * state[1] + (1 - b2) * grad**2)
            if state
            else ((1 - b1) * grad, (1 - b2) * grad**2)
        )
        state[:] = [m, v]
        return (
            theta
            - lr * update.weight_decay * theta
            - lr * (m / (1 - b1 ** (n + 1))) / ((v / (1 - b2 ** (n + 1))).sqrt() + update.eps)
        )
    assert isinstance(update, SGD)
    grad = grad + update.weight_decay * theta
    if update.momentum:
        state[:] = [update.momentum * state[0] + grad if state else grad]
        grad = grad + update.momentum * state[0] if update.nesterov else state[0]
    return theta - lr * grad


UPDATES: dict[str, Update] = {
    "sgd": SGD(),
    "sgd, weight decay": SGD(weight_decay=0.1),
    "momentum": SGD(momentum=0.9),
    "nesterov": SGD(momentum=0.8, nesterov=True, weight_decay=0.05),
    # its slope is 1 / eps where a gradient vanishes: at 1e-8 the hypergradient amplifies float32 rounding to 1e-3
    "adamw": AdamW(weight_decay=0.1, eps=1e-4),
}


def hypergradients(
    student: Student, plain: Any, steps: int, update: Update, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """(theta_N, and d/d(prompts, alpha, theta_0) of a loss on it) by our sweep and by a create_graph unroll."""
    prompts, data = random_prompts(student, 5, 2, dtype), batches(steps)
    rate = 0.002 if isinstance(update, AdamW) else 0.05
    results = []
    for flat in (True, False):
        theta0, alpha = random_theta(student, dtype), torch.tensor(rate, dtype=dtype, requires_grad=True)
        target = torch.linspace(-1, 1, theta0.numel(), dtype=dtype)
        if flat:
            inputs = [(prompts[chosen], pack(rows, 2)) for chosen, rows in data]
            theta = unrolled_sgd(
                lambda p, b: student.loss(student.unflatten(p), *b), theta0, alpha, inputs, update=update
            )
        else:
            theta = theta0
            state: list[Tensor] = []
            for n, (chosen, rows) in enumerate(data):
                inner = plain_loss(plain, student.unflatten(theta), prompts[chosen], rows)
                (grad,) = torch.autograd.grad(inner, theta, create_graph=True)
                theta = reference_step(update, theta, state, grad, alpha, n)
        loss = ((theta - target) ** 2).sum() / ((theta0.detach() - target) ** 2).sum()
        results.append([theta.detach(), *torch.autograd.grad(loss, (prompts, alpha, theta0))])
    return results[0], results[1]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("steps", [1, 2, 6, 16])
@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_equals_create_graph(family: str, steps: int, update: str, dtype: torch.dtype, limit: float) -> None:
    """In float32 a ReLU may flip where two correct programs round differently; at these seeds none does."""
    student, plain = build(family, dtype)
    for ours, theirs in zip(*hypergradients(student, plain, steps, UPDATES[update], dtype), strict=True):
        assert relative(ours, theirs) <= limit


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_equals_create_graph_with_adamw_as_it_comes(family: str) -> None:
    """At eps = 1e-8 too, where only float64 carries the comparison."""
    student, plain = build(family, torch.float64)
    for ours, theirs in zip(*hypergradients(student, plain, 6, AdamW(), torch.float64), strict=True):
        assert relative(ours, theirs) <= 1e-9


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_checkpointing_changes_nothing(family: str) -> None:
    student, plain = build(family, torch.float64, checkpointing=True)
    calls: list[None] = []
    layers: Any = student.backbone.layers
    layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(None))
    for ours, theirs in zip(*hypergradients(student, plain, 3, SGD(), torch.float64), strict=True):
        assert relative(ours, theirs) <= 1e-9
    assert len(calls) == 3 * 2 * 2  # steps, sweeps, once forward and once recomputed


def quadratic(theta: dict[str, Tensor], batch: tuple[Tensor, str]) -> Tensor:
    x, _ = batch
    return ((theta["w"] * x).sin() + theta["b"]).square().sum()


def toy(steps: int) -> tuple[dict[str, Tensor], list]:
    g = torch.Generator().manual_seed(0)
    theta = {
        "w": torch.randn(3, 2, generator=g, dtype=torch.float64),
        "b": torch.randn(2, generator=g, dtype=torch.float64),
    }
    return theta, [(torch.randn(3, 2, generator=g, dtype=torch.float64), "a name") for _ in range(steps)]


def test_gradcheck_of_trees_and_of_one_rate_a_step() -> None:
    """Against finite differences, with dicts, strings among the inputs, and a learning rate for every step."""
    theta, data = toy(3)

    def final(w: Tensor, b: Tensor, lr: Tensor, *xs: Tensor) -> Tensor:
        out = unrolled_sgd(
            quadratic,
            {"w": w, "b": b},
            lr,
            [(x, name) for x, (_, name) in zip(xs, data, strict=True)],
            update=SGD(momentum=0.5),
        )
        return out["w"].sum() + out["b"].square().sum()

    leaves = [theta["w"], theta["b"], torch.tensor([0.1, 0.05, 0.2], dtype=torch.float64), *(x for x, _ in data)]
    assert torch.autograd.gradcheck(final, [t.requires_grad_() for t in leaves])


def test_adamw_is_finite_where_a_gradient_is_exactly_zero() -> None:
    """As for LoRA's A while B = 0: the root of Adam's second moment has an infinite slope there."""
    theta, lr = (
        torch.zeros(2, dtype=torch.float64, requires_grad=True),
        torch.tensor(0.1, dtype=torch.float64, requires_grad=True),
    )
    out = unrolled_sgd(lambda p, x: (p[0] * x).sum(), theta, lr, [torch.ones(()).double()] * 2, update=AdamW())
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (theta, lr)))


def test_only_theta_is_kept_for_sgd() -> None:
    theta, data = toy(4)
    seen = []

    class Spy(SGD):
        def step(self, theta: Tensor, state: tuple, grad: Tensor, lr: Tensor, n: int) -> tuple:
            seen.append(n)
            return super().step(theta, state, grad, lr, n)

    out = unrolled_sgd(quadratic, {k: t.requires_grad_() for k, t in theta.items()}, 0.1, data, update=Spy())
    node = out["w"].grad_fn
    while not hasattr(node, "kept"):
        node = node.next_functions[0][0]
    assert [kept[1:] for kept in node.kept] == [((), None, None)] * 4 and seen == [0, 1, 2, 3]


def test_non_finite_loss_names_its_step() -> None:
    theta, data = toy(4)
    data[2] = (torch.full((3, 2), torch.nan, dtype=torch.float64), "")
    with pytest.raises(NonFiniteError, match="inner step 2 of 4"):
        unrolled_sgd(quadratic, theta, 0.1, data)


def test_random_inner_loss_is_caught() -> None:
    theta, data = toy(3)
    out = unrolled_sgd(
        lambda p, b: nn.functional.dropout(p["w"] * b[0], 0.5).square().sum() + p["b"].sum(),
        {k: t.requires_grad_() for k, t in theta.items()},
        0.1,
        data,
    )
    with pytest.raises(RuntimeError, match="not deterministic"):
        out["w"].sum().backward()


@pytest.mark.parametrize("final", [lambda w: w.square().sum(), lambda w: w.sum()], ids=["curved", "linear"])
def test_second_derivative_through_the_unroll_is_refused(final: Callable) -> None:
    """Also where the cotangent is a constant, and only the sweep itself depends on theta."""
    theta, data = toy(2)
    w = theta["w"].requires_grad_()
    (g,) = torch.autograd.grad(final(unrolled_sgd(quadratic, theta, 0.1, data)["w"]), w, create_graph=True)
    with pytest.raises(RuntimeError, match="the second derivative through unrolled_sgd is not there"):
        (g.sum() + w.sum()).backward()


def test_an_input_changed_in_place_before_the_backward_pass_raises() -> None:
    theta, data = toy(2)
    x = data[1][0].requires_grad_()
    out = unrolled_sgd(quadratic, theta, 0.1, data)["w"].sum()
    with torch.no_grad():
        x += 1e-6
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize(
    ("theta", "lr", "message"),
    [
        ({"a": torch.zeros(2), "b": torch.zeros(2).double()}, 0.1, "one dtype"),
        ({"a": torch.zeros(2, dtype=torch.int64)}, 0.1, "float tensors"),
        ({"a": torch.zeros(2)}, torch.zeros(3), r"lr has shape \(3,\)"),
    ],
)
def test_bad_arguments_are_named(theta: dict, lr: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unrolled_sgd(lambda p, x: p["a"].sum(), theta, lr, [torch.zeros(1)] * 2)


def test_no_step_is_the_identity() -> None:
    theta, _ = toy(1)
    assert unrolled_sgd(quadratic, theta, 0.1, []) is theta
