"""What the benches of memory-bound ops share: contestants compared with float64, then timed, beside a copy's bandwidth.

    forward        no gradient is asked for
    gradient       forward and backward
    forward_dual   the result and its tangent, together where the contestant can
    dual_pass      forward over reverse: what the flat unroll runs
    step           forward, backward and double backward: reverse over reverse, what a retained graph runs

`gigabytes` and `roofline_share` count what a fused op must move, every input and result of its functions once, for
every contestant alike; the roofline is a large copy's bytes/s.
"""

import statistics
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from timing import Rows, ceilings, interleaved, median_ratio, quantiles
from torch import Tensor
from torch.autograd import forward_ad

from nacd_kernels import bare_tangents

KINDS = ("forward", "gradient", "forward_dual", "dual_pass", "step")
FIRST_ORDER = ("forward", "gradient")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative, of the norm

Op = Callable[..., Tensor]


class Peer(NamedTuple):
    op: Op
    kinds: tuple[str, ...] = KINDS


def tensors_moved(inputs: int) -> dict[str, int]:
    """Of an op with so many inputs of its result's size: what each kind reads and writes."""
    forward, backward, jvp, backward_jvp = inputs + 1, 2 * inputs + 1, 2 * inputs + 1, 3 * inputs + 1
    return {
        "forward": forward,
        "gradient": forward + backward,
        "forward_dual": 2 * forward,
        "dual_pass": 2 * forward + 2 * backward,
        "step": forward + backward + jvp + backward_jvp,
    }


class Problem:
    """An op at its inputs, with directions of them, a cotangent and its direction."""

    def __init__(self, op: Op, inputs: list[Tensor]):
        self.op = op
        self.x = [t.detach().requires_grad_() for t in inputs]
        g = torch.Generator().manual_seed(1)
        like = inputs[0]
        drawn = [torch.randn(like.shape, generator=g).to(like) for _ in range(len(inputs) + 2)]
        self.dy, self.dy_t, *self.v = drawn

    def forward(self) -> list[Tensor]:
        with torch.no_grad():
            return [self.op(*self.x)]

    def gradient(self) -> list[Tensor]:
        return list(torch.autograd.grad(self.op(*self.x), self.x, self.dy))

    def forward_dual(self) -> list[Tensor]:
        with forward_ad.dual_level(), bare_tangents(), torch.no_grad():
            pair = forward_ad.unpack_dual(self.op(*self.dual()))
            return [pair.primal, pair.tangent]

    def dual(self) -> list[Tensor]:
        return [forward_ad.make_dual(t, v) for t, v in zip(self.x, self.v, strict=True)]

    def dual_pass(self) -> list[Tensor]:
        with forward_ad.dual_level(), bare_tangents():
            x = self.dual()
            grads = torch.autograd.grad(self.op(*x), x, forward_ad.make_dual(self.dy, self.dy_t))
            return [part for g in grads for part in forward_ad.unpack_dual(g)]

    def step(self) -> list[Tensor]:
        dy = self.dy.detach().requires_grad_()
        grads = torch.autograd.grad(self.op(*self.x), self.x, dy, create_graph=True)
        second = torch.autograd.grad(grads, [dy, *self.x], self.v, allow_unused=True)
        return [g.detach() for g in grads] + [torch.zeros_like(dy) if t is None else t for t in second]


def compare(rows: Rows, case: str, peers: Mapping[str, Peer], exact: Op, inputs: list[Tensor]) -> None:
    """Exit if a contestant differs from `exact` in float64, whose second derivatives come from reverse passes."""
    want = Problem(exact, [t.double() for t in inputs])
    for name, peer in peers.items():
        found = Problem(peer.op, inputs)
        for kind in peer.kinds:
            if kind not in ("dual_pass", "forward_dual"):
                pairs = list(zip(getattr(found, kind)(), getattr(want, kind)(), strict=True))
                check(rows, f"{case} {kind}", name, pairs, inputs[0].dtype)
        if "dual_pass" in peer.kinds:
            check(rows, f"{case} dual_pass", name, dual_pairs(found, want), inputs[0].dtype)


def dual_pairs(found: Problem, want: Problem) -> list[tuple[Tensor, Tensor]]:
    """y' and the gradients' tangents beside J v (of the double backward) and H v + J^T dy'."""
    _, y_t = found.forward_dual()
    pairs = found.dual_pass()
    count = len(want.x)
    exact = want.step()
    along = torch.autograd.grad(want.op(*want.x), want.x, want.dy_t)
    tangents = [a + b for a, b in zip(exact[count + 1 :], along, strict=True)]
    return [(y_t, exact[count]), *zip(pairs[::2], exact[:count], strict=True), *zip(pairs[1::2], tangents, strict=True)]


def check(rows: Rows, case: str, peer: str, pairs: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
    error = max(float((a.double() - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)
    rows.add(case, "relative_error", error, "1", peer)
    if not error <= TOLERANCE[dtype]:
        sys.exit(f"{case} of {peer or 'ours'} differs by {error:.2e}, limit {TOLERANCE[dtype]}: nothing is timed")


def time_case(
    rows: Rows, case: str, peers: Mapping[str, Peer], inputs: list[Tensor], moved: Mapping[str, int], rounds: int
) -> None:
    device = inputs[0].device
    size = inputs[0].numel() * inputs[0].element_size()
    problems = {name: Problem(peer.op, inputs) for name, peer in peers.items()}
    for kind in KINDS:
        contestants = {name: getattr(problems[name], kind) for name, peer in peers.items() if kind in peer.kinds}
        seconds = interleaved(contestants, rounds, device)
        for name, times in seconds.items():
            for quantile, value in zip(("p20", "p50", "p80"), quantiles(times), strict=True):
                rows.add(f"{case} {kind}", f"ms_{quantile}", 1e3 * value, "ms", name)
            rate = moved[kind] * size / statistics.median(times)
            rows.add(f"{case} {kind}", "gigabytes", rate / 1e9, "GB/s", name)
            rows.add(f"{case} {kind}", "roofline_share", rate / ceilings(device)[0], "1", name)
            if name:
                rows.add(f"{case} {kind}", "speedup", median_ratio(times, seconds[""]), "x", name)


def draw(shape: tuple[int, ...], count: int, device: torch.device) -> list[Tensor]:
    """Normal numbers: bfloat16 on a GPU, float32 on a CPU."""
    g = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return [torch.randn(shape, generator=g).to(device, dtype) for _ in range(count)]
