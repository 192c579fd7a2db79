"""Causal attention and its derivatives: time beside PyTorch's own, and peak memory against the number of tokens.

    ours                   flash_attention, linear in T
    sdpa math              PyTorch's composition, today's only one with second derivatives; quadratic in T
    sdpa flash             first derivatives only
    jvp-flash-attention    on a GPU, where it is installed: first derivatives and the tangent of the result only

What is timed, d wide heads, each of B H T^2 / 2 pairs of tokens, in products of 2 d flop a pair that its formulas need:

    forward            2     O
    backward           5     dQ, dK, dV, of a graph that is kept
    forward_dual       6     O and O', by forward mode
    dual_pass         21     O, O', the gradients and their tangents: forward over reverse, what the flat unroll runs
    double_backward   15     of the gradients, along u: jvp and backward_jvp, of a graph that is kept
    step              22     forward, backward and double backward: reverse over reverse, what a retained graph runs

Results are compared with the composition in float64 before anything is timed. On a GPU also full HVPs at the shapes
that flash-hog publishes for an H200 (12 heads, d 64, bfloat16; its Pallas / ThunderKittens kernels, in ms): B512 T512
27.7 / 18.3, B256 T1024 44.7 / 27.2, B128 T2048 78.3 / 44.8. Those are the goals; they were not measured here.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from timing import Rows, ceilings, interleaved, median_ratio, parser, quantiles
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from nacd_fast.artifacts import peak_bytes, reset_peak
from nacd_kernels import bare_tangents, flash_attention

Shape = tuple[int, int, int, int]  # B, H, T, d
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

CPU_SHAPES: dict[Shape, int] = {(4, 8, 130, 64): 9, (2, 12, 514, 64): 5, (1, 2, 2048, 64): 3}  # and rounds
QUICK_SHAPES: dict[Shape, int] = {(2, 2, 65, 64): 2}
GPU_SHAPES: dict[Shape, int] = {  # heads of OPT-1.3B and of Llama-2-7B
    (8, 32, 512, 64): 20,
    (4, 32, 2048, 64): 20,
    (8, 32, 512, 128): 20,
    (4, 32, 2048, 128): 20,
}
HVP_SHAPES: dict[Shape, int] = {(512, 12, 512, 64): 10, (256, 12, 1024, 64): 10, (128, 12, 2048, 64): 10}
PRODUCTS = {"forward": 2, "backward": 5, "forward_dual": 6, "dual_pass": 21, "double_backward": 15, "step": 22}
FIRST_ORDER = ("forward", "backward")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative, of the norm

CURVE = (256, 512, 1024, 2048, 4096, 8192)  # tokens of one head of width 64
CURVE_KINDS = ("forward", "gradient", "forward_dual", "dual_pass", "step")  # gradient: forward and backward
LIMIT = 6e9  # bytes: where the quadratic curve ends
# glibc then maps every tensor by itself and unmaps it when it is freed: resident memory counts live tensors, not holes
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def sdpa(backend: SDPBackend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


class Problem:
    """One attention call's inputs and directions, and what is done with them."""

    def __init__(self, attend: Attend, shape: Shape, device: torch.device, dtype: torch.dtype, tangent: Any = None):
        g = torch.Generator().manual_seed(0)
        draws = [torch.randn(shape, generator=g).to(device, dtype) for _ in range(10)]
        self.attend, self.attend_dual = attend, tangent or attend
        self.inputs = [x.requires_grad_() for x in draws[:3]]
        self.tangents, self.u, self.dy = draws[3:6], draws[6:9], draws[9]
        self.kept: dict[str, Any] = {}

    def duals(self, stack: ExitStack) -> list[Tensor]:
        contexts: tuple[AbstractContextManager, ...] = (forward_ad.dual_level(), bare_tangents())
        for context in contexts:
            stack.enter_context(context)
        return [forward_ad.make_dual(x, t) for x, t in zip(self.inputs, self.tangents, strict=True)]

    def forward(self) -> list[Tensor]:
        with torch.no_grad():
            return [self.attend(*self.inputs)]

    def backward(self) -> list[Tensor]:
        if "y" not in self.kept:
            self.kept["y"] = self.attend(*self.inputs)
        return list(torch.autograd.grad(self.kept["y"], self.inputs, self.dy, retain_graph=True))

    def gradient(self) -> list[Tensor]:
        return list(torch.autograd.grad(self.attend(*self.inputs), self.inputs, self.dy))

    def forward_dual(self) -> list[Tensor]:
        with ExitStack() as stack, torch.no_grad():
            return list(forward_ad.unpack_dual(self.attend_dual(*self.duals(stack))))

    def dual_pass(self) -> list[Tensor]:
        with ExitStack() as stack:
            duals = self.duals(stack)
            grads = torch.autograd.grad(self.attend_dual(*duals), duals, self.dy)
            pairs = [forward_ad.unpack_dual(g) for g in grads]
            return [*(p.primal for p in pairs), *(p.tangent for p in pairs)]

    def double_backward(self) -> list[Tensor]:
        if "grads" not in self.kept:
            self.kept["grads"] = torch.autograd.grad(self.attend(*self.inputs), self.inputs, self.dy, create_graph=True)
        return list(torch.autograd.grad(self.kept["grads"], self.inputs, self.u, retain_graph=True))

    def step(self) -> list[Tensor]:
        grads = torch.autograd.grad(self.attend(*self.inputs), self.inputs, self.dy, create_graph=True)
        return list(torch.autograd.grad(grads, self.inputs, self.u))


