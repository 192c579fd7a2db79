"""Meta-learning an initialisation and the learning rate of every step, by exact hypergradients (Meta-SGD's idea).

A task is a sine wave of unknown amplitude and phase (MAML, arXiv 1703.03400, section 5.1), seen through a stream of
noisy points. A small network adapts to it in N SGD steps, each on the next few points; its error is then measured on
clean ones. Both what it starts from and the rates can be learned through the unrolled steps:

    min over theta_0, lr_1..lr_N of  E_task[ error(theta_N) ],    theta_{n+1} = theta_n - lr_n grad l(theta_n, points_n)

MAML learns theta_0, Meta-SGD (arXiv 1707.09835) rates too. Here `unrolled_sgd` gives the gradients with respect to
both: first theta_0 at a fixed rate, then, from that same theta_0, the N rates. The rival is the best fixed rate of a
grid of 16, found on the validation tasks, from the same theta_0 at the same N. What is learned is a decay, as it should
be: early steps move fast, late ones average the noise out.

    python examples/maml_learning_rates.py [--seed 1] [--out runs/examples/maml_learning_rates] [--quick]

Prints errors on held-out tasks; draws rates.png. All tasks adapt in one batch: their weights are a tree with a leading
axis, and the gradient of the summed loss is each task's own. M tasks, N steps, K points a step.
"""

import argparse
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Generator, Tensor

from nacd_fast import unrolled_sgd

Theta = dict[str, Tensor]  # of every task: a leading axis [M, ...]
Points = tuple[Tensor, Tensor]  # x, y [M, K, 1]

STEPS, POINTS, NOISE = 10, 4, 1.0  # N, K, deviation of the noise on y
QUERY, BATCH, HELD_OUT = 20, 16, 1000  # clean points that measure a task; tasks of an iteration, of an evaluation
FIRST_RATE = 0.01  # what theta_0 is learned with
GRID = [0.002 * 1.25**i for i in range(16)]  # 0.002 .. 0.057
THETA_RATE, LOG_RATE_RATE = 0.005, 0.08  # of Adam


def first_weights(width: int, g: Generator) -> Theta:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g) / math.sqrt(shape[0])

    weights = {"in": normal(1, width), "mid": normal(width, width), "out": normal(width, 1)}
    return weights | {f"{name} bias": torch.zeros(1, w.shape[1]) for name, w in weights.items()}


def network(theta: Theta, x: Tensor) -> Tensor:
    """x [M, K, 1] -> y [M, K, 1], each task by its own weights."""
    x = torch.tanh(torch.baddbmm(theta["in bias"], x, theta["in"]))
    x = torch.tanh(torch.baddbmm(theta["mid bias"], x, theta["mid"]))
    return torch.baddbmm(theta["out bias"], x, theta["out"])


def errors(theta: Theta, points: Points) -> Tensor:
    """Mean squared error of every task [M]."""
    x, y = points
    return (network(theta, x) - y).square().mean((1, 2))


def inner_loss(theta: Theta, points: Points) -> Tensor:
    return errors(theta, points).sum()


def draw_tasks(count: int, g: Generator) -> tuple[list[Points], Points]:
    """The noisy points of every step, and the clean ones."""
    amplitude = 0.1 + 4.9 * torch.rand(count, 1, 1, generator=g)
    phase = math.pi * torch.rand(count, 1, 1, generator=g)
    x = 10 * torch.rand(count, STEPS * POINTS + QUERY, 1, generator=g) - 5
    y = amplitude * torch.sin(x - phase)
    (seen_x, query_x), (seen_y, query_y) = (t.split([STEPS * POINTS, QUERY], 1) for t in (x, y))
    seen_y = seen_y + NOISE * torch.randn(seen_y.shape, generator=g)
    return list(zip(seen_x.split(POINTS, 1), seen_y.split(POINTS, 1), strict=True)), (query_x, query_y)


def adapt(theta0: Theta, rates: Tensor | float, stream: list[Points]) -> Theta:
    """Weights [M, ...] after N steps from one theta0; rates: one, or [N]."""
    tasks = len(stream[0][0])
    return unrolled_sgd(inner_loss, {name: w.expand(tasks, *w.shape) for name, w in theta0.items()}, rates, stream)


