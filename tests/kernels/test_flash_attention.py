"""Attention's options in float64 against a plain composition with a [T, T] mask, its bfloat16 numbers, its memory."""

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nacd_kernels import bare_tangents
from nacd_kernels import flash_attention as typed_flash_attention
from nacd_kernels.attention_mask import Mask, Run
from tests.kernels.numerics import assert_as_good_as_torch, draw, four

TILES = sys.modules["nacd_kernels.attention_tiles"]
flash_attention: Callable[..., Tensor] = typed_flash_attention  # called with lists of tensors and dicts of options
GENERATOR = torch.Generator().manual_seed(0)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def padding(T: int, *runs: tuple[int, int]) -> Tensor:
    """[B, T], row b real from runs[b][0] to before runs[b][1]."""
    t = torch.arange(T)
    return torch.stack([(begin <= t) & (t < end) for begin, end in runs])


def visible(B: int, T: int, cu_seqlens: Any = None, key_padding: Tensor | None = None, window: Any = None) -> Tensor:
    """[B, T, T]: query i of row b sees key j."""
    i, j = torch.arange(T)[:, None], torch.arange(T)
    seen = (j <= i).expand(B, T, T)
    if window is not None:
        seen = seen & (i - j < window)
    if cu_seqlens is not None:
        sample = torch.searchsorted(torch.tensor(cu_seqlens), torch.arange(T), right=True)
        seen = seen & (sample[:, None] == sample)
    if key_padding is not None:
        seen = seen & key_padding[:, None, :] & key_padding[:, :, None]
    return seen


def plain_attention(*qkv: Tensor, scale: Any = None, softcap: Any = None, **options: Any) -> Tensor:
    q, k, v = qkv
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    seen = visible(q.shape[0], q.shape[2], **options)[:, None].to(s.device)
    return s.masked_fill(~seen, -1e30).softmax(-1).mul(seen) @ v  # a row that sees nothing: zeros


# name: (B, H, G, T, options); d is 3
PACKED = [0, 1, 6, 9, 11]  # lengths 1, 5, 3, 2
CASES: dict[str, tuple[int, int, int, int, dict[str, Any]]] = {
    "plain": (2, 2, 2, 5, {}),
    "plain, scaled": (1, 2, 2, 5, dict(scale=0.9)),
    "grouped": (2, 4, 2, 5, {}),
    "one token": (2, 2, 1, 1, {}),
    "packed": (1, 2, 2, 11, dict(cu_seqlens=PACKED)),
    "packed, equal lengths": (1, 2, 1, 7, dict(cu_seqlens=[0, 3, 6, 7])),
    "packed, one sample": (1, 2, 2, 4, dict(cu_seqlens=[0, 4])),
    "left padding": (3, 2, 2, 5, dict(key_padding=padding(5, (2, 5), (0, 5), (4, 5)))),
    "right padding": (4, 2, 1, 5, dict(key_padding=padding(5, (0, 3), (0, 3), (0, 0), (0, 5)))),
    "window 1": (1, 2, 2, 5, dict(window=1)),
    "window 3": (2, 2, 2, 7, dict(window=3)),
    "window beyond T": (1, 2, 2, 5, dict(window=9)),
    "softcap": (2, 2, 2, 5, dict(softcap=0.7)),
    "packed, grouped, window": (1, 4, 2, 11, dict(cu_seqlens=PACKED, window=3)),
    "packed, softcap": (1, 2, 2, 11, dict(cu_seqlens=PACKED, softcap=0.7)),
    "padded, grouped, window, softcap": (
        2, 4, 2, 6, dict(key_padding=padding(6, (1, 6), (0, 4)), window=2, softcap=0.7, scale=0.9),
    ),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles even at test sizes."""
    monkeypatch.setattr(TILES, "BLOCK", 2)
    monkeypatch.setattr(TILES, "TILE", 1)


def case(name: str) -> tuple[Callable, Callable, list[Tensor]]:
    """Ours and plain's as functions of q, k, v, and those."""
    B, H, G, T, options = CASES[name]
    inputs = [rand(B, heads, T, 3).requires_grad_() for heads in (H, G, G)]
    return lambda *x: flash_attention(*x, **options), lambda *x: plain_attention(*x, **options), inputs


def scalar(y: Tensor) -> Tensor:
    """A curved function of y."""
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)
    return (weights * y + 0.3 * y * y).sum()


