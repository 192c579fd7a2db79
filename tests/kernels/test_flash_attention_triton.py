"""The attention kernels against float64 and PyTorch's own error: shapes, masks, layouts, missing tangents, bits."""

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from nacd_kernels import bare_tangents
from nacd_kernels import flash_attention as typed_flash_attention
from nacd_kernels.attention_mask import Mask
from tests.kernels.numerics import DEVICE, PARTS, assert_as_good_as_torch, draw, four
from tests.kernels.test_flash_attention import padding, visible

pytest.importorskip("triton")

from nacd_kernels import flash_attention_triton as kernels

REFERENCE = sys.modules["nacd_kernels.flash_attention"]  # by module name: the package has a function of the same name
flash_attention: Callable[..., Tensor] = typed_flash_attention  # called with dicts of options
CONFIG = kernels.config
F32, BF16 = torch.float32, torch.bfloat16
FLOATS = pytest.mark.parametrize("dtype", [F32, BF16])
NEEDS = (True, True, True)
MASKS: dict[str, tuple[int, int, dict[str, Any]]] = {  # B, T, options
    "packed": (1, 129, {"cu_seqlens": [0, 1, 64, 129]}),
    "packed, in a window": (1, 129, {"cu_seqlens": [0, 1, 64, 129], "window": 33}),
    "left padding": (3, 40, {"key_padding": padding(40, (0, 40), (39, 40), (7, 40))}),
    "right padding": (3, 40, {"key_padding": padding(40, (0, 1), (0, 0), (0, 33))}),
    "a window": (1, 100, {"window": 50}),
    "capped": (1, 65, {"softcap": 1.5}),
    "padded, capped, in a window": (2, 40, {"key_padding": padding(40, (3, 40), (0, 9)), "softcap": 2.0, "window": 5}),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels, with several tiles and steps at a few dozen tokens; unequal ones, so that none stands for the other."""
    monkeypatch.setenv("NACD_KERNELS", "triton")
    monkeypatch.setattr(kernels, "config", lambda *_: kernels.Blocks(rows=32, step=16, warps=4, stages=2))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, softcap: float | None = None, **options: Any) -> Tensor:
    """As transformers' eager attention: a softmax in float32 at least, rounded to the values' type."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = q @ k.mT * q.shape[-1] ** -0.5
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    seen = visible(q.shape[0], q.shape[2], **options)[:, None].to(s.device)
    p = s.masked_fill(~seen, -1e30).softmax(-1, dtype=torch.promote_types(s.dtype, torch.float32))
    return p.mul(seen).to(v.dtype) @ v  # a row that sees nothing: zeros


def qkv(B: int, H: int, G: int, T: int, d: int) -> list[Tensor]:
    return [draw(B, heads, T, d, seed=seed) for seed, heads in enumerate((H, G, G))]


def check(inputs: Sequence[Tensor], dtype: torch.dtype, joint: bool, **options: Any) -> None:
    def ours(*qkv: Tensor) -> Tensor:
        return flash_attention(*qkv, **options)

    def plain(*qkv: Tensor) -> Tensor:
        q, k, v = qkv
        return plain_attention(q, k, v, **options)

    with bare_tangents() if joint else nullcontext():
        assert_as_good_as_torch(ours, plain, inputs, dtype)


@pytest.mark.parametrize(
    ("dtype", "T", "G", "d", "joint"),
    [
        (F32, 63, 2, 64, False),
        (F32, 65, 1, 16, True),
        (F32, 129, 1, 40, True),
        (BF16, 63, 1, 80, True),
        (BF16, 65, 2, 16, False),
    ],
)
def test_as_good_as_torch(dtype: torch.dtype, T: int, G: int, d: int, joint: bool) -> None:
    check(qkv(1, 2, G, T, d), dtype, joint)


@pytest.mark.parametrize("name", MASKS)
def test_masks_as_good_as_torch(name: str) -> None:
    B, T, options = MASKS[name]
    check(qkv(B, 1, 1, T, 16), F32, True, **options)


@pytest.mark.parametrize("name", ["packed", "capped"])
def test_masks_in_16_bits(name: str) -> None:
    B, T, options = MASKS[name]
    check(qkv(B, 1, 1, T, 16), BF16, False, **options)


@FLOATS
def test_the_table_s_own_blocks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "config", CONFIG)
    check(qkv(1, 1, 1, 65 if dtype == F32 else 130, 64 if dtype == F32 else 128), dtype, True)


