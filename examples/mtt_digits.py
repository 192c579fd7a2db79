"""Dataset distillation by trajectory matching: a learned image a class trains a ConvNet on handwritten digits.

Experts train on all real digits and leave a snapshot of their weights after every epoch. A student starts from a
snapshot theta_t, takes N steps on the distilled images alone, and should arrive where the expert is some epochs later:

    L = ||theta_N - theta_{t+SPAN}||^2 / ||theta_t - theta_{t+SPAN}||^2        (MTT, arXiv 2203.11932)

`unrolled_sgd` gives dL/d(images) and dL/d(learning rate): exact, with the activations of one step whatever N is. The
released MTT code retains the graph of all N steps instead, and its memory grows with N; both are measured here.

    python examples/mtt_digits.py [--per-class 2] [--seed 1] [--out runs/examples/mtt_digits] [--quick]

Prints the test accuracy of new networks that were trained on the distilled images, on as many real ones drawn at random
(at the best of three learning rates, chosen on the test set, in their favour) and on all; draws digits.png. B images,
C channels, P weights.
"""

import argparse
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Generator, Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nacd_fast import unrolled_sgd
from nacd_kernels import layer_norm, relu

Theta = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]  # images [B, 1, 8, 8], labels [B]

TRAIN = 1000  # of 1,797 digits; the rest is the test set
EPOCHS, BATCH, EXPERT_RATE = 10, 50, 0.1
STEPS, SPAN, STARTS = 10, 2, 8  # N; epochs from start to target; starts are the first so many epochs
IMAGE_RATE, LOG_RATE_RATE = 0.1, 0.02  # of Adam, for the images and for the logarithm of the student's learning rate
EVALUATION_STEPS, RANDOM_RATES = 60, (0.03, 0.1, 0.3)


def first_weights(g: Generator) -> Theta:
    """He's initialisation (arXiv 1502.01852) of two 3 x 3 convolutions and a linear layer."""
    shapes = {"conv1": (16, 1, 3, 3), "conv2": (32, 16, 3, 3), "linear": (10, 32 * 2 * 2)}
    weights = {k: torch.randn(s, generator=g) * math.sqrt(2 / math.prod(s[1:])) for k, s in shapes.items()}
    return weights | {"bias": torch.zeros(10)}


def network(theta: Theta, x: Tensor) -> Tensor:
    """x [B, 1, 8, 8] -> logits [B, 10]."""
    for name in ("conv1", "conv2"):
        x = F.conv2d(x, theta[name], padding=1)
        x = relu(layer_norm(x.flatten(2), None, None)).view_as(x)  # over each channel's pixels: instance norm
        x = F.avg_pool2d(x, 2)
    return F.linear(x.flatten(1), theta["linear"], theta["bias"])


def inner_loss(theta: Theta, batch: Batch) -> Tensor:
    images, labels = batch
    return F.cross_entropy(network(theta, images), labels)


def flat(theta: Theta) -> Tensor:
    return torch.cat([w.flatten() for w in theta.values()])


def load() -> tuple[Batch, Batch]:
    """Training and test set, shuffled; pixels of mean 0 and deviation 1."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=Generator().manual_seed(0))
    x, y = torch.tensor(digits.images, dtype=torch.float32)[order, None], torch.tensor(digits.target)[order]
    x = (x - x[:TRAIN].mean()) / x[:TRAIN].std()
    return (x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:])


@torch.no_grad()
def expert(data: Batch, g: Generator) -> list[Theta]:
    """The weights before training and after every epoch."""
    snapshots = [first_weights(g)]
    for _ in range(EPOCHS):
        batches = [(data[0][rows], data[1][rows]) for rows in torch.randperm(TRAIN, generator=g).split(BATCH)]
        snapshots.append(unrolled_sgd(inner_loss, snapshots[-1], EXPERT_RATE, batches))
    return snapshots


def pick(data: Batch, per_class: int, g: Generator) -> Tensor:
    """Random images of every class [10 per_class, 1, 8, 8], class after class."""
    of_class = [data[0][data[1] == c] for c in range(10)]
    return torch.cat([x[torch.randperm(len(x), generator=g)[:per_class]] for x in of_class])


def distil(
    images: Tensor, labels: Tensor, experts: list[list[Theta]], iterations: int, g: Generator
) -> tuple[Tensor, float, list[float]]:
    """The learned images, the learned rate, and L of every iteration."""
    images = images.clone().requires_grad_()
    log_rate = torch.tensor(math.log(EXPERT_RATE), requires_grad=True)
    adam = torch.optim.Adam([{"params": [images], "lr": IMAGE_RATE}, {"params": [log_rate], "lr": LOG_RATE_RATE}])
    curve = []
    for _ in range(iterations):
        snapshots = experts[int(torch.randint(len(experts), (), generator=g))]
        t = int(torch.randint(STARTS, (), generator=g))
        theta = unrolled_sgd(inner_loss, snapshots[t], log_rate.exp(), [(images, labels)] * STEPS)
        start, target = flat(snapshots[t]), flat(snapshots[t + SPAN])
        loss = (flat(theta) - target).square().sum() / (start - target).square().sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        curve.append(loss.item())
    return images.detach(), log_rate.exp().item(), curve


@torch.no_grad()
def accuracy(theta: Theta, data: Batch) -> float:
    return (network(theta, data[0]).argmax(-1) == data[1]).float().mean().item()


@torch.no_grad()
def accuracies(pick_images: Callable[[Generator], Tensor], rate: float, test: Batch, seeds: int) -> Tensor:
    """Test accuracy of new networks, each trained on the images picked for its seed; [seeds]."""
    found = []
    for seed in range(seeds):
        g = Generator().manual_seed(1000 + seed)
        images = pick_images(g)
        batch = images, torch.arange(10).repeat_interleave(len(images) // 10)
        theta = unrolled_sgd(inner_loss, first_weights(g), rate, [batch] * EVALUATION_STEPS)
        found.append(accuracy(theta, test))
    return torch.tensor(found)


class LiveBytes(TorchDispatchMode):
    """`peak`: the most bytes that the tensors made in here held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        results = op(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(results) if isinstance(x, Tensor)):
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return results

    def free(self, storage: int, size: int) -> None:
        self.known.remove(storage)
        self.live -= size


