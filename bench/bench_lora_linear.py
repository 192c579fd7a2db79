"""LoRA layers and their derivatives: time beside PEFT's layer, and beside the frozen products alone.

    ours       lora_linear; lora_linears where several layers read one x (3 x: query, key, value; 2 x: gate, up)
    peft       PEFT's layer, a composition that PyTorch differentiates as often as asked
    floor      the products with the frozen weights that the formulas need, by torch.nn.functional.linear and matmul
    unsloth    on a GPU, where it is installed, for single layers: first derivatives only

What is timed, M rows through weights [D_out, D_in], and what its formulas need: products with the frozen weight (F:
x W^T, B: dy W) and low-rank ones, in units of 2 M R (D_in + D_out) flop:

    forward            F    1     y
    backward           B    2     dx, dA, dB, of a graph that is kept
    forward_dual       FF   3     y and y', by forward mode
    dual_pass          FFBB 9     the gradients and their tangents: forward over reverse, what the flat unroll runs
    double_backward    F    5.5   of the gradients, along u, with respect to inputs and dy, of a graph that is kept
    step               FFB  8.5   all three, reverse over reverse: what a retained graph runs

Adapters are float32, of rank 16. Results are compared with the composition in float64 before anything is timed.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from timing import Rows, ceilings, interleaved, median_ratio, parser, quantiles
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from nacd_kernels import LoraLayer, bare_tangents, lora_linears


class Case(NamedTuple):
    """`layers` layers [d_out, d_in] that read one x of M rows."""

    M: int
    d_in: int
    d_out: int
    layers: int
    rounds: int

    def name(self) -> str:
        return f"M{self.M} {self.layers} x {self.d_in}>{self.d_out}"


RANK, SCALE = 16, 2.0
QUICK_CASES = (Case(65, 64, 96, 1, 2), Case(65, 64, 64, 3, 2))
CPU_CASES = (
    Case(520, 512, 512, 3, 9),
    Case(520, 512, 512, 1, 9),
    Case(520, 512, 2048, 1, 7),
    Case(520, 2048, 512, 1, 7),
    Case(1028, 768, 768, 3, 5),
    Case(1028, 768, 3072, 1, 5),
)
GPU_CASES = (  # of OPT-1.3B and of Llama-2-7B
    Case(4096, 2048, 2048, 3, 20),
    Case(4096, 2048, 8192, 1, 20),
    Case(4096, 8192, 2048, 1, 20),
    Case(4096, 4096, 4096, 3, 20),
    Case(4096, 4096, 11008, 2, 20),
    Case(4096, 11008, 4096, 1, 20),
)
NEEDS = {
    "forward": ("F", 1.0),
    "backward": ("B", 2.0),
    "forward_dual": ("FF", 3.0),
    "dual_pass": ("FFBB", 9.0),
    "double_backward": ("F", 5.5),
    "step": ("FFB", 8.5),
}
FIRST_ORDER = ("forward", "backward")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative, of the norm

Apply = Callable[[Tensor, list[LoraLayer]], Sequence[Tensor]]


def composition(x: Tensor, layers: list[Any]) -> list[Tensor]:
    return [F.linear(x, w, bias) + scale * F.linear(F.linear(x, a), b) for w, bias, a, b, scale in layers]


class Peft:
    """PEFT's own layers, which are given the factors at every call."""

    def __init__(self, layers: list[Any]):
        self.modules = [self.module(layer) for layer in layers]

    def module(self, layer: Any) -> nn.Module:
        linear = nn.Linear(layer.w.shape[1], layer.w.shape[0], device="meta")
        linear.weight, linear.bias = (nn.Parameter(t, requires_grad=False) for t in (layer.w, layer.bias))
        holder = nn.ModuleDict({"linear": linear})
        config = LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules=["linear"])
        adapted: Any = inject_adapter_in_model(config, holder)
        return adapted["linear"]

    def __call__(self, x: Tensor, layers: list[Any]) -> list[Tensor]:
        return [
            torch.func.functional_call(
                module, {"lora_A.default.weight": layer.a, "lora_B.default.weight": layer.b}, (x,)
            )
            for module, layer in zip(self.modules, layers, strict=True)
        ]


def unsloth() -> Apply | None:
    if find_spec("unsloth") is None:
        print("unsloth is not installed: not measured")
        return None
    LoRA_W = import_module("unsloth.kernels.fast_lora").LoRA_W

    def apply(x: Tensor, layers: list[LoraLayer]) -> list[Tensor]:
        return [LoRA_W.apply(x[None], w, None, a, b, scale)[0] + bias for w, bias, a, b, scale in layers]

    return apply


