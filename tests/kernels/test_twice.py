"""The one construction behind every op, under everything that autograd can put around it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from nacd_kernels import bare_tangents, flash_attention, lora_linear, rms_norm, silu_mul, twice_differentiable
from nacd_kernels.twice import add, autocast, times


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_cubic(x: Tensor, w: Tensor) -> Tensor:
    return x**3 * w**2


class Cubic:
    """y = x^3 w^2 with 2 x as a needless statistic; notes which of its functions are called."""

    def __init__(self, joint: bool = False, saves_output: bool = False):
        self.calls: list[str] = []
        self.saves_output = saves_output
        pair: Any = dict(forward_dual=self.forward_dual, backward_dual=self.backward_dual) if joint else {}
        functions = (self.forward, self.backward, self.jvp, self.backward_jvp)
        self.op = twice_differentiable(*functions, differentiable=2, saves_output=saves_output, **pair)

    def unpack(self, stats: tuple) -> Tensor:
        return stats[-1] / 2

    def forward(self, x: Tensor, w: Tensor) -> Any:
        self.calls.append("forward")
        assert torch.is_grad_enabled() is False and not torch.is_autocast_enabled("cpu")
        return x**3 * w**2, (2 * x,)

    def backward(self, inputs: tuple, stats: tuple, dy: Tensor, needs: tuple) -> Any:
        self.calls.append("backward")
        (_, w), x = inputs, self.unpack(stats)
        if self.saves_output:
            assert torch.equal(stats[0], x**3 * w**2)
        return (3 * x**2 * w**2 * dy if needs[0] else None), (2 * x**3 * w * dy if needs[1] else None)

    def jvp(self, inputs: tuple, stats: tuple, tangents: tuple) -> Any:
        self.calls.append("jvp")
        (_, w), x = inputs, self.unpack(stats)
        x_t, w_t = tangents
        y_t = add(times(x_t, 3 * x**2 * w**2), times(w_t, 2 * x**3 * w))
        return y_t, (None if x_t is None else 2 * x_t,)

    def backward_jvp(
        self, inputs: tuple, stats: tuple, tangents: tuple, stats_t: tuple, dy: Tensor, dy_t: Any, needs: tuple
    ) -> Any:
        self.calls.append("backward_jvp")
        (_, w), x = inputs, self.unpack(stats)
        x_t, w_t = (torch.zeros_like(x) if t is None else t for t in tangents)
        assert torch.equal(torch.zeros_like(x) if stats_t[-1] is None else stats_t[-1], 2 * x_t)
        dy_t = torch.zeros_like(x) if dy_t is None else dy_t
        dx_t = 6 * x * w**2 * x_t * dy + 6 * x**2 * w * w_t * dy + 3 * x**2 * w**2 * dy_t
        dw_t = 6 * x**2 * w * x_t * dy + 2 * x**3 * w_t * dy + 2 * x**3 * w * dy_t
        return (dx_t if needs[0] else None), (dw_t if needs[1] else None)

    def forward_dual(self, inputs: tuple, tangents: tuple) -> Any:
        calls = len(self.calls)
        y, stats = self.forward(*inputs)
        y_t, stats_t = self.jvp(inputs, (y, *stats) if self.saves_output else stats, tangents)
        self.calls[calls:] = ["forward_dual"]
        return y, stats, y_t, stats_t

    def backward_dual(
        self, inputs: tuple, stats: tuple, tangents: tuple, stats_t: tuple, dy: Tensor, dy_t: Any, needs: tuple
    ) -> Any:
        calls = len(self.calls)
        dx = self.backward(inputs, stats, dy, needs)
        dx_t = self.backward_jvp(inputs, stats, tangents, stats_t, dy, dy_t, needs)
        self.calls[calls:] = ["backward_dual"]
        return dx, dx_t


VARIANTS = pytest.mark.parametrize("saves_output", [False, True])


def dual_pass(fn: Callable, inputs: list[Tensor], tangents: list[Any]) -> list[Tensor]:
    with forward_ad.dual_level(), bare_tangents():
        pairs = zip(inputs, tangents, strict=True)
        duals = [x if t is None else forward_ad.make_dual(x, t) for x, t in pairs]
        grads = torch.autograd.grad(fn(*duals).square().sum(), duals)
        return [t for g in grads for t in forward_ad.unpack_dual(g) if t is not None]


@VARIANTS
@pytest.mark.parametrize("tangents", ["both", "first", "second"])
def test_a_dual_pass_calls_the_pairs_and_gets_the_same(saves_output: bool, tangents: str) -> None:
    inputs = [rand(3, seed=i).requires_grad_() for i in (0, 1)]
    v: list[Any] = [rand(3, seed=2) if tangents != "second" else None, rand(3, seed=3) if tangents != "first" else None]
    joint, apart = Cubic(True, saves_output), Cubic(False, saves_output)
    ours, theirs = dual_pass(joint.op, inputs, v), dual_pass(apart.op, inputs, v)
    plain = dual_pass(plain_cubic, inputs, v)
    assert joint.calls == ["forward_dual", "backward_dual"]
    assert apart.calls == ["forward", "jvp", "backward", "backward_jvp"]
    for a, b, want in zip(ours, theirs, plain, strict=True):
        torch.testing.assert_close(a, want)
        torch.testing.assert_close(b, want)


def test_a_graph_keeps_no_tangents() -> None:
    x, w = (rand(3, seed=i).requires_grad_() for i in (0, 1))
    with forward_ad.dual_level(), bare_tangents():
        y = Cubic(joint=True).op(forward_ad.make_dual(x, x.detach()), w)
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    nodes: list[Any] = [y.grad_fn, g.grad_fn]
    for node in nodes:
        while not hasattr(node, "dual"):  # a view that autograd put in between
            node = node.next_functions[0][0]
        assert node.dual.result is None and node.dual.tangents == node.dual.saved_t == () and node.dual.dy_t is None


def test_pairs_are_for_dual_passes_only() -> None:
    """Elsewhere their tangents would carry no graph, and nothing could refuse to differentiate them."""
    cubic, x, w = Cubic(True), rand(3).requires_grad_(), rand(3, seed=1).requires_grad_()
    with forward_ad.dual_level():
        torch.autograd.grad(cubic.op(forward_ad.make_dual(x, x.detach()), w).sum(), x)
    with bare_tangents():
        cubic.op(x, w).sum().backward()
        torch.func.jvp(cubic.op, (x.detach(), w.detach()), (x.detach(), w.detach()))
    assert not {"forward_dual", "backward_dual"} & set(cubic.calls)


@VARIANTS
def test_missing_gradients_and_tangents_are_not_made(saves_output: bool) -> None:
    """A frozen first input: its gradient is not asked for, its tangent is None."""
    cubic, x, w = Cubic(saves_output=saves_output), rand(3), rand(3, seed=1).requires_grad_()
    seen: list[Any] = []

    def watched(inputs: tuple, stats: tuple, tangents: tuple) -> Any:
        seen.append(tangents)
        return cubic.jvp(inputs, stats, tangents)

    op = twice_differentiable(
        cubic.forward, cubic.backward, watched, cubic.backward_jvp, differentiable=2, saves_output=saves_output
    )
    (g,) = torch.autograd.grad(op(x, w).sum(), w, create_graph=True)
    torch.testing.assert_close(g, 2 * x**3 * w)
    (h,) = torch.autograd.grad(g.sum(), w)
    torch.testing.assert_close(h, 2 * x**3)
    with forward_ad.dual_level():
        op(x, forward_ad.make_dual(w, torch.ones_like(w)))
    assert [t[0] for t in seen] == [None, None] and all(t[1] is not None for t in seen)


@VARIANTS
@pytest.mark.parametrize("joint", [False, True])
def test_torch_func(saves_output: bool, joint: bool) -> None:
    op, x, w = Cubic(joint, saves_output).op, rand(4), rand(4, seed=1)
    f, plain = (lambda x, w: op(x, w).square().sum()), (lambda x, w: plain_cubic(x, w).square().sum())
    both = (0, 1)
    results = []
    for fn in (f, plain):
        pull = torch.func.vjp(fn, x, w)[1]
        hessian = torch.func.hessian(fn, argnums=both)(x, w)
        reverse = torch.func.jacrev(torch.func.jacrev(fn, argnums=both), argnums=both)(x, w)
        forward = torch.func.jvp(torch.func.grad(fn, argnums=both), (x, w), (w, x))
        per_sample = torch.func.vmap(torch.func.grad(fn), in_dims=(1, None))(torch.stack([x, w, x], 1), w)
        results.append(
            [torch.func.grad(fn, argnums=both)(x, w), pull(torch.tensor(2.0).double()), hessian, reverse, forward]
            + [per_sample]
        )
    torch.testing.assert_close(results[0], results[1])


def test_torch_func_on_ops_with_data_dependent_blocks() -> None:
    def loss(attention: Callable, x: Tensor) -> Tensor:
        q, k, v = x.chunk(3, -1)
        return attention(q, k, v).square().sum()

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.mT * q.shape[-1] ** -0.5
        return s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -torch.inf).softmax(-1) @ v

    x = rand(1, 1, 3, 6)
    ours, theirs = (torch.func.hessian(lambda x, f=f: loss(f, x))(x) for f in (flash_attention, plain))
    torch.testing.assert_close(ours, theirs)


def test_what_torch_func_cannot_have_raises() -> None:
    op, x, w = Cubic().op, rand(3), rand(3, seed=1)

    def f(x: Tensor) -> Tensor:
        return op(x, w).sum()

    with pytest.raises(RuntimeError, match="the third derivative of an op is not there"):
        torch.func.grad(lambda x: torch.func.grad(lambda x: torch.func.grad(f)(x).sum())(x).sum())(x)
    with pytest.raises(RuntimeError, match="the reverse-over-forward derivative of an op is not there"):
        torch.func.grad(lambda x: torch.func.jvp(f, (x,), (w,))[1])(x)
    with pytest.raises(RuntimeError, match="the reverse-over-forward derivative of an op is not there"):
        torch.func.jvp(lambda x: torch.func.jvp(f, (x,), (w,))[1], (x,), (w,))


@VARIANTS
def test_non_reentrant_checkpointing(saves_output: bool) -> None:
    op = Cubic(saves_output=saves_output).op

    def f(x: Tensor, w: Tensor) -> Tensor:
        return op(op(x, w), w)

    results = []
    for run in (f, lambda x, w: checkpoint(f, x, w, use_reentrant=False)):
        x, w = rand(3).requires_grad_(), rand(3, seed=1).requires_grad_()
        grads = torch.autograd.grad(run(x, w).sum(), (x, w), create_graph=True)
        second = torch.autograd.grad(grads[0].square().sum() + grads[1].square().sum(), (x, w))
        with forward_ad.dual_level(), bare_tangents():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            forward_second = forward_ad.unpack_dual(torch.autograd.grad(run(dual, w).sum(), dual)[0]).tangent
        results.append([*grads, *second, forward_second])
    torch.testing.assert_close(results[0], results[1])


def test_grad_and_inference_modes() -> None:
    x, w = rand(3).requires_grad_(), rand(3, seed=1)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = Cubic().op(x, w)
        assert not y.requires_grad
        torch.testing.assert_close(y.clone(), plain_cubic(x, w).detach())
        y = Cubic().op(y.clone().requires_grad_(), w)  # what was made there can be used here
        y.sum().backward()


def test_non_contiguous_and_expanded_inputs() -> None:
    x, w = rand(4, 3).requires_grad_(), rand(1, 3, seed=1).requires_grad_()
    results = []
    for fn in (Cubic(True, True).op, plain_cubic):

        def strided(x: Tensor, w: Tensor, fn: Callable = fn) -> Tensor:
            return fn(x.T, w.expand(4, 3).T)

        first = torch.autograd.grad(strided(x, w).square().sum(), (x, w), create_graph=True)
        second = torch.autograd.grad(first[0].sum() + first[1].square().sum(), (x, w))
        along = dual_pass(strided, [x, w], [rand(4, 3, seed=5), rand(1, 3, seed=6)])
        results.append([*first, *second, *along])
    torch.testing.assert_close(results[0], results[1])


def test_ops_follow_autocast_as_linear_does() -> None:
    """The products in the lower type, as torch.nn.functional.linear; the functions themselves never see autocast."""
    x, w = (torch.randn(*s, generator=torch.Generator().manual_seed(0)) for s in ((5, 8), (6, 8)))
    a, b = torch.randn(2, 8), torch.randn(6, 2)
    q = torch.randn(1, 2, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast(x)[0].dtype == torch.bfloat16 and autocast(x, None)[1] is None
        leaf = x.clone().requires_grad_()
        y = lora_linear(leaf, w, None, a, b, 1.0)
        assert y.dtype == torch.bfloat16
        assert flash_attention(q, q, q).dtype == torch.bfloat16
        assert rms_norm(x, torch.ones(8)).dtype == torch.float32 and silu_mul(x, x).dtype == torch.float32
        y.float().sum().backward()
        assert Cubic().op(x.double(), x.double()).dtype == torch.float64
    assert leaf.grad is not None and leaf.grad.dtype == torch.float32
    want = lora_linear(x.bfloat16(), w.bfloat16(), None, a, b, 1.0)
    torch.testing.assert_close(y.detach(), want)
    assert autocast(x)[0] is x


def test_a_tangent_on_a_frozen_input_raises() -> None:
    w = rand(6, 4)
    for context in (bare_tangents, torch.enable_grad):
        with forward_ad.dual_level(), context(), pytest.raises(RuntimeError, match="frozen input"):
            lora_linear(rand(2, 4), forward_ad.make_dual(w, w), None, rand(2, 4), rand(6, 2), 1.0)