def reverse_over_reverse(fn: Callable, x: Sequence[Tensor], v: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradients, and the Hessian-vector products along v."""
    grads = torch.autograd.grad(scalar(fn(*x)), x, create_graph=True)
    along: Any = sum((g * t).sum() for g, t in zip(grads, v) if t is not None)
    return [*(g.detach() for g in grads), *torch.autograd.grad(along, x)]


def forward_over_reverse(fn: Callable, x: Sequence[Tensor], v: Sequence[Tensor | None], bare: bool) -> list[Tensor]:
    """The same; bare: by the joint functions of a dual pass."""
    with forward_ad.dual_level(), bare_tangents() if bare else nullcontext():
        duals = [t if tangent is None else forward_ad.make_dual(t, tangent) for t, tangent in zip(x, v)]
        pairs = [forward_ad.unpack_dual(g) for g in torch.autograd.grad(scalar(fn(*duals)), duals)]
    tangents = [torch.zeros_like(p.primal) if p.tangent is None else p.tangent for p in pairs]
    return [*(p.primal.detach() for p in pairs), *tangents]


def close(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float = 1e-11) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@EVERY
def test_value_and_gradient_equal_plain_pytorch(name: str) -> None:
    ours, plain, x = case(name)
    y, exact = ours(*x), plain(*x)
    close([y, *torch.autograd.grad(scalar(y), x)], [exact, *torch.autograd.grad(scalar(exact), x)])


@EVERY
def test_gradcheck_and_gradgradcheck(name: str) -> None:
    ours, _, x = case(name)
    assert gradcheck(ours, x, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(ours, x, fast_mode=True)


@EVERY
@pytest.mark.parametrize(("block", "size"), [(2, 1), (3, 40)], ids=["one head a tile", "heads together"])
def test_hessian_vector_products_equal_plain_pytorch(
    name: str, block: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By both routes and the joint functions; with every tangent, with each alone, with each missing (not zero)."""
    monkeypatch.setattr(TILES, "BLOCK", block)
    monkeypatch.setattr(TILES, "TILE", size)
    ours, plain, x = case(name)
    v = [rand(*t.shape) for t in x]
    for given in ((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0)):
        tangents = [t if there else None for t, there in zip(v, given)]
        exact = reverse_over_reverse(plain, x, tangents)
        close(reverse_over_reverse(ours, x, tangents), exact)
        close(forward_over_reverse(ours, x, tangents, bare=False), exact)
        close(forward_over_reverse(ours, x, tangents, bare=True), exact)


@EVERY
@pytest.mark.parametrize("i", range(3))
def test_one_input_alone_needs_a_gradient(name: str, i: int) -> None:
    ours, plain, x = case(name)

    def of_one(fn: Callable) -> Callable:
        return lambda t: fn(*(t if i == j else other.detach() for j, other in enumerate(x)))

    v = [rand(*x[i].shape)]
    exact = reverse_over_reverse(of_one(plain), [x[i]], v)
    close(reverse_over_reverse(of_one(ours), [x[i]], v), exact)
    close(forward_over_reverse(of_one(ours), [x[i]], v, bare=False), exact)
    close(forward_over_reverse(of_one(ours), [x[i]], v, bare=True), exact)


def test_a_cotangent_alone_has_a_tangent() -> None:
    """The inputs are fixed, only dy moves: the gradient's tangent is the gradient along dy'."""
    _, _, x = case("grouped")
    dy, dy_t = rand(*x[0].shape), rand(*x[0].shape)
    for bare in (False, True):
        with forward_ad.dual_level(), bare_tangents() if bare else nullcontext():
            grads = torch.autograd.grad(flash_attention(*x), x, forward_ad.make_dual(dy, dy_t))
            tangents = [forward_ad.unpack_dual(g).tangent for g in grads]
        close(tangents, torch.autograd.grad(plain_attention(*x), x, dy_t))


def test_heads_in_transposed_memory_and_an_expanded_cotangent() -> None:
    """As transformers hands them over: [B, T, H, d] transposed."""
    x = [rand(2, 5, heads, 3).transpose(1, 2).requires_grad_() for heads in (4, 2, 2)]
    ours, theirs = (torch.autograd.grad(fn(*x).sum(), x) for fn in (flash_attention, plain_attention))
    close(ours, theirs)


@pytest.mark.parametrize("T", [63, 65, 129])
@pytest.mark.parametrize("options", [{}, dict(window=17, softcap=2.0)], ids=["plain", "window and softcap"])
def test_bfloat16_is_as_good_as_pytorch(T: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TILES, "BLOCK", 48)
    inputs = [draw(1, heads, T, 64, seed=i) for i, heads in enumerate((4, 2, 2))]
    assert_as_good_as_torch(
        lambda *x: flash_attention(*x, **options), lambda *x: plain_attention(*x, **options), inputs, torch.bfloat16
    )


def test_one_token_in_bfloat16() -> None:
    """The result is v. PyTorch's dq and dk are exact zeros there, ours differences of equal float32 sums."""
    inputs = [draw(2, heads, 1, 64, seed=i).bfloat16() for i, heads in enumerate((4, 2, 2))]
    parts = four(flash_attention, inputs)
    assert torch.equal(parts["y"][0], inputs[2].repeat_interleave(2, 1))
    for name in ("dx", "dx_t"):
        dq, dk, dv = parts[name]
        assert max(dq.abs().max(), dk.abs().max()) < 1e-5 and dv.abs().max() > 0.1


@pytest.mark.parametrize("d", [64, 80, 96, 128])
def test_head_widths(d: int) -> None:
    x = [rand(1, heads, 7, d).requires_grad_() for heads in (2, 1, 1)]
    v = [rand(*t.shape) for t in x]
    close(forward_over_reverse(flash_attention, x, v, bare=True), reverse_over_reverse(plain_attention, x, v))


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4)])
def test_no_tokens(shape: tuple[int, ...]) -> None:
    x = [rand(*shape).requires_grad_() for _ in range(3)]
    assert all(t.shape == shape for t in forward_over_reverse(flash_attention, x, [rand(*shape)] * 3, bare=True))


