"""Is the second derivative of a function right? A test of any callable of tensors, against finite differences.

A fused kernel that computes its backward outside of autograd differentiates twice without an error, and wrongly. Here
y = f(x_1, .., x_n) is put under a curved scalar, so that what surrounds it counts too,

    phi = sum(w o y + y o y / 2),  w fixed and random        g_a = d phi / d x_a, as f's own backward gives it

and for every pair of inputs (a, b) and random u, v the number u^T (d g_a / d x_b) v is found three times:

    expected               from g_a at x_b + h v and x_b - h v, extrapolated over h (Richardson)
    reverse over reverse   <d<g_a, u> / d x_b, v>
    forward over reverse   <u, the tangent of g_a along v>

g_a itself is compared with differences of phi. Differences at several h tell how far they can be trusted, so that the
rounding of a float32 or bfloat16 function is not taken for an error, nor an error for rounding. Of a 16-bit function
they are taken in float32, where it takes that, too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .checks import check
from .second_order_probe import Problem, norm

FIRST, REVERSE, FORWARD = "first derivative", "reverse over reverse", "forward over reverse"
RIGHT, MISSING, WRONG, RAISES, UNCLEAR, UNSUPPORTED = "right", "missing", "wrong", "raises", "unclear", "unsupported"
PASSES = (RIGHT, UNSUPPORTED)
# Per dtype: the steps, of an input's root mean square, and the relative error that passes. float64's smallest steps are
# for functions with kinks.
STEPS = {
    torch.float64: (2**-6, 2**-8, 2**-10, 2**-18, 2**-20),
    torch.float32: (2**-3, 2**-5, 2**-7, 2**-9),
    torch.float16: (2**-2, 2**-3, 2**-4),
    torch.bfloat16: (2**-1, 2**-2, 2**-3),
}
TOLERANCES = {torch.float64: 1e-5, torch.float32: 5e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
TINY = 1e-300  # in place of a zero divisor


class SecondOrderError(ValueError):
    """A second derivative is wrong, or could not be shown to be right."""


@dataclass(frozen=True)
class Verdict:
    """What was found of d2 / d`first` d`second`: the gradient of `first`, differentiated along `second`."""

    first: str
    second: str
    mode: str
    expected: float  # root mean square over the probes
    found: float
    error: float  # of found, relative to expected
    verdict: str
    detail: str = ""

    def __str__(self) -> str:
        what = f"d/d{self.first}" if self.mode == FIRST else f"d2/d{self.first} d{self.second}"
        return f"{what} {'is ' if self.verdict != RAISES else ''}{self.verdict}{self.detail and ': ' + self.detail}"


@dataclass(frozen=True)
class SecondOrderReport:
    """All verdicts on one function. `ok`: every second derivative is right in every mode that the function supports."""

    name: str
    verdicts: tuple[Verdict, ...]
    noise: float  # by how much two equal calls differed, relative; 0 for a deterministic function

    @property
    def ok(self) -> bool:
        return all(v.verdict in PASSES for v in self.verdicts)

    def __str__(self) -> str:
        lines = [f"{self.name}: {'right' if self.ok else 'NOT RIGHT'}"]
        if self.noise:
            lines.append(f"not deterministic: two equal calls differ by {self.noise:.1e}")
        lines.append(f"{'derivative':24} {'mode':21} {'expected':>10} {'found':>10} {'error':>9}  verdict")
        for v in self.verdicts:
            what = f"d/d{v.first}" if v.mode == FIRST else f"d2/d{v.first} d{v.second}"
            numbers = f"{v.expected:10.3g} {v.found:10.3g} {v.error:9.1e}"
            lines.append(f"{what:24} {v.mode:21} {numbers}  {v.verdict}{v.detail and ': ' + v.detail}")
        return "\n".join(lines)

    def raise_if_wrong(self) -> None:
        """Raises SecondOrderError with one sentence that names what is not right."""
        bad = [v for v in self.verdicts if v.verdict not in PASSES]
        if bad:
            said = dict.fromkeys(f"{v} ({v.mode})" for v in bad)
            raise SecondOrderError(f"{self.name}: " + "; ".join(said))


def check_second_order(
    fn: Callable[..., Tensor],
    inputs: Sequence[Any],
    *,
    directions: int = 3,
    eps: float | None = None,
    tolerance: float | None = None,
    seed: int = 0,
) -> SecondOrderReport:
    """Compare the second derivatives that autograd finds of fn(*inputs), a tensor, with finite differences.

    inputs: floating tensors are differentiated, all of one dtype; whatever else is passed on as it is. directions:
    probes per input. eps: the largest step, relative to an input's root mean square; tolerance: the relative error that
    passes; both follow from the dtype. The report names the inputs as fn's signature does. `print` it, or call
    `raise_if_wrong`. Takes some 10 x directions x inputs gradients. Raises ValueError on inputs that cannot be checked.
    """
    check(directions >= 1, f"directions={directions}: must be 1 or more")
    problem = Problem(fn, inputs, directions, seed)
    steps = STEPS[problem.fine]
    steps = steps if eps is None else tuple(eps * step / steps[0] for step in steps)
    tolerance = TOLERANCES[problem.dtype] if tolerance is None else tolerance
    name = getattr(fn, "__name__", type(fn).__name__)
    try:
        base = problem.gradient(problem.x)
        again = problem.gradient(problem.x)
    except Exception as error:  # whatever fn raises is what is reported
        verdicts = [Verdict(n, "", FIRST, 0.0, 0.0, 0.0, RAISES, one_line(error)) for n in problem.names]
        return SecondOrderReport(name, tuple(verdicts), 0.0)
    size = sum(norm(g) for g in base)
    noise = sum(norm(a - b) for a, b in zip(base, again, strict=True)) / max(size, TINY)
    rounding, fine = (torch.finfo(dtype).eps / 2 + noise for dtype in (problem.dtype, problem.fine))
    judge = _Judge(tolerance, rounding, fine, steps)
    if noise > tolerance:
        detail = "two equal calls differ, so nothing can be told; fix its random numbers"
        verdicts = [Verdict(n, "", FIRST, 0.0, 0.0, noise, UNCLEAR, detail) for n in problem.names]
        return SecondOrderReport(name, tuple(verdicts), noise)
    return SecondOrderReport(name, tuple(verdicts_on(problem, judge, base)), noise)


def verdicts_on(problem: Problem, judge: "_Judge", base: list[Tensor]) -> list[Verdict]:
    """First the first derivatives, then every pair of inputs in both modes."""
    names, sizes = problem.names, [norm(g) for g in base]
    values, differences = problem.differences(judge.steps)
    linear_differences = cache(lambda: problem.differences(judge.steps, curved=False)[1])
    out = [
        judge.verdict((name, "", FIRST), of_phi, slope, problem.value_size())
        for name, of_phi, slope in zip(names, values, problem.slopes(base), strict=True)
    ]
    out += [
        Verdict(name, "", FIRST, 0.0, 0.0, 0.0, WRONG, "fn or its backward writes into it, and into what others read")
        for name in sorted(problem.written)
    ]

    def judged(a: int, b: int, mode: str, found: Tensor, linear: Tensor) -> Verdict:
        """linear: the same number where y is weighed by constants, so that only f's own curvature is in it."""
        labels = (names[a], names[b], mode)
        verdict = judge.verdict(labels, differences[a][b], found, sizes[a])
        if verdict.verdict == WRONG and not linear.any():
            own = judge.verdict(labels, linear_differences()[a][b], linear, sizes[a])
            if own.verdict == WRONG or not found.any():
                why = f"the gradient of {names[a]} takes {names[b]} for a constant"
                return replace(verdict, verdict=MISSING, detail=why)
        return verdict

    for a, first in enumerate(names):
        try:
            pairs = zip(problem.reverse(a, curved=True), problem.reverse(a, curved=False), strict=True)
            out += [judged(a, b, REVERSE, *pair) for b, pair in enumerate(pairs)]
        except Exception as error:  # whatever fn's backward raises is what is reported
            out += [Verdict(first, name, REVERSE, 0.0, 0.0, 0.0, RAISES, one_line(error)) for name in names]
    for b, second in enumerate(names):
        try:
            pairs = zip(problem.forward(b, curved=True), problem.forward(b, curved=False), strict=True)
            out += [judged(a, b, FORWARD, *pair) for a, pair in enumerate(pairs)]
        except Exception as error:  # it says so itself, so nothing is wrong in silence
            out += [Verdict(name, second, FORWARD, 0.0, 0.0, 0.0, UNSUPPORTED, one_line(error)) for name in names]
    return out


