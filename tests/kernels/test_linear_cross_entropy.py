"""The loss in float64 against F.cross_entropy of stored logits, at every option, in all modes."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional as F

from nacd_kernels import bare_tangents, linear_cross_entropy

OP = sys.modules["nacd_kernels.linear_cross_entropy"]  # by name: the package has a function of the same
GENERATOR = torch.Generator().manual_seed(0)
M, D, V = 7, 4, 11
LABELS = torch.tensor([3, -100, 0, 10, -100, 3, 5])
FULL = torch.tensor([3, 1, 0, 10, 9, 3, 5])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": torch.randn(V, generator=GENERATOR, dtype=torch.float64)},
    "softcap": {"softcap": 1.5},
    "retain": {"retain": True},
    "bias, softcap and retain": {
        "bias": torch.randn(V, generator=GENERATOR, dtype=torch.float64),
        "softcap": 2.5,
        "retain": True,
    },
}
EVERY = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
BOTH_LABELS = pytest.mark.parametrize("labels", [LABELS, FULL], ids=["some rows", "all rows"])
PRODUCTS = ("mm", "addmm")


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


H, TABLE, DIRECTION = rand(M, D), rand(V, D), rand(M, D)


def plain(
    h: Tensor, w: Tensor, labels: Tensor, bias: Tensor | None = None, softcap: float | None = None, retain: bool = False
) -> Tensor:
    z = F.linear(h, w, bias)
    return F.cross_entropy(z if softcap is None else softcap * torch.tanh(z / softcap), labels)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows a chunk, one in a dual pass."""
    monkeypatch.setattr(OP, "CHUNK_ELEMENTS", 2 * V)


def leaf() -> Tensor:
    return H.clone().requires_grad_()


def everything(loss: Callable[[Tensor], Tensor], mode: str) -> list[Tensor]:
    """The loss, its tangent, its gradient and the gradient's tangent along DIRECTION, behind a curved function."""
    h = leaf()
    if mode == "reverse":
        y = loss(h).square()
        (g,) = torch.autograd.grad(y, h, create_graph=True)
        y_t = (g * DIRECTION).sum()
        return [y, y_t, g, torch.autograd.grad(y_t, h)[0]]
    with forward_ad.dual_level():
        if mode == "joint":
            with bare_tangents():
                y = loss(forward_ad.make_dual(h, DIRECTION)).square()
                (g,) = torch.autograd.grad(y, h)
        else:
            y = loss(forward_ad.make_dual(h, DIRECTION)).square()
            (g,) = torch.autograd.grad(y, h)
        whole, gradient = forward_ad.unpack_dual(y), forward_ad.unpack_dual(g)
        assert whole.tangent is not None and gradient.tangent is not None
        return [whole.primal, whole.tangent, gradient.primal, gradient.tangent]


@EVERY
@BOTH_LABELS
@pytest.mark.parametrize("mode", ["reverse", "forward", "joint"])
def test_both_derivatives_equal_plain_pytorch(options: dict, labels: Tensor, mode: str) -> None:
    ours = everything(lambda h: linear_cross_entropy(h, TABLE, labels, **options), mode)
    theirs = everything(lambda h: plain(h, TABLE, labels, **options), "reverse")
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@EVERY
@BOTH_LABELS
def test_gradcheck_and_gradgradcheck(options: dict, labels: Tensor) -> None:
    def loss(h: Tensor) -> Tensor:
        return linear_cross_entropy(h, TABLE, labels, **options)

    assert gradcheck(loss, leaf(), check_forward_ad=True)
    assert gradgradcheck(loss, leaf())


