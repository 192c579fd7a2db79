"""The ops and the unroll on a GPU against the CPU, in float64. `make gpu-check` runs this where there is one."""

import pytest
import torch
from torch import Tensor

from nacd_fast.unroll import unrolled_sgd
from nacd_fast.updates import SGD
from tests.kernels import test_ops as on_cpu

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", on_cpu.CASES)
@pytest.mark.parametrize("mode", ["forward over reverse", "reverse over reverse"])
def test_hessian_vector_product_equals_the_cpu(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, _, inputs = on_cpu.CASES[name]
    tangents: list[Tensor | None] = [torch.ones_like(t) for t in inputs]
    want = on_cpu.hessian_vector(op, on_cpu.leaves(name), tangents, mode)
    for frozen in ("W", "BIAS", "GAIN", "SHIFT", "TABLE", "LABELS"):  # the cases read them when they are called
        monkeypatch.setattr(on_cpu, frozen, getattr(on_cpu, frozen).cuda())
    leaves = [t.cuda().requires_grad_() for t in inputs]
    got = on_cpu.hessian_vector(op, leaves, [torch.ones_like(t) for t in leaves], mode)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-10, atol=1e-10)


def test_unroll_equals_the_cpu() -> None:
    results = []
    for device in ("cpu", "cuda"):
        g = torch.Generator().manual_seed(0)
        w, x = (torch.randn(5, generator=g, dtype=torch.float64).to(device).requires_grad_() for _ in range(2))

        def inner_loss(theta: Tensor, batch: Tensor) -> Tensor:
            return (theta * batch).sin().square().sum()

        out = unrolled_sgd(inner_loss, w, torch.tensor(0.1, dtype=torch.float64), [x] * 6, update=SGD(momentum=0.5))
        results.append([t.cpu() for t in torch.autograd.grad(out.sum(), (w, x))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