class _Judge:
    """Turns expected and found numbers into a verdict; rounding: the relative errors of what is found, and expected."""

    def __init__(self, tolerance: float, rounding: float, fine: float, steps: Sequence[float]):
        self.tolerance, self.rounding, self.fine, self.steps = tolerance, rounding, fine, steps

    def expected(self, differences: Tensor, size: float) -> tuple[Tensor, float]:
        """The best extrapolation of central differences [steps, ...], and how far it can be trusted.

        A next pair of steps should agree; and differences of numbers of that size are rounded.
        """
        ratios = [(h / smaller) ** 2 for h, smaller in pairwise(self.steps)]
        better = [
            (ratio * near - far) / (ratio - 1) for ratio, (far, near) in zip(ratios, pairwise(differences), strict=True)
        ]
        doubts = [
            3 * (norm(after - before) + self.fine * size / h)
            for (before, after), h in zip(pairwise(better), self.steps[2:], strict=True)
        ]
        doubt = min(doubts)
        return better[doubts.index(doubt) + 1], doubt

    def verdict(self, labels: tuple[str, str, str], differences: Tensor, found: Tensor, size: float) -> Verdict:
        """differences [steps, ...], found [...]; size: of what the differences are taken of."""
        count = found.numel() ** 0.5
        natural = size * count
        expected, doubt = self.expected(differences, natural)
        doubt += 4 * self.rounding * natural
        off, whole = norm(found - expected), max(norm(expected), norm(found))
        error = off / (norm(expected) if norm(expected) > doubt else max(whole, doubt, TINY))
        numbers = (norm(expected) / count, norm(found) / count, error)
        if not torch.isfinite(found).all() or not torch.isfinite(expected).all():
            return Verdict(*labels, *numbers, WRONG, "not finite")
        if off <= self.tolerance * whole:
            return Verdict(*labels, *numbers, RIGHT)
        if off <= self.tolerance * whole + doubt:
            if doubt > self.tolerance * max(whole, natural):
                return Verdict(*labels, *numbers, UNCLEAR, "the differences do not settle; another eps may do")
            return Verdict(*labels, *numbers, RIGHT)
        factor = float((found * expected).sum() / expected.square().sum())
        if norm(found - factor * expected) <= 0.05 * norm(found):
            return Verdict(*labels, *numbers, WRONG, f"{factor:.3g} times what it should be")
        return Verdict(*labels, *numbers, WRONG, f"off by {100 * error:.3g} %")


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"[:160]