@FLOATS
@pytest.mark.parametrize("T", [1, 20])
def test_a_token_that_sees_itself_alone(dtype: torch.dtype, T: int) -> None:
    """Its value is the result, and its score has no influence: both derivatives are 0, to float32's rounding."""
    low = [x.to(dtype) for x in qkv(1, 4, 2, T, 80 if dtype == BF16 else 64)]
    with bare_tangents():
        found = four(lambda *x: flash_attention(*x, window=1), low)
    v, v_t, dv = (found["y"][0], found["y_t"][0], found["dx"][2])
    torch.testing.assert_close(v, low[2].repeat_interleave(2, 1), rtol=0, atol=0)
    torch.testing.assert_close(v_t, draw(*low[2].shape, seed=101).to(dtype).repeat_interleave(2, 1))
    torch.testing.assert_close(dv, draw(*v.shape, seed=149).to(dtype).unflatten(1, (2, 2)).sum(2))
    for x in (*found["dx"][:2], *found["dx_t"][:2]):
        assert x.abs().max() < 1e-4


@FLOATS
def test_a_second_derivative_by_reverse_passes(dtype: torch.dtype) -> None:
    def second(fn: Callable[..., Tensor], leaves: list[Tensor]) -> Sequence[Tensor]:
        leaves = [x.requires_grad_() for x in leaves]
        y = fn(*leaves)
        grads = torch.autograd.grad(y, leaves, draw(*y.shape, seed=7).to(y.dtype), create_graph=True)
        return torch.autograd.grad(torch.stack([g.square().sum() for g in grads]).sum(), leaves)

    inputs = qkv(1, 2, 1, 40, 16)
    ours, theirs = (second(fn, [x.to(dtype) for x in inputs]) for fn in (flash_attention, plain_attention))
    exact = second(plain_attention, [x.clone() for x in inputs])
    for a, b, want in zip(ours, theirs, exact, strict=True):
        assert (a.double() - want).abs().max() <= 2 * (b.double() - want).abs().max()


def test_every_run_gives_the_same_bits() -> None:
    low = [x.to(BF16) for x in qkv(1, 2, 1, 40, 16)]
    with bare_tangents():
        first, again = (four(flash_attention, low) for _ in range(2))
    for part in PARTS:
        for a, b in zip(first[part], again[part], strict=True):
            assert torch.equal(a, b)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """x [B, heads, T, d] in other strides."""
    return {
        "token-major": x.transpose(1, 2).contiguous().transpose(1, 2),
        "a part of a wider tensor": torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]],
        "strided elements": torch.stack([x, x], -1)[..., 0],
        "expanded": x[:1, :1].expand_as(x),
    }


def everything(q: Tensor, k: Tensor, v: Tensor, q_t: Tensor, k_t: Tensor, v_t: Tensor, *dos: Tensor) -> list[Tensor]:
    """What the functions make of the tensors, o saved in another layout than the kernels'."""
    do, do_t = dos
    inputs, tangents = (q, k, v, Mask.of(q.shape[0], q.shape[2]), 0.25), (q_t, k_t, v_t)
    o, stats, o_t, stats_t = kernels.forward_dual(inputs, tangents)
    saved, saved_t = (o.contiguous(), *stats), (o_t, *stats_t)
    first, second = kernels.backward_dual(inputs, saved, tangents, saved_t, do, do_t, NEEDS)
    alone = kernels.backward_jvp(inputs, saved, tangents, saved_t, do, None, NEEDS)
    return [kernels.forward(*inputs)[0], o, o_t, *first, *second, *alone, *kernels.backward(inputs, saved, do, NEEDS)]


@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 1)))
def test_any_strides(layout: str) -> None:
    """Of all the tensors, and of every second one: then a tangent's are not its primal's."""
    odd = [layouts(draw(1, 2, 20, 16, seed=seed).float())[layout] for seed in range(8)]
    plain = [x.contiguous() for x in odd]
    want = everything(*plain)
    for tensors in (odd, [a if i % 2 else b for i, (a, b) in enumerate(zip(odd, plain))]):
        for a, b in zip(everything(*tensors), want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("there", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 0, 0)])