def test_padding_reads_nothing_and_gives_zeros() -> None:
    """Even what is not a number in the padding stays there."""
    real = padding(6, (2, 6), (0, 3), (0, 0))
    x = [rand(3, 2, 6, 3).masked_fill_(~real[:, None, :, None], torch.nan).requires_grad_() for _ in range(3)]
    dy = rand(3, 2, 6, 3).masked_fill_(~real[:, None, :, None], torch.nan)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, t.detach()) for t in x]
        y = flash_attention(*duals, key_padding=real)
        grads = torch.autograd.grad(y, duals, forward_ad.make_dual(dy, dy))
        results = [part for t in (y, *grads) for part in forward_ad.unpack_dual(t)]
    for t in results:
        assert t.isfinite().all() and not t.masked_select(~real[:, None, :, None]).any()
        assert t.masked_select(real[:, None, :, None]).any()


def test_packed_samples_equal_one_by_one() -> None:
    borders = [0, *accumulate((1, 5, 3, 3, 2))]
    x = [rand(1, heads, borders[-1], 3).requires_grad_() for heads in (4, 2, 2)]
    v = [rand(*t.shape) for t in x]
    samples = [[slice(None), slice(None), slice(a, b)] for a, b in pairwise(borders)]

    def one_by_one(*x: Tensor) -> Tensor:
        return torch.cat([flash_attention(*(t[tuple(s)] for t in x)) for s in samples], 2)

    def packed(*x: Tensor) -> Tensor:
        return flash_attention(*x, cu_seqlens=torch.tensor(borders, dtype=torch.int32))

    close([packed(*x)], [one_by_one(*x)], 1e-13)
    close(reverse_over_reverse(packed, x, v), reverse_over_reverse(one_by_one, x, v), 1e-13)
    close(forward_over_reverse(packed, x, v, bare=True), reverse_over_reverse(one_by_one, x, v), 1e-13)


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(made) if isinstance(t, Tensor)]
        self.elements = max([self.elements, *sizes])
        return made


