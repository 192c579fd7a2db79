"""LoRA and frozen linear layers: every option in float64 against plain PyTorch, in every mode."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional as F

import nacd_kernels
from nacd_kernels import Int8Weight, LoraLayer, bare_tangents, frozen_linear, lora_linear, lora_linears
from tests.kernels.modes import LAYOUTS, MODES, assert_same_derivatives, derivatives, laid_out

D_IN = 6
GENERATOR = torch.Generator().manual_seed(0)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def plain(x: Tensor, layers: Sequence[Any]) -> list[Tensor]:
    base = [F.linear(x, layer.w, layer.bias) for layer in layers]
    return [
        y if layer.a is None or layer.b is None else y + layer.scale * (x @ layer.a.T) @ layer.b.T
        for y, layer in zip(base, layers, strict=True)
    ]


def plain_layer(x: Tensor, *layer: Any) -> Tensor:
    return plain(x, [LoraLayer(*layer)])[0]


class Problem:
    """Layers of (D_out, rank or 0, with a bias), as functions of x and of every A and B."""

    def __init__(self, *sizes: tuple[int, int, bool], lead: tuple[int, ...] = (2, 3)):
        self.layers = [
            LoraLayer(
                rand(d_out, D_IN),
                rand(d_out) if bias else None,
                rand(rank, D_IN) if rank else None,
                rand(d_out, rank) if rank else None,
                1.7 - i,
            )
            for i, (d_out, rank, bias) in enumerate(sizes)
        ]
        factors = [t for layer in self.layers for t in (layer.a, layer.b) if t is not None]
        self.inputs = [rand(*lead, D_IN), *factors]

    def with_factors(self, factors: tuple[Tensor, ...]) -> list[LoraLayer]:
        queue = iter(factors)
        return [layer if layer.a is None else layer._replace(a=next(queue), b=next(queue)) for layer in self.layers]

    def ours(self, x: Tensor, *factors: Tensor, of: Callable = torch.cat) -> Tensor:
        return of(lora_linears(x, self.with_factors(factors)), -1)

    def plain(self, x: Tensor, *factors: Tensor, of: Callable = torch.cat) -> Tensor:
        return of(plain(x, self.with_factors(factors)), -1)


PROBLEMS = {
    "rank 1": Problem((7, 1, False)),
    "rank 2, bias": Problem((7, 2, True)),
    "rank 3, one row": Problem((4, 3, True), lead=(1,)),
    "rank 5, a vector": Problem((7, 5, True), lead=()),
    "rank above the rows": Problem((5, 4, False), lead=(3,)),
    "no adapter": Problem((7, 0, True)),
    "query, key, value": Problem((4, 2, True), (2, 2, True), (2, 2, True)),
    "a mixture": Problem((2, 3, True), (3, 0, False), (4, 1, False), (2, 0, True)),
    "no adapter of two": Problem((4, 0, True), (5, 0, False)),
}
EVERY = pytest.mark.parametrize("name", PROBLEMS)


@EVERY
@pytest.mark.parametrize("mode", MODES)
def test_derivatives_equal_plain_pytorch(name: str, mode: str) -> None:
    """With tangents on all inputs together, and on each alone."""
    problem = PROBLEMS[name]
    assert_same_derivatives(problem.ours, problem.plain, problem.inputs, mode)


@EVERY
def test_gradcheck_and_gradgradcheck(name: str) -> None:
    problem = PROBLEMS[name]
    x = [t.clone().requires_grad_() for t in problem.inputs]
    fast = len(problem.layers) > 1  # along random directions; entry by entry takes seconds
    assert gradcheck(problem.ours, x, check_forward_ad=True, fast_mode=fast)
    assert gradgradcheck(problem.ours, x, fast_mode=fast)


@pytest.mark.parametrize("name", ["rank 2, bias", "no adapter", "a mixture"])
def test_one_product_of_twice_the_rows_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does with primal and tangent rows."""
    module = sys.modules["nacd_kernels.frozen_linear"]  # the package has a function of that name
    rows: list[int] = []
    mm = torch.mm

    def counting(x: Tensor, w: Tensor, **kwargs: Any) -> Tensor:
        rows.append(x.shape[0])
        return mm(x, w, **kwargs)

    monkeypatch.setattr(module, "one_product", lambda x: True)
    monkeypatch.setattr(torch, "mm", counting)
    problem = PROBLEMS[name]
    assert_same_derivatives(problem.ours, problem.plain, problem.inputs, "joint")
    assert 2 * 6 in rows
    x = rand(3, 5, D_IN)
    halves = module.through(x, x, [rand(7, D_IN)], [None])
    assert all(half.shape == (3, 5, 7) and half.storage_offset() == 0 and not half._is_view() for half in halves)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["rank 2, bias", "no adapter", "a mixture"])