def retained_sgd(loss: Callable[[Theta, Batch], Tensor], theta: Theta, rate: Tensor, batches: list[Batch]) -> Theta:
    """What `unrolled_sgd` computes, as autograd alone does it: every step's graph is kept."""
    theta = {name: w.detach().requires_grad_() for name, w in theta.items()}
    for batch in batches:
        grads = torch.autograd.grad(loss(theta, batch), list(theta.values()), create_graph=True)
        theta = {name: w - rate * grad for (name, w), grad in zip(theta.items(), grads, strict=True)}
    return theta


def compare_memory(images: Tensor, labels: Tensor, rate: float, steps: int) -> dict[str, float]:
    """Peak bytes of one hypergradient both ways, and how far the two are apart."""
    theta0, found, grads = first_weights(Generator().manual_seed(0)), {}, []
    for name, unroll in (("flat", unrolled_sgd), ("retained", retained_sgd)):
        x = images.clone().requires_grad_()
        with LiveBytes() as memory:
            theta = unroll(inner_loss, theta0, torch.tensor(rate), [(x, labels)] * steps)
            grads.append(torch.autograd.grad(flat(theta).square().sum(), x)[0])
            del theta
        found[f"{name} N={steps}"] = float(memory.peak)
    return found | {f"apart N={steps}": float((grads[0] - grads[1]).norm() / grads[1].norm())}


def draw(path: Path, learned: Tensor, real: Tensor, curve: list[float]) -> None:
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.1, 1))[:, 0]
    sides = top.subfigures(1, 2, squeeze=False)[0]
    for part, title, images in zip(sides, ("distilled", "real"), (learned, real), strict=True):
        part.suptitle(title)
        axes = part.subplots(len(images) // 10, 10, squeeze=False)
        for ax, image in zip(axes.T.flat, images[:, 0], strict=True):
            ax.imshow(image, cmap="gray")
            ax.axis("off")
    axes = bottom.subplots()
    axes.plot(curve)
    axes.set(xlabel="iteration", ylabel="matching loss L", ylim=(0, None))
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-class", type=int, default=1, help="distilled images of each digit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/examples/mtt_digits"), help="folder of the picture")
    parser.add_argument("--quick", action="store_true", help="a few seconds: fewer experts, iterations and seeds")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # the tensors are too small to share
    n_experts, iterations, seeds = (2, 20, 3) if args.quick else (5, 100, 5)

    train, test = load()
    g = Generator().manual_seed(args.seed)
    experts = [expert(train, g) for _ in range(n_experts)]
    labels = torch.arange(10).repeat_interleave(args.per_class)
    real = pick(train, args.per_class, g)
    images, rate, curve = distil(real, labels, experts, iterations, g)

    by_rate = [accuracies(lambda g: pick(train, args.per_class, g), r, test, seeds) for r in RANDOM_RATES]
    rows = {
        f"{len(images)} random real images": max(by_rate, key=lambda x: x.mean().item()),
        f"{len(images)} distilled images": accuracies(lambda g: images, rate, test, seeds),
        f"all {TRAIN} images": torch.tensor([accuracy(snapshots[-1], test) for snapshots in experts]),
    }
    print(f"test accuracy, % (mean ± standard deviation of new networks; learned rate {rate:.3g})")
    for name, x in rows.items():
        print(f"  {name:24} {100 * x.mean():5.1f} ± {100 * x.std():.1f}")

    memory: dict[str, float] = {}
    print("peak memory of one hypergradient, MB")
    for steps in (STEPS, 2 * STEPS):
        memory |= compare_memory(images, labels, rate, steps)
        found = [memory[f"{name} N={steps}"] / 1e6 for name in ("flat", "retained")]
        apart = memory[f"apart N={steps}"]
        print(f"  N = {steps:<3} unrolled_sgd {found[0]:5.1f}   create_graph {found[1]:5.1f}   apart by {apart:.0e}")

    args.out.mkdir(parents=True, exist_ok=True)
    draw(args.out / "digits.png", images, real, curve)
    print(f"picture: {args.out / 'digits.png'}")
    means = dict(zip(("random", "distilled", "full"), (x.mean().item() for x in rows.values()), strict=True))
    return means | memory | {"first loss": curve[0], "last loss": curve[-1]}


if __name__ == "__main__":
    main()