def meta_train(
    theta0: Theta, log_rates: Tensor, learned: Iterable[Tensor], rate: float, iterations: int, g: Generator
) -> None:
    """Adam on the `learned` ones of theta0 and log_rates, in place; its own rate decays to 0."""
    parameters = [p.requires_grad_() for p in learned]
    adam = torch.optim.Adam(parameters, rate)
    decay = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, iterations)
    for _ in range(iterations):
        stream, query = draw_tasks(BATCH, g)
        adam.zero_grad()
        errors(adapt(theta0, log_rates.exp(), stream), query).mean().backward()
        adam.step()
        decay.step()
    for p in parameters:
        p.requires_grad_(False)


@torch.no_grad()
def evaluate(theta0: Theta, rates: Tensor | float, g: Generator) -> Tensor:
    """The error on every one of HELD_OUT tasks."""
    stream, query = draw_tasks(HELD_OUT, g)
    return errors(adapt(theta0, rates, stream), query)


@torch.no_grad()
def draw(path: Path, theta0: Theta, fixed: float, rates: Tensor, on_grid: list[float], learned: float) -> None:
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    steps, scores, task = figure.subplots(1, 3)
    steps.plot(range(1, STEPS + 1), rates, "o-", label="learned")
    steps.axhline(fixed, color="C1", label="best fixed")
    steps.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    steps.legend()
    scores.semilogx(GRID, on_grid, "o-", color="C1", label="fixed")
    scores.axhline(learned, label="learned")
    scores.set(xlabel="learning rate", ylabel="error on validation tasks", ylim=(0, 3 * learned))
    scores.legend()
    stream, _ = draw_tasks(1, Generator().manual_seed(5))
    x = torch.linspace(-5, 5, 200).view(1, -1, 1)
    task.plot(*(torch.cat(t, 1).flatten() for t in zip(*stream, strict=True)), ".", color="grey", label="points seen")
    for label, r, style in (("theta_0", 0.0, "k:"), ("best fixed", fixed, "C1"), ("learned", rates, "C0")):
        task.plot(x.flatten(), network(adapt(theta0, r, stream), x).flatten(), style, label=label)
    task.set(xlabel="x", ylabel="y, a held-out task")
    task.legend()
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/examples/maml_learning_rates"), help="folder")
    parser.add_argument("--quick", action="store_true", help="a few seconds: fewer iterations")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # the tensors are too small to share
    for_theta, for_rates = (60, 30) if args.quick else (250, 120)

    g = Generator().manual_seed(args.seed)
    theta0 = first_weights(40, g)
    random = {name: w.clone() for name, w in theta0.items()}
    log_rates = torch.full((STEPS,), math.log(FIRST_RATE))
    meta_train(theta0, log_rates, theta0.values(), THETA_RATE, for_theta, g)

    def validation() -> Generator:
        return Generator().manual_seed(1)

    on_grid = [evaluate(theta0, rate, validation()).mean().item() for rate in GRID]
    fixed = GRID[min(range(len(GRID)), key=on_grid.__getitem__)]
    log_rates.fill_(math.log(fixed))
    meta_train(theta0, log_rates, [log_rates], LOG_RATE_RATE, for_rates, g)
    rates = log_rates.exp()

    rows = {
        "random start, same fixed rate": evaluate(random, fixed, Generator().manual_seed(2)),
        "learned start, best fixed rate": evaluate(theta0, fixed, Generator().manual_seed(2)),
        "learned start and rates": evaluate(theta0, rates, Generator().manual_seed(2)),
    }
    print(f"squared error on {HELD_OUT} held-out tasks after {STEPS} steps (mean ± standard error)")
    for name, x in rows.items():
        print(f"  {name:32} {x.mean():.3f} ± {x.std() / math.sqrt(HELD_OUT):.3f}")
    _, before, after = rows.values()
    gain, spread = (before - after).mean().item(), (before - after).std().item() / math.sqrt(HELD_OUT)
    print(f"  task by task, learned rates save {gain:.3f} ± {spread:.3f}")
    print(f"best fixed rate {fixed:.4f}; learned {', '.join(f'{r:.4f}' for r in rates.tolist())}")

    args.out.mkdir(parents=True, exist_ok=True)
    learned = evaluate(theta0, rates, validation()).mean().item()
    draw(args.out / "rates.png", theta0, fixed, rates, on_grid, learned)
    print(f"picture: {args.out / 'rates.png'}")
    means = dict(zip(("random", "fixed", "learned"), (x.mean().item() for x in rows.values()), strict=True))
    return means | {"gain": gain, "spread": spread, "first rate": rates[0].item(), "last rate": rates[-1].item()}


if __name__ == "__main__":
    main()