@EVERY
@pytest.mark.parametrize("rows_a_chunk", [1, 3, 5, 100])
@pytest.mark.parametrize("mode", ["reverse", "joint"])
def test_chunks_of_any_size_give_the_same(
    options: dict, rows_a_chunk: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OP, "CHUNK_ELEMENTS", rows_a_chunk * V)
    ours = everything(lambda h: linear_cross_entropy(h, TABLE, LABELS, **options), mode)
    theirs = everything(lambda h: plain(h, TABLE, LABELS, **options), "reverse")
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("rows", "elements"), [(0, 10), (1, 1), (7, 10), (7, 30), (512, 1000), (5, 3)])
def test_chunks_cover_the_rows_within_the_limit(rows: int, elements: int) -> None:
    parts = OP.chunks(rows, 10, elements)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(rows))
    assert all(part.stop - part.start <= max(1, elements // 10) for part in parts)
    assert OP.longest(parts) == max((part.stop - part.start for part in parts), default=0)


def products(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> int:
    """How many products with all the vocabulary `work` takes, in rows of an [m, V] x [V, D] or [m, D] x [D, V] one."""
    rows = 0

    def counting(product: Callable) -> Callable:
        def counted(*args: Any, **kwargs: Any) -> Tensor:
            nonlocal rows
            out = product(*args, **kwargs)
            rows += out.shape[0]
            return out

        return counted

    with monkeypatch.context() as m:
        for name in PRODUCTS:
            m.setattr(torch, name, counting(getattr(torch, name)))
        work()
    return rows


@pytest.mark.parametrize(
    ("options", "mode", "count"),
    [
        ({}, "reverse", 5),
        ({"retain": True}, "reverse", 4),
        ({"retain": True, "softcap": 2.0}, "reverse", 4),
        ({}, "joint", 4),
        ({"retain": True}, "joint", 4),
        ({"softcap": 2.0}, "joint", 4),
    ],
)
def test_a_second_derivative_costs_so_many_products(
    options: dict, mode: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = products(monkeypatch, lambda: everything(lambda h: linear_cross_entropy(h, TABLE, FULL, **options), mode))
    assert found == count * M


def test_a_loss_without_a_gradient_costs_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_grad() -> None:
        with torch.no_grad():
            linear_cross_entropy(leaf(), TABLE, FULL, retain=True)

    def inference() -> None:
        with torch.inference_mode():
            linear_cross_entropy(H, TABLE, FULL)

    assert products(monkeypatch, no_grad) == M
    assert products(monkeypatch, inference) == M
    assert products(monkeypatch, lambda: linear_cross_entropy(H, TABLE, FULL)) == M
    assert products(monkeypatch, lambda: linear_cross_entropy(leaf(), TABLE, FULL)) == 2 * M


def test_a_tangent_is_enough_to_ask_for_the_gradient() -> None:
    """h need not require one."""
    with forward_ad.dual_level():
        y = linear_cross_entropy(forward_ad.make_dual(H, DIRECTION), TABLE, LABELS)
        tangent = forward_ad.unpack_dual(y).tangent
    (g,) = torch.autograd.grad(plain(h := leaf(), TABLE, LABELS), h)
    torch.testing.assert_close(tangent, (g * DIRECTION).sum())


def test_only_supervised_rows_reach_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = int((LABELS != -100).sum())
    assert products(monkeypatch, lambda: linear_cross_entropy(leaf(), TABLE, LABELS)) == 2 * kept
    poisoned = H.clone()
    poisoned[LABELS == -100] = torch.nan
    assert linear_cross_entropy(poisoned, TABLE, LABELS).isfinite()


@EVERY
@pytest.mark.parametrize("rows", [0, 3])
def test_no_supervised_row_is_a_zero_loss_with_zero_derivatives(options: dict, rows: int) -> None:
    h = rand(rows, D).requires_grad_()
    loss = linear_cross_entropy(h, TABLE, torch.full((rows,), -100), **options)
    (g,) = torch.autograd.grad(loss, h, create_graph=True)
    (second,) = torch.autograd.grad(g.sum(), h)
    assert loss == 0 and not g.any() and not second.any()


@EVERY
def test_large_logits_overflow_nothing(options: dict) -> None:
    """Of a softmax whose other terms underflow, the loss is the difference of the logits."""
    h = (300 * H).float().requires_grad_()
    w = TABLE.float()
    low: dict[str, Any] = {k: v.float() if isinstance(v, Tensor) else v for k, v in options.items()}
    loss = linear_cross_entropy(h, w, LABELS, **low)
    (g,) = torch.autograd.grad(loss, h, create_graph=True)
    (second,) = torch.autograd.grad(g.square().sum(), h)
    torch.testing.assert_close(loss.double(), plain(300 * H, TABLE, LABELS, **options), rtol=1e-5, atol=1e-5)
    assert g.isfinite().all() and second.isfinite().all()


def test_per_sample_gradients_by_vmap() -> None:
    """Samples with different numbers of supervised rows."""
    h, labels = rand(2, 3, D), torch.tensor([[1, -100, 2], [-100, -100, 4]])
    per_sample = torch.func.vmap(torch.func.grad(lambda x, y: linear_cross_entropy(x, TABLE, y)))(h, labels)
    for i in range(2):
        x = h[i].clone().requires_grad_()
        torch.testing.assert_close(per_sample[i], torch.autograd.grad(plain(x, TABLE, labels[i]), x)[0])


def test_hessian_by_torch_func() -> None:
    ours = torch.func.hessian(lambda h: linear_cross_entropy(h, TABLE, LABELS))(H)
    theirs = torch.func.hessian(lambda h: plain(h, TABLE, LABELS))(H)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_autocast_computes_as_a_linear_layer_would() -> None:
    h, w = H.float(), TABLE.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(h, w, LABELS)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, linear_cross_entropy(h.bfloat16(), w.bfloat16(), LABELS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_give_a_float32_loss_and_a_gradient_of_their_own_type(dtype: torch.dtype) -> None:
    h = H.to(dtype).requires_grad_()
    loss = linear_cross_entropy(h, TABLE.to(dtype), LABELS)
    (g,) = torch.autograd.grad(loss, h)
    assert loss.dtype == torch.float32 and g.dtype == dtype
    torch.testing.assert_close(loss.double(), plain(H, TABLE, LABELS), rtol=2e-2, atol=2e-2)


def test_strided_inputs_and_inputs_left_alone() -> None:
    h = torch.stack([H, H], -1)[..., 0].requires_grad_()
    w = torch.stack([TABLE, TABLE], -1)[..., 0]
    before = h.detach().clone(), w.clone()
    (g,) = torch.autograd.grad(linear_cross_entropy(h, w, LABELS), h)
    (want,) = torch.autograd.grad(plain(x := leaf(), TABLE, LABELS), x)
    torch.testing.assert_close(g, want, rtol=1e-12, atol=1e-13)
    assert torch.equal(h, before[0]) and torch.equal(w, before[1])


@EVERY
@pytest.mark.parametrize("mode", ["reverse", "joint"])
def test_results_are_the_same_on_every_run(options: dict, mode: str) -> None:
    first, again = (everything(lambda h: linear_cross_entropy(h, TABLE, LABELS, **options), mode) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_cross_entropy(H, TABLE[:, :3], LABELS), r"h is \(7, 4\), w \(11, 3\)"),
        (lambda: linear_cross_entropy(H, TABLE, LABELS[:3]), r"labels is torch.int64 \(3,\): must be int64 \[7\]"),
        (lambda: linear_cross_entropy(H, TABLE, LABELS.int()), "labels is torch.int32"),
        (lambda: linear_cross_entropy(H, TABLE.float(), LABELS), "w is torch.float32, h is torch.float64"),
        (lambda: linear_cross_entropy(H, TABLE.clone().requires_grad_(), LABELS), "w requires a gradient"),
        (lambda: linear_cross_entropy(H, TABLE, LABELS, bias=TABLE[0]), r"bias must be \[11\]"),
        (lambda: linear_cross_entropy(H, TABLE, LABELS, bias=rand(V).requires_grad_()), "bias requires a gradient"),
        (lambda: linear_cross_entropy(H, TABLE, LABELS, softcap=0.0), r"softcap=0.0: must be positive"),
        (lambda: linear_cross_entropy(H, TABLE, LABELS, z_loss=1e-4), "z_loss=0.0001 is refused rather than ignored"),
        (lambda: linear_cross_entropy(H, TABLE, LABELS.where(LABELS != 5, 11)), "labels has 11: .* from 0 to 10"),
        (lambda: linear_cross_entropy(H, TABLE, LABELS.where(LABELS != 5, -1)), "labels has -1"),
    ],
)
def test_bad_arguments_are_named(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
