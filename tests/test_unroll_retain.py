"""Steps whose graphs are retained give what dual passes give."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nacd_fast.unroll import unrolled_sgd
from nacd_fast.updates import SGD, AdamW, Update
from nacd_kernels import rms_norm, silu_mul

UPDATES: dict[str, Update] = {"sgd": SGD(), "nesterov": SGD(momentum=0.8, nesterov=True), "adamw": AdamW(eps=1e-4)}
STEPS = 4


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inner_loss(theta: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    h = silu_mul(x @ theta["gate"], x @ theta["up"])
    return (rms_norm(h, None) @ theta["down"] - y).square().mean()


def problem() -> tuple[dict[str, Tensor], Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    theta = {"gate": rand(3, 5, seed=0), "up": rand(3, 5, seed=1), "down": rand(5, 2, seed=2), "idle": rand(2, seed=3)}
    x, y = rand(6, 3, seed=4).requires_grad_(), rand(6, 2, seed=5)
    alpha = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    return (
        {name: t.requires_grad_() for name, t in theta.items()},
        alpha,
        x,
        [(x[n : n + 3], y[:3]) for n in range(STEPS)],
    )


def hypergradient(update: Update, retain: int) -> list[Tensor]:
    theta0, alpha, x, inputs = problem()
    theta = unrolled_sgd(inner_loss, theta0, alpha, inputs, update=update, retain=retain)
    loss = sum((t.square().sum() for t in theta.values()), torch.zeros(()))
    return list(torch.autograd.grad(loss, (x, alpha, *theta0.values())))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("retain", [1, 3, STEPS, STEPS + 5])
def test_equals_dual_passes(update: str, retain: int) -> None:
    for ours, theirs in zip(hypergradient(UPDATES[update], retain), hypergradient(UPDATES[update], 0), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_only_the_last_steps_are_retained() -> None:
    """A retained step runs its loss once, another one twice."""
    calls: list[int] = []
    theta0, alpha, _, inputs = problem()

    def counted(theta: Any, batch: Any) -> Tensor:
        calls.append(next(n for n, item in enumerate(inputs) if torch.equal(item[0], batch[0])))
        return inner_loss(theta, batch)

    theta = unrolled_sgd(counted, theta0, alpha, inputs, retain=1)
    theta["down"].sum().backward()
    assert sorted(calls) == [0, 0, 1, 1, 2, 2, 3]


def test_can_be_differentiated_again_with_another_loss() -> None:
    theta0, alpha, x, inputs = problem()
    theta = unrolled_sgd(inner_loss, theta0, alpha, inputs, retain=2)
    once = torch.autograd.grad(theta["down"].sum(), x, retain_graph=True)[0]
    again = torch.autograd.grad(theta["down"].sum(), x)[0]
    assert torch.equal(once, again)


def test_a_loss_linear_in_theta_has_no_curvature() -> None:
    theta0 = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    theta = unrolled_sgd(lambda t, c: (t * c).sum(), theta0, 0.1, [torch.ones(3, dtype=torch.float64)] * 2, retain=2)
    assert torch.equal(torch.autograd.grad(theta.sum(), theta0)[0], torch.ones(3, dtype=torch.float64))


def test_a_negative_number_is_named() -> None:
    theta0, alpha, _, inputs = problem()
    with pytest.raises(ValueError, match="retain=-1"):
        unrolled_sgd(inner_loss, theta0, alpha, inputs, retain=-1)