@pytest.mark.parametrize("with_do_t", [False, True], ids=["no dO'", "dO'"])
def test_missing_tangents(there: tuple[int, ...], with_do_t: bool) -> None:
    """Each function against the reference in float64."""
    B, H, T, d = 1, 1, 20, 16
    primals, directions = qkv(B, H, 1, T, d), [draw(*x.shape, seed=9) for x in qkv(B, H, 1, T, d)]
    do, do_t = (draw(B, H, T, d, seed=seed) for seed in (20, 21))
    results = []
    for source, dtype in ((REFERENCE, torch.float64), (kernels, F32)):
        inputs = (*(x.to(dtype) for x in primals), Mask.of(B, T), 0.25)
        tangents = tuple(x.to(dtype) if t else None for x, t in zip(directions, there))
        dy, dy_t = do.to(dtype), do_t.to(dtype) if with_do_t else None
        y, stats = source.forward(*inputs)
        y_t, stats_t = source.jvp(inputs, (y, *stats), tangents)
        rest = (inputs, (y, *stats), tangents, (y_t, *stats_t), dy, dy_t, NEEDS)
        pair = source.backward_dual(*rest)
        results.append([y, y_t, *source.backward_jvp(*rest), *pair[0], *pair[1]])
    for want, found in zip(*results, strict=True):
        assert (want is None) == (found is None)
        if want is not None:
            torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_that_are_not_needed(needs: tuple[bool, ...]) -> None:
    q, k, v = (x.float() for x in qkv(1, 1, 1, 20, 16))
    inputs = (q, k, v, Mask.of(1, 20), 0.25)
    o, stats, o_t, stats_t = kernels.forward_dual(inputs, (q, k, v))
    saved, saved_t = (o, *stats), (o_t, *stats_t)

    def gradients(needs: Sequence[bool]) -> list[Any]:
        pair = kernels.backward_dual(inputs, saved, (q, k, v), saved_t, v, q, needs)
        return [*kernels.backward(inputs, saved, v, needs), *pair[0], *pair[1]]

    for x, whole, need in zip(gradients(needs), gradients(NEEDS), needs * 3, strict=True):
        assert torch.equal(x, whole) if need else x is None


@pytest.mark.parametrize("options", [{}, MASKS["left padding"][2]], ids=["whole", "padded"])
def test_every_result_is_written(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory full of NaN shows what is not; nothing but padding is filled with zeros."""
    inputs = [x.float() for x in qkv(3 if options else 1, 1, 1, 40, 16)]

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x  # the interpreter makes bytes

        return made

    for joint in (True, False):
        with bare_tangents() if joint else nullcontext():
            want = four(lambda *x: flash_attention(*x, **options), inputs)
            with monkeypatch.context() as m:
                m.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
                m.setattr(torch, "empty_like", poisoned(torch.empty_like))
                if not options:
                    m.setattr(Tensor, "new_zeros", None)
                found = four(lambda *x: flash_attention(*x, **options), inputs)
        for part in PARTS:
            for a, b in zip(found[part], want[part], strict=True):
                assert torch.equal(a, b) and a.isfinite().all()


def test_padding_has_no_influence_and_gets_zeros() -> None:
    """Whatever stands there, NaN included."""
    B, T, real = 3, 40, MASKS["left padding"][2]["key_padding"].to(DEVICE)
    inputs = [x.float() for x in qkv(B, 1, 1, T, 16)]
    poisoned = [x.masked_fill(~real[:, None, :, None], torch.nan) for x in inputs]
    with bare_tangents():
        want, found = (four(lambda *x: flash_attention(*x, key_padding=real), xs) for xs in (inputs, poisoned))
    for part in PARTS:
        for a, b in zip(found[part], want[part], strict=True):
            assert torch.equal(a, b) and not a.transpose(1, 2)[~real].any()


@pytest.mark.parametrize("rows", [1, 16, 32])
@pytest.mark.parametrize("last_first", [False, True])
def test_tiles_cover_every_token_once(rows: int, last_first: bool) -> None:
    mask = Mask.of(2, 40, key_padding=padding(40, (3, 40), (0, 32)))
    tokens = []
    for row, begin, end, first in kernels.tiles(mask, rows, last_first, torch.device("cpu")).tolist():
        assert (row, begin, end) in mask.segments
        tokens += [(row, t) for t in range(first, min(first + rows, end))]
    assert sorted(tokens) == [(row, t) for row, begin, end in mask.segments for t in range(begin, end)]
    assert kernels.tiles(mask, rows, last_first, torch.device("cpu")) is kernels.tiles(
        mask, rows, last_first, torch.device("cpu")
    )


@pytest.mark.parametrize("shape", [(0, 2, 5, 16), (2, 2, 0, 16)])
def test_empty_inputs(shape: tuple[int, ...]) -> None:
    found = four(flash_attention, [torch.zeros(shape, device=DEVICE)] * 3)
    assert all(x.shape == shape for part in PARTS for x in found[part])


@pytest.mark.parametrize(("dtype", "d"), [(BF16, 129), (F32, 65)])
def test_wide_heads_are_refused(dtype: torch.dtype, d: int) -> None:
    q = torch.zeros(1, 1, 2, d, dtype=dtype, device=DEVICE)
    with pytest.raises(ValueError, match=f"q has heads of width {d} .* the kernels take at most {d - 1}"):
        flash_attention(q, q, q)