@pytest.mark.parametrize("mode", MODES)
def test_layouts_of_x_and_of_the_cotangent(name: str, layout: str, mode: str) -> None:
    problem = PROBLEMS[name]
    assert_same_derivatives(laid_out(problem.ours, layout), laid_out(problem.plain, layout), problem.inputs, mode)


def test_layouts_of_the_factors() -> None:
    problem = PROBLEMS["query, key, value"]

    def strided(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, *factors: fn(x, *(t.T.contiguous().T for t in factors))

    for mode in MODES:
        assert_same_derivatives(strided(problem.ours), strided(problem.plain), problem.inputs, mode)


@pytest.mark.parametrize("kept", [(0,), (1,), (2,), (0, 2), (1, 3)])
@pytest.mark.parametrize("mode", MODES)
def test_outputs_that_get_no_gradient(kept: tuple[int, ...], mode: str) -> None:
    """Only some of the outputs are used; the factors of the others have a gradient of zero."""
    problem = PROBLEMS["a mixture"]

    def some(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *inputs: fn(*inputs, of=lambda ys, axis: torch.cat([ys[i] for i in kept], axis))

    def touched(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:  # autograd insists that every input is used
        return lambda *inputs: fn(*inputs) + sum(0 * t.sum() for t in inputs)

    ours, theirs = touched(some(problem.ours)), touched(some(problem.plain))
    assert_same_derivatives(ours, theirs, problem.inputs, mode)


@pytest.mark.parametrize("wanted", range(4))
def test_only_what_needs_a_gradient_is_computed(wanted: int) -> None:
    problem = Problem((4, 3, True), (7, 1, False))
    inputs = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(problem.inputs)]
    (ours,) = torch.autograd.grad(problem.ours(*inputs).square().sum(), inputs[wanted])
    (theirs,) = torch.autograd.grad(problem.plain(*inputs).square().sum(), inputs[wanted])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_lora_linear_and_frozen_linear_are_layers_of_their_own() -> None:
    layer = Problem((7, 2, True)).layers[0]
    x = rand(2, 3, D_IN)
    assert torch.equal(lora_linear(x, *layer), lora_linears(x, [layer])[0])
    bare = layer._replace(a=None, b=None)
    assert torch.equal(frozen_linear(x, layer.w, layer.bias), lora_linear(x, *bare))


def test_frozen_linear_in_every_mode() -> None:
    w, bias = rand(7, D_IN), rand(7)
    for mode in MODES:
        assert_same_derivatives(
            lambda x: frozen_linear(x, w, bias), lambda x: F.linear(x, w, bias), [rand(2, 3, D_IN)], mode
        )


@pytest.mark.parametrize("mode", MODES)
def test_a_result_may_be_changed_in_place(mode: str) -> None:
    problem = PROBLEMS["rank 2, bias"]
    layer: Any = problem.layers[0]

    def ours(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = lora_linear(x, layer.w, layer.bias, a, b, layer.scale).mul_(2)
        return y + frozen_linear(x, layer.w).add_(1)

    def theirs(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return 2 * problem.plain(x, a, b) + F.linear(x, layer.w) + 1

    assert_same_derivatives(ours, theirs, problem.inputs, mode)


def test_the_fused_outputs_are_views_of_one_tensor() -> None:
    problem = PROBLEMS["query, key, value"]
    ys = lora_linears(problem.inputs[0], problem.layers)
    assert [y.shape[-1] for y in ys] == [4, 2, 2]
    assert len({y.untyped_storage().data_ptr() for y in ys}) == 1


@EVERY
def test_inputs_are_never_written(name: str) -> None:
    problem = PROBLEMS[name]
    before = [t.clone() for t in problem.inputs]
    for mode in MODES:
        derivatives(problem.ours, problem.inputs, [torch.ones_like(t) for t in problem.inputs], mode)
    assert all(torch.equal(t, old) for t, old in zip(problem.inputs, before, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_no_rows(mode: str) -> None:
    problem = Problem((4, 3, True), (5, 0, False), lead=(0,))
    found = derivatives(problem.ours, problem.inputs, [torch.ones_like(t) for t in problem.inputs], mode)
    assert found[0].shape == (0, 9) and not any(t.any() for t in found[1:])


@pytest.mark.parametrize("joint", [False, True])
def test_float32_adapters_of_a_bfloat16_layer(joint: bool) -> None:
    """y and dx in x's type, the adapters' gradients in theirs and as accurate as x and dy are exact."""
    x, w, bias, dy = (t.bfloat16() for t in (rand(9, D_IN), rand(7, D_IN), rand(7), rand(9, 7)))
    a, b = rand(3, D_IN).float(), rand(7, 3).float()
    results = []
    for fn, of in (
        (lora_linear, lambda t: t),
        (lambda *args: plain(args[0], [LoraLayer(*args[1:])])[0], Tensor.double),
    ):
        inputs = [of(t).detach().requires_grad_() for t in (x, a, b)]
        with forward_ad.dual_level(), bare_tangents() if joint else nullcontext():
            dual = [forward_ad.make_dual(t, torch.ones_like(t)) for t in inputs]
            y = fn(dual[0], of(w), of(bias), dual[1], dual[2], 1.7)
            grads = torch.autograd.grad(y, dual, of(dy))
            results.append([part.detach() for t in (y, *grads) for part in forward_ad.unpack_dual(t)])
    types = [t.dtype for t in results[0]]
    assert types == [torch.bfloat16] * 4 + [torch.float32] * 4
    for ours, exact in zip(*results, strict=True):
        rounding = {torch.bfloat16: 2**-7, torch.float32: 1e-5}[ours.dtype]
        torch.testing.assert_close(ours.double(), exact, rtol=rounding, atol=rounding * float(exact.abs().max()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": rand(7, 5)}, r"x has 6 features, w is \(7, 5\)"),
        ({"w": rand(7, D_IN).float()}, "w is torch.float32, x is torch.float64"),
        ({"w": rand(7, D_IN).requires_grad_()}, "w requires a gradient, but it is frozen"),
        ({"bias": rand(6)}, r"bias is \(6,\): must be \[7\]"),
        ({"bias": rand(7).float()}, "bias is torch.float32"),
        ({"bias": rand(7).requires_grad_()}, "bias requires a gradient"),
        ({"a": rand(2, 5)}, r"a is \(2, 5\): must be \[R, 6\]"),
        ({"a": rand(0, D_IN), "b": rand(7, 0)}, r"a is \(0, 6\)"),
        ({"b": rand(7, 3)}, r"b is \(7, 3\): must be \(7, 2\)"),
        ({"b": None}, "a and b must be given together"),
        ({"b": rand(7, 2).float()}, "b is torch.float32, a is torch.float64"),
        ({"a": rand(2, D_IN).half(), "b": rand(7, 2).half()}, "a is torch.float16"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    layer = Problem((7, 2, True)).layers[0]
    bad = layer._replace(**change)
    with pytest.raises(ValueError, match=f"^{message}") as single:
        lora_linear(rand(3, D_IN), *bad)
    with pytest.raises(ValueError, match=r"layers\[1\]\.") as fused:
        lora_linears(rand(3, D_IN), [layer, bad])
    assert str(fused.value).replace("layers[1].", "") == str(single.value)


def test_layers_that_do_not_go_together_are_named() -> None:
    layer = Problem((7, 2, True)).layers[0]
    with pytest.raises(ValueError, match="layers is empty"):
        lora_linears(rand(3, D_IN), [])
    assert layer.a is not None and layer.b is not None
    single = layer._replace(a=layer.a.float(), b=layer.b.float())
    with pytest.raises(ValueError, match=r"torch\.float32 and torch\.float64: must be of one dtype"):
        lora_linears(rand(3, D_IN), [layer, single])
    with pytest.raises(ValueError, match=r"x is torch\.int64"):
        frozen_linear(torch.ones(3, D_IN, dtype=torch.int64), Int8Weight(torch.ones(7, D_IN), torch.ones(7)))


def quantised(kind: str, d_out: int = 5, d_in: int = 64) -> tuple[Any, Tensor]:
    """A frozen weight as bitsandbytes holds it, and the same dense in float64."""
    bnb = pytest.importorskip("bitsandbytes")
    dense = rand(d_out, d_in).float()
    if kind == "int8":
        w = bnb.nn.Int8Params(dense, requires_grad=False, has_fp16_weights=False).to("cpu")
        return w, bnb.functional.int8_vectorwise_dequant(w.data, w.SCB).double()
    w = bnb.nn.Params4bit(dense, requires_grad=False, quant_type=kind, compress_statistics=kind == "nf4").to("cpu")
    return w, bnb.functional.dequantize_4bit(w.data, w.quant_state).double()


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("mode", MODES)
def test_a_quantised_base_is_its_dense_form_exactly(kind: str, mode: str) -> None:
    (w, dense), (v, dense_v) = quantised(kind), quantised(kind, d_out=3)
    x, a, b = rand(9, 64), rand(2, 64), rand(5, 2)

    def of(w: Any, v: Any) -> Callable[..., Tensor]:
        def fn(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            single = lora_linear(x, w, None, a, b, 1.7), frozen_linear(x, v)
            both = lora_linears(x, [LoraLayer(w, None, a, b, 0.3), LoraLayer(v, None, None, None, 1.0)])
            return torch.cat([*single, *both], -1)

        return fn

    directions = [rand(*t.shape) for t in (x, a, b)]
    ours, theirs = (derivatives(fn, [x, a, b], directions, mode) for fn in (of(w, v), of(dense, dense_v)))
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_dense_form_is_never_kept(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["nacd_kernels.frozen_linear"]
    made: list[weakref.ref] = []

    def noting(w: Any, dtype: torch.dtype) -> Tensor:
        made.append(weakref.ref(dense := w.dense(dtype)))
        return dense

    monkeypatch.setattr(module, "dense", noting)
    w, _ = quantised(kind)
    x, a, b = (t.requires_grad_() for t in (rand(9, 64), rand(2, 64), rand(5, 2)))
    y = lora_linear(x, w, None, a, b, 1.7)
    grads = torch.autograd.grad(y.square().sum(), (x, a, b), create_graph=True)
    gc.collect()
    assert len(made) == 2 and all(ref() is None for ref in made) and grads


def test_a_quantised_layer_under_autocast_computes_in_its_type() -> None:
    w, dense = quantised("nf4")
    x = rand(9, 64).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = frozen_linear(x, w)
    assert torch.equal(y, F.linear(x.bfloat16(), dense.bfloat16()))


def test_an_int8_layer_that_has_run_hands_over_its_maxima() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(64, 5, bias=False, has_fp16_weights=False).to("cpu")
    x = rand(9, 64).half()
    before = frozen_linear(x, layer.weight)
    layer(x)
    with pytest.raises(ValueError, match="pass Int8Weight"):
        frozen_linear(x, layer.weight)
    assert torch.equal(frozen_linear(x, Int8Weight(layer.weight.data, layer.state.SCB)), before)


def test_weights_that_are_not_quantised_yet_are_named() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    x = rand(9, 64).float()
    with pytest.raises(ValueError, match=r"Params4bit without a quant_state: call .to\(device\) first"):
        frozen_linear(x, bnb.nn.Params4bit(rand(5, 64).float(), requires_grad=False))
    with pytest.raises(ValueError, match=r"Int8Params in torch.float32: call .to\(device\) first"):
        frozen_linear(x, bnb.nn.Int8Params(rand(5, 64).float(), requires_grad=False))
    w, _ = quantised("nf4", d_in=32)
    with pytest.raises(ValueError, match=r"x has 64 features, w is \(5, 32\)"):
        frozen_linear(x, w)
    w.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="packed for bitsandbytes' own product"):
        frozen_linear(x[:, :32], w)


def test_the_package_imports_neither_bitsandbytes_nor_triton() -> None:
    code = "import sys, nacd_kernels; sys.exit(' '.join({'bitsandbytes', 'triton'} & set(sys.modules)) or 0)"
    where = str(Path(nacd_kernels.__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=where)
    assert done.returncode == 0, done.stderr