def compare(rows: Rows, name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
    """Exit if ours differs from the composition in float64, on at most one row and two heads of the shape."""
    small = (min(shape[0], 1), min(shape[1], 2), *shape[2:])
    ours = Problem(flash_attention, small, device, dtype)
    exact = Problem(sdpa(SDPBackend.MATH), small, device, torch.float64)
    for theirs, mine in zip(
        (*exact.inputs, *exact.tangents, *exact.u, exact.dy),
        (*ours.inputs, *ours.tangents, *ours.u, ours.dy),
        strict=True,
    ):
        theirs.data.copy_(mine.data)
    for kind in ("forward", "forward_dual", "dual_pass", "step"):
        pairs = zip(getattr(ours, kind)(), getattr(exact, kind)(), strict=True)
        error = max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)
        rows.add(f"{name} {kind}", "relative_error", error, "1", "float64")
        if not error <= TOLERANCE[dtype]:
            sys.exit(f"{kind} differs by {error:.2e}, limit {TOLERANCE[dtype]}: nothing is timed")


def peers(device: torch.device) -> dict[str, tuple[Attend, Attend | None, tuple[str, ...]]]:
    """Name: the function, that for dual inputs if it is another, and what it can do."""
    found: dict[str, tuple[Attend, Attend | None, tuple[str, ...]]] = {
        "": (flash_attention, None, tuple(PRODUCTS)),
        "sdpa math": (sdpa(SDPBackend.MATH), None, tuple(PRODUCTS)),
        "sdpa flash": (sdpa(SDPBackend.FLASH_ATTENTION), None, FIRST_ORDER),
    }
    if device.type != "cuda":
        return found
    if find_spec("jvp_flash_attention") is None:
        print("jvp-flash-attention is not installed: not measured")
        return found
    JVPAttn = import_module("jvp_flash_attention.jvp_attention").JVPAttn

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return JVPAttn.fwd(q, k, v, causal=True)

    def attend_dual(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return JVPAttn.fwd_dual(q, k, v, causal=True)

    return found | {"jvp-flash-attention": (attend, attend_dual, (*FIRST_ORDER, "forward_dual"))}


def time_shape(rows: Rows, shape: Shape, rounds: int, device: torch.device, dtype: torch.dtype) -> None:
    name = shape_name(shape)
    compare(rows, name, shape, device, dtype)
    B, H, T, d = shape
    problems = {
        peer: (Problem(attend, shape, device, dtype, tangent), kinds)
        for peer, (attend, tangent, kinds) in peers(device).items()
    }
    for kind, products in PRODUCTS.items():
        contestants = {peer: getattr(problem, kind) for peer, (problem, kinds) in problems.items() if kind in kinds}
        seconds = interleaved(contestants, rounds, device)
        flop = products * 2 * d * B * H * T * T / 2
        for peer, times in seconds.items():
            for quantile, value in zip(("p20", "p50", "p80"), quantiles(times), strict=True):
                rows.add(f"{name} {kind}", f"ms_{quantile}", 1e3 * value, "ms", peer)
            rate = flop / statistics.median(times)
            rows.add(f"{name} {kind}", "tflops", rate / 1e12, "Tflop/s", peer)
            rows.add(f"{name} {kind}", "roofline_share", rate / ceilings(device)[1], "1", peer)
            if peer:
                rows.add(f"{name} {kind}", "speedup", median_ratio(times, seconds[""]), "x", peer)


def shape_name(shape: Shape) -> str:
    return "B{} H{} T{} d{}".format(*shape)


def time_hvp(rows: Rows, shape: Shape, rounds: int, device: torch.device) -> None:
    problem = Problem(flash_attention, shape, device, torch.bfloat16)
    for kind, times in interleaved({k: getattr(problem, k) for k in ("dual_pass", "step")}, rounds, device).items():
        rows.add(f"{shape_name(shape)} {kind}", "hvp_ms", 1e3 * statistics.median(times), "ms")


def curves(peer: str, tokens: list[int], device: torch.device) -> dict[str, dict[int, int]]:
    """Bytes that each kind adds to this process at its peak, by number of tokens; a kind ends before LIMIT."""
    attend = sdpa(SDPBackend.MATH) if peer else flash_attention
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found: dict[str, dict[int, int]] = {kind: {} for kind in CURVE_KINDS}
    for kind, peaks in found.items():
        getattr(Problem(attend, (1, 1, tokens[0], 64), device, dtype), kind)()
        for T in tokens:
            if peer and peaks and 4 * list(peaks.values())[-1] > LIMIT:
                break
            problem = Problem(attend, (1, 1, T, 64), device, dtype)
            reset_peak()
            before = peak_bytes()
            getattr(problem, kind)()
            peaks[T] = peak_bytes() - before
    return found


def exponent(peaks: dict[int, int]) -> float:
    """Of the power of T that fits the peaks, by least squares in logarithms."""
    x, y = ([math.log(value) for value in values] for values in (peaks.keys(), peaks.values()))
    return statistics.linear_regression(x, y).slope


def main() -> None:
    args = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    rows = Rows("bench_flash_attention", device)
    for shape, rounds in (QUICK_SHAPES if args.quick else GPU_SHAPES if gpu else CPU_SHAPES).items():
        time_shape(rows, shape, rounds, device, dtype)
    if gpu and not args.quick:
        for shape, rounds in HVP_SHAPES.items():
            time_hvp(rows, shape, rounds, device)
    tokens = CURVE[:3] if args.quick else CURVE
    for peer in ("", "sdpa math"):
        command = [sys.executable, __file__, "--peak", peer, json.dumps(tokens), args.device]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **GIVE_BACK})
        for kind, found in json.loads(done.stdout).items():
            peaks = {int(T): int(peak) for T, peak in found.items()}
            for T, peak in peaks.items():
                rows.add(f"B1 H1 T{T} d64 {kind}", "peak_bytes", peak, "B", peer)
            rows.add(f"B1 H1 d64 {kind}", "memory_exponent", exponent(peaks), "1", peer)
    rows.write(args.json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        torch.set_num_threads(1)
        print(json.dumps(curves(sys.argv[2], json.loads(sys.argv[3]), torch.device(sys.argv[4]))))
    else:
        main()
