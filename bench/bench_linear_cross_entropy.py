"""The loss from hidden states and its derivatives: time and peak memory beside F.cross_entropy of stored logits.

    ours           linear_cross_entropy: chunks, only supervised rows, primal and tangent in one product
    ours, retained the same with retain=True, where a second derivative through a graph is taken
    torch          F.cross_entropy(h @ w.T, labels)
    liger          Liger's fused linear cross-entropy, where it is installed and the device is a GPU; first order only

What is timed, in products of the supervised rows with the vocabulary that its formulas need (2 V D flop a row each):

    forward            1     no gradient is asked for
    gradient           2     forward and backward
    forward_dual       3     the loss and its tangent (forward mode; ours forms u and u' on the way: 4)
    dual_pass          4     forward over reverse, what the flat unroll runs
    step               4     forward, backward and double backward: reverse over reverse, what a retained graph runs

Every row is supervised, so that none is saved by leaving rows out. Results are compared with float64 first.
"""

import statistics
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch
from timing import Rows, ceilings, interleaved, median_ratio, parser, quantiles
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from nacd_kernels import bare_tangents, linear_cross_entropy

Shape = tuple[int, int, int]  # M, D, V
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

CPU_SHAPES: dict[Shape, int] = {(256, 512, 50272): 3, (256, 768, 50272): 2}  # and rounds
QUICK_SHAPES: dict[Shape, int] = {(65, 64, 1000): 2}
GPU_SHAPES: dict[Shape, int] = {(4096, 2048, 50272): 20, (4096, 4096, 32000): 20}  # OPT-1.3B, Llama-2-7B
PRODUCTS = {"forward": 1, "gradient": 2, "forward_dual": 3, "dual_pass": 4, "step": 4}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative, of the norm


def plain(h: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((h @ w.T).float() if h.dtype == torch.bfloat16 else h @ w.T, labels)


def retained(h: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy(h, w, labels, retain=True)


class Problem:
    """One call's inputs and directions, and what is done with them."""

    def __init__(self, loss: Loss, shape: Shape, device: torch.device, dtype: torch.dtype):
        M, D, V = shape
        g = torch.Generator().manual_seed(0)
        self.loss = loss
        self.h = torch.randn(M, D, generator=g).to(device, dtype).requires_grad_()
        self.direction = torch.randn(M, D, generator=g).to(device, dtype)
        self.w = (0.05 * torch.randn(V, D, generator=g)).to(device, dtype)
        self.labels = torch.randint(0, V, (M,), generator=g).to(device)

    def of(self, h: Tensor) -> Tensor:
        return self.loss(h, self.w, self.labels)

    def forward(self) -> list[Tensor]:
        with torch.no_grad():
            return [self.of(self.h)]

    def gradient(self) -> list[Tensor]:
        return list(torch.autograd.grad(self.of(self.h), self.h))

    def forward_dual(self) -> list[Tensor]:
        with forward_ad.dual_level(), bare_tangents(), torch.no_grad():
            return list(forward_ad.unpack_dual(self.of(forward_ad.make_dual(self.h, self.direction))))

    def dual_pass(self) -> list[Tensor]:
        with forward_ad.dual_level(), bare_tangents():
            h = forward_ad.make_dual(self.h, self.direction)
            return list(forward_ad.unpack_dual(torch.autograd.grad(self.of(h), h)[0]))

    def step(self) -> list[Tensor]:
        (g,) = torch.autograd.grad(self.of(self.h), self.h, create_graph=True)
        return [g.detach(), *torch.autograd.grad(g, self.h, self.direction)]


def compare(rows: Rows, name: str, loss: Loss, peer: str, device: torch.device, dtype: torch.dtype) -> None:
    """Exit if the loss differs from the composition in float64, at a small shape."""
    shape = (65, 96, 1009)
    ours, exact = Problem(loss, shape, device, dtype), Problem(plain, shape, device, torch.float64)
    for mine, theirs in ((ours.h, exact.h), (ours.w, exact.w), (ours.direction, exact.direction)):
        theirs.data.copy_(mine.data)
    for kind in PRODUCTS:
        pairs = zip(getattr(ours, kind)(), getattr(exact, kind)(), strict=True)
        error = max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)
        rows.add(f"{name} {kind}", "relative_error", error, "1", peer or "float64")
        if not error <= TOLERANCE[dtype]:
            sys.exit(f"{kind} differs by {error:.2e}, limit {TOLERANCE[dtype]}: nothing is timed")


def peers(device: torch.device) -> dict[str, tuple[Loss, tuple[str, ...]]]:
    """Name: the loss, and what it can do."""
    found: dict[str, tuple[Loss, tuple[str, ...]]] = {
        "": (linear_cross_entropy, tuple(PRODUCTS)),
        "torch": (plain, tuple(PRODUCTS)),
        "ours, retained": (retained, ("step",)),
    }
    if device.type != "cuda":
        return found
    if find_spec("liger_kernel") is None:
        print("liger-kernel is not installed: not measured")
        return found
    liger = import_module("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction
    return found | {"liger": (lambda h, w, labels: liger.apply(h, w, labels)[0], ("forward", "gradient"))}


def time_shape(rows: Rows, shape: Shape, rounds: int, device: torch.device, dtype: torch.dtype) -> None:
    name = "M{} D{} V{}".format(*shape)
    M, D, V = shape
    problems = {peer: (Problem(loss, shape, device, dtype), kinds) for peer, (loss, kinds) in peers(device).items()}
    for kind, products in PRODUCTS.items():
        contestants = {peer: getattr(problem, kind) for peer, (problem, kinds) in problems.items() if kind in kinds}
        seconds = interleaved(contestants, rounds, device)
        flop = products * 2 * M * D * V
        for peer, times in seconds.items():
            for quantile, value in zip(("p20", "p50", "p80"), quantiles(times), strict=True):
                rows.add(f"{name} {kind}", f"ms_{quantile}", 1e3 * value, "ms", peer)
            rate = flop / statistics.median(times)
            rows.add(f"{name} {kind}", "tflops", rate / 1e12, "Tflop/s", peer)
            rows.add(f"{name} {kind}", "roofline_share", rate / ceilings(device)[1], "1", peer)
            if peer:
                rows.add(f"{name} {kind}", "speedup", median_ratio(times, seconds[""]), "x", peer)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
                contestants[peer]()
                peak = torch.cuda.max_memory_allocated(device) - before
                rows.add(f"{name} {kind}", "peak_bytes", peak, "B", peer)
        if "ours, retained" in seconds:
            gain = median_ratio(seconds["torch"], seconds["ours, retained"])
            rows.add(f"{name} {kind} retained", "speedup", gain, "x", "torch")


def main() -> None:
    args = parser(__doc__).parse_args()
    device = torch.device(args.device)
    rows = Rows("linear_cross_entropy", device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    compare(rows, "compare", linear_cross_entropy, "", device, dtype)
    compare(rows, "compare retained", retained, "", device, dtype)
    shapes = QUICK_SHAPES if args.quick else GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    for shape, rounds in shapes.items():
        time_shape(rows, shape, rounds, device, dtype)
    rows.write(args.json)


if __name__ == "__main__":
    main()