@pytest.mark.parametrize("options", [{}, dict(softcap=5.0), dict(window=40), dict(borders=[0, 64])], ids=str)
@pytest.mark.parametrize("mode", ["reverse over reverse", "forward over reverse", "dual pass"])
def test_memory_is_linear_in_the_tokens(options: dict[str, Any], mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of any of the functions has more than BLOCK elements a token, however many heads there are."""
    monkeypatch.setattr(TILES, "BLOCK", 16)
    monkeypatch.setattr(TILES, "TILE", 16 * 96)
    given = dict(options)
    for T in (96, 192, 384):
        if "borders" in options:
            given = dict(cu_seqlens=[*options["borders"], T])
        op = partial(flash_attention, **given)
        x = [rand(1, heads, T, 2).float().requires_grad_() for heads in (8, 4, 4)]
        v = [torch.ones_like(t) for t in x]
        with Largest() as largest:
            if mode == "reverse over reverse":
                reverse_over_reverse(op, x, v)
            else:
                forward_over_reverse(op, x, v, bare=mode == "dual pass")
        assert largest.elements <= 16 * T, f"a tensor of {largest.elements} elements at T = {T}"


def test_a_window_reads_only_the_keys_in_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TILES, "BLOCK", 16)
    x = [rand(1, 1, 512, 1).requires_grad_() for _ in range(3)]
    with Largest() as largest:
        forward_over_reverse(partial(flash_attention, window=17), x, x, bare=True)
    assert largest.elements <= 512  # the inputs' size; a tile is 16 x 32


# --- Mask -----------------------------------------------------------------------------------------------------------


def test_a_mask_is_a_value() -> None:
    packed = Mask.of(1, 6, cu_seqlens=[0, 4, 6], window=4, softcap=2)
    assert packed == Mask(((0, 0, 4), (0, 4, 6)), None, 2.0)
    assert hash(packed) == hash(Mask.of(1, 6, cu_seqlens=torch.tensor([0, 4, 6]), softcap=2.0))
    assert tree_leaves(packed) == [packed]
    assert packed.covers(1, 6) and Mask.of(2, 3).covers(2, 3) and not Mask.of(2, 3).covers(3, 3)
    assert not Mask.of(2, 3, key_padding=padding(3, (0, 3), (1, 3))).covers(2, 3)
    assert Mask.of(2, 3, key_padding=padding(3, (0, 3), (0, 3))).covers(2, 3)
    assert Mask.of(1, 6, window=5).window == 5 and Mask.of(1, 6, window=6).window is None


def test_neighbouring_segments_of_one_length_are_one_run() -> None:
    assert list(Mask.of(3, 4).runs()) == [Run(row=0, rows=3, begin=0, length=4, parts=1)]
    runs = list(Mask.of(1, 11, cu_seqlens=[0, 2, 4, 6, 9, 11]).runs())
    assert runs == [Run(0, 1, 0, 2, 3), Run(0, 1, 6, 3, 1), Run(0, 1, 9, 2, 1)]
    padded = Mask.of(4, 4, key_padding=padding(4, (1, 4), (1, 4), (0, 3), (0, 0))).runs()
    assert list(padded) == [Run(0, 2, 1, 3, 1), Run(2, 1, 0, 3, 1)]
    x = rand(1, 2, 11, 3)
    torch.testing.assert_close(runs[0].cut(x), torch.stack([x[0, :, 0:2], x[0, :, 2:4], x[0, :, 4:6]]))


def call(B: int = 1, T: int = 5, **options: Any) -> Tensor:
    return flash_attention(*(rand(B, 2, T, 3) for _ in range(3)), **options)


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: flash_attention(rand(2, 5, 3), rand(2, 5, 3), rand(2, 5, 3)), r"must be \[B, H, T, d\]"),
        (lambda: flash_attention(rand(1, 2, 5, 3), rand(1, 2, 5, 3), rand(1, 2, 4, 3)), "k and v alike"),
        (lambda: flash_attention(rand(1, 2, 5, 3), rand(1, 2, 6, 3), rand(1, 2, 6, 3)), "must agree"),
        (lambda: flash_attention(rand(1, 3, 5, 3), rand(1, 2, 5, 3), rand(1, 2, 5, 3)), "multiple"),
        (lambda: flash_attention(rand(1, 0, 5, 3), rand(1, 0, 5, 3), rand(1, 0, 5, 3)), "multiple"),
        (lambda: flash_attention(rand(1, 2, 5, 3), rand(1, 2, 5, 3).float(), rand(1, 2, 5, 3)), "k is torch.float32"),
        (lambda: flash_attention(rand(1, 2, 5, 3), rand(1, 2, 5, 3), rand(1, 2, 5, 3).float()), "v is torch.float32"),
        (lambda: call(dropout=0.1), r"dropout=0\.1 is refused"),
        (lambda: call(window=0), "window=0: must be at least 1"),
        (lambda: call(softcap=0.0), r"softcap=0\.0: must be positive"),
        (lambda: call(softcap=float("inf")), "softcap=inf: must be positive"),
        (lambda: call(B=2, cu_seqlens=[0, 5]), "batch of 2"),
        (lambda: call(cu_seqlens=[0, 4]), "from 0 to 4: must go from 0 to the number of tokens, 5"),
        (lambda: call(cu_seqlens=[1, 5]), "from 1 to 5"),
        (lambda: call(cu_seqlens=[]), "from None to None"),
        (lambda: call(cu_seqlens=[0, 3, 3, 5]), "has 3 before 3: must increase"),
        (lambda: call(cu_seqlens=[0, 7, 5]), "has 7 before 5: must increase"),
        (lambda: call(cu_seqlens=torch.tensor([0.0, 5.0])), r"cu_seqlens is torch.float32 \(2,\): must be integers"),
        (lambda: call(cu_seqlens=torch.tensor([[0, 5]])), r"cu_seqlens is torch.int64 \(1, 2\)"),
        (lambda: call(key_padding=torch.ones(1, 5)), "key_padding is torch.float32"),
        (lambda: call(key_padding=torch.ones(1, 4, dtype=torch.bool)), r"must be torch.bool \(1, 5\)"),
        (lambda: call(key_padding=torch.tensor([[True, False, True, True, False]])), "row 0 has padding between"),
        (lambda: call(key_padding=padding(5, (0, 5)), cu_seqlens=[0, 5]), "packed rows have no padding"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(attempt: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attempt()