class Problem:
    """The layers of a case, their inputs and directions, and what is done with them."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype, exact: bool = False):
        g = torch.Generator().manual_seed(0)

        def draw(*shape: int, of: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
            drawn = (scale * torch.randn(shape, generator=g)).to(device, of)
            return drawn.double() if exact else drawn

        def draws() -> list[Tensor]:
            shapes = ((RANK, case.d_in), (case.d_out, RANK)) * case.layers
            factors = [draw(*shape, of=torch.float32, scale=shape[1] ** -0.5) for shape in shapes]
            return [draw(case.M, case.d_in), *factors]

        self.frozen = [
            LoraLayer(draw(case.d_out, case.d_in, scale=case.d_in**-0.5), draw(case.d_out), None, None, SCALE)
            for _ in range(case.layers)
        ]
        self.inputs, self.tangents, self.u = draws(), draws(), draws()
        self.dys = [draw(case.M, case.d_out).requires_grad_() for _ in range(case.layers)]
        for x in self.inputs:
            x.requires_grad_()

    def layers(self, factors: Sequence[Tensor]) -> list[LoraLayer]:
        return [layer._replace(a=a, b=b) for layer, a, b in zip(self.frozen, factors[::2], factors[1::2], strict=True)]


class Contestant:
    """What is timed, of one way to apply the layers."""

    def __init__(self, problem: Problem, apply: Apply):
        self.problem, self.apply = problem, apply
        self.kept: dict[str, Any] = {}

    def outputs(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return list(self.apply(inputs[0], self.problem.layers(inputs[1:])))

    def duals(self, stack: ExitStack) -> list[Tensor]:
        contexts: tuple[AbstractContextManager, ...] = (forward_ad.dual_level(), bare_tangents())
        for context in contexts:
            stack.enter_context(context)
        return [forward_ad.make_dual(x, t) for x, t in zip(self.problem.inputs, self.problem.tangents, strict=True)]

    def forward(self) -> list[Tensor]:
        with torch.no_grad():
            return self.outputs(self.problem.inputs)

    def backward(self) -> list[Tensor]:
        if "y" not in self.kept:
            self.kept["y"] = self.outputs(self.problem.inputs)
        dys = [dy.detach() for dy in self.problem.dys]
        return list(torch.autograd.grad(self.kept["y"], self.problem.inputs, dys, retain_graph=True))

    def forward_dual(self) -> list[Tensor]:
        with ExitStack() as stack, torch.no_grad():
            return [t for y in self.outputs(self.duals(stack)) for t in forward_ad.unpack_dual(y)]

    def dual_pass(self) -> list[Tensor]:
        with ExitStack() as stack:
            duals = self.duals(stack)
            dys = [forward_ad.make_dual(dy.detach(), dy.detach().flip(0)) for dy in self.problem.dys]
            grads = torch.autograd.grad(self.outputs(duals), duals, dys)
            return [t for g in grads for t in forward_ad.unpack_dual(g)]

    def gradients(self) -> tuple[Tensor, ...]:
        p = self.problem
        return torch.autograd.grad(self.outputs(p.inputs), p.inputs, p.dys, create_graph=True)

    def double_backward(self) -> list[Tensor]:
        if "grads" not in self.kept:
            self.kept["grads"] = self.gradients()
        p = self.problem
        return list(torch.autograd.grad(self.kept["grads"], [*p.inputs, *p.dys], p.u, retain_graph=True))

    def step(self) -> list[Tensor]:
        p = self.problem
        return list(torch.autograd.grad(self.gradients(), [*p.inputs, *p.dys], p.u))


def floor(problem: Problem, kind: str) -> Callable[[], None]:
    """The products with the frozen weights alone."""
    x, dys = problem.inputs[0].detach(), [dy.detach() for dy in problem.dys]

    def products() -> None:
        for which in NEEDS[kind][0]:
            for (w, bias, *_), dy in zip(problem.frozen, dys, strict=True):
                assert isinstance(w, Tensor)
                if which == "F":
                    F.linear(x, w, bias)
                else:
                    torch.matmul(dy, w)

    return products


def compare(rows: Rows, case: Case, problem: Problem, device: torch.device, dtype: torch.dtype) -> None:
    """Exit if ours differs from the composition in float64."""
    exact = Contestant(Problem(case, device, dtype, exact=True), composition)
    found = Contestant(problem, lora_linears)
    for kind in ("forward", "forward_dual", "dual_pass", "step"):
        pairs = zip(getattr(found, kind)(), getattr(exact, kind)(), strict=True)
        error = max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)
        rows.add(f"{case.name()} {kind}", "relative_error", error, "1", "float64")
        if not error <= TOLERANCE[dtype]:
            sys.exit(f"{kind} differs by {error:.2e}, limit {TOLERANCE[dtype]}: nothing is timed")


def time_case(rows: Rows, case: Case, device: torch.device, dtype: torch.dtype) -> None:
    problem = Problem(case, device, dtype)
    compare(rows, case, problem, device, dtype)
    found = {
        "": Contestant(problem, lora_linears),
        "peft": Contestant(problem, Peft(problem.layers(problem.inputs[1:]))),
    }
    theirs = unsloth() if device.type == "cuda" and case.layers == 1 else None
    for kind, (frozen, low) in NEEDS.items():
        contestants = {peer: getattr(contestant, kind) for peer, contestant in found.items()}
        contestants["floor"] = floor(problem, kind)
        if theirs is not None and kind in FIRST_ORDER:
            contestants["unsloth"] = getattr(Contestant(problem, theirs), kind)
        seconds = interleaved(contestants, case.rounds, device)
        sizes = len(frozen) * case.d_in * case.d_out + low * RANK * (case.d_in + case.d_out)
        flop = 2 * case.layers * case.M * sizes
        for peer, times in seconds.items():
            for quantile, value in zip(("p20", "p50", "p80"), quantiles(times), strict=True):
                rows.add(f"{case.name()} {kind}", f"ms_{quantile}", 1e3 * value, "ms", peer)
            if peer:
                rows.add(f"{case.name()} {kind}", "speedup", median_ratio(times, seconds[""]), "x", peer)
            if peer != "floor":
                rate = flop / statistics.median(times)
                rows.add(f"{case.name()} {kind}", "tflops", rate / 1e12, "Tflop/s", peer)
                rows.add(f"{case.name()} {kind}", "roofline_share", rate / ceilings(device)[1], "1", peer)


def main() -> None:
    args = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    rows = Rows("bench_lora_linear", device)
    for case in QUICK_CASES if args.quick else GPU_CASES if gpu else CPU_CASES:
        time_case(rows, case, device, torch.bfloat16 if gpu else torch.float32)
    rows.write(args.json)


if __name__ == "__main__":
    main()
