"""Dataset distillation for text: one synthetic sentence a class trains a transformer that sorts instructions by kind.

The data are the 1,565 short instructions of six kinds in this package's demo (Dolly-15k and P3; nacd_fast/demo/NOTICE),
as rows of the demo model's embedding table. A distilled sentence is S free embeddings. A new, random student takes N
steps on the six of them alone; they are learned such that its loss on real sentences is low afterwards:

    min over x, lr of  E_theta_0[ l(theta_N, real batch) ],    theta_{n+1} = theta_n - lr grad l(theta_n, x)

`unrolled_sgd` differentiates through the N steps exactly; the student is made of ops of `nacd_kernels`, whose second
derivatives are right (PyTorch's own silu, for one, has none in forward mode).

    python examples/text_classification.py [--seed 1] [--out runs/examples/text_classification] [--quick]

Prints the accuracy of new students on test sentences, the mean over the kinds: trained on the distilled sentences, on
the tokens nearest to them, on as many real sentences drawn at random (at the best of several rates and numbers of
steps, chosen on the test set, in their favour) and on all. Prints what the sentences read like; draws accuracy.png.
B sentences, T tokens, D features, H heads.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Generator, Tensor

import nacd_fast
from nacd_fast import unrolled_sgd
from nacd_kernels import flash_attention, linear_cross_entropy, nearest_embedding, rms_norm, silu_mul

Theta = dict[str, Tensor]
Batch = tuple[Tensor, Tensor, Tensor]  # embeddings [B, T, D], 1 where there is a token [B, T], labels [B]
Split = tuple[Tensor, Tensor]  # ids [B, T], 0 where there is no token; labels [B]

DEMO = Path(nacd_fast.__file__).parent / "demo"
KINDS = {  # how the `source` of a row begins
    "dolly/open_qa": "open question",
    "dolly/classification": "which of these is",
    "p3/common_gen": "sentence from words",
    "p3/kilt_tasks_hotpotqa": "two facts combined",
    "p3/commonsense_qa": "common sense",
    "p3/glue_qqp": "duplicate questions",
}
TOKENS, LENGTH = 24, 20  # T of real sentences, longer ones are cut; S of distilled ones
D, H, FFN = 128, 4, 64
STEPS, PER_KIND = 5, 8  # N; real sentences of each kind in the outer batch
EMBEDDING_RATE, LOG_RATE_RATE = 0.05, 0.03  # of Adam, for the embeddings and for the logarithm of the learning rate
FIRST_RATE = 0.3
RANDOM_RATES, RANDOM_STEPS = (0.1, 0.3, 1.0), (STEPS, 40)
FULL_RATE, FULL_STEPS = 0.3, 100


def first_weights(g: Generator) -> Theta:
    shapes = dict.fromkeys(("q", "k", "v", "o"), (D, D)) | {"gate": (FFN, D), "up": (FFN, D), "down": (D, FFN)}
    return {name: torch.randn(shape, generator=g) / math.sqrt(shape[1]) for name, shape in shapes.items()}


HEAD = torch.randn(len(KINDS), D, generator=Generator().manual_seed(0)) / math.sqrt(D)  # frozen: a direction a kind


def features(theta: Theta, x: Tensor, mask: Tensor) -> Tensor:
    """One block of a Llama without positions, averaged over the tokens: x [B, T, D] -> [B, D]."""
    x = rms_norm(x, None)
    q, k, v = ((x @ theta[name].T).unflatten(-1, (H, -1)).transpose(1, 2) for name in ("q", "k", "v"))
    x = x + flash_attention(q, k, v).transpose(1, 2).flatten(2) @ theta["o"].T
    normed = rms_norm(x, None)
    x = x + silu_mul(normed @ theta["gate"].T, normed @ theta["up"].T) @ theta["down"].T
    return rms_norm((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), None)


def inner_loss(theta: Theta, batch: Batch) -> Tensor:
    x, mask, labels = batch
    return linear_cross_entropy(features(theta, x, mask), HEAD, labels)


def load(tokenizer: Tokenizer, split: str) -> Split:
    ids, labels = [], []
    for line in (DEMO / "data" / f"{split}.jsonl").read_text().splitlines():
        row = json.loads(line)
        for label, source in enumerate(KINDS):
            if row["source"].startswith(source):
                found = tokenizer.encode(row["messages"][0]["content"], add_special_tokens=False).ids[:TOKENS]
                ids.append(found + [0] * (TOKENS - len(found)))
                labels.append(label)
    return torch.tensor(ids), torch.tensor(labels)


def pick(data: Split, per_kind: int, g: Generator, shortest: int = 1) -> Split:
    """Random sentences of every kind, of at least `shortest` tokens."""
    ids, labels = data
    rows = []
    for kind in range(len(KINDS)):
        of_kind = ((labels == kind) & ((ids > 0).sum(1) >= shortest)).nonzero().squeeze(1)
        rows.append(of_kind[torch.randint(len(of_kind), (per_kind,), generator=g)])
    return ids[torch.cat(rows)], labels[torch.cat(rows)]


def embed(data: Split, table: Tensor) -> Batch:
    return table[data[0]], (data[0] > 0).float(), data[1]


def distilled(x: Tensor) -> Batch:
    """A batch of the distilled sentences x [kinds, S, D]: all tokens count."""
    return x, torch.ones(x.shape[:2]), torch.arange(len(KINDS))


def distil(
    first: Tensor, train: Split, table: Tensor, iterations: int, g: Generator
) -> tuple[Tensor, float, list[float]]:
    """The learned sentences [kinds, S, D], the learned rate, and the outer loss of every iteration."""
    x = first.clone().requires_grad_()
    log_rate = torch.tensor(math.log(FIRST_RATE), requires_grad=True)
    adam = torch.optim.Adam([{"params": [x], "lr": EMBEDDING_RATE}, {"params": [log_rate], "lr": LOG_RATE_RATE}])
    decay = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, iterations)
    curve = []
    for _ in range(iterations):
        theta = unrolled_sgd(inner_loss, first_weights(g), log_rate.exp(), [distilled(x)] * STEPS)
        loss = inner_loss(theta, embed(pick(train, PER_KIND, g), table))
        adam.zero_grad()
        loss.backward()
        adam.step()
        decay.step()
        curve.append(loss.item())
    return x.detach(), log_rate.exp().item(), curve


@torch.no_grad()
def accuracies(batches: Callable[[Generator], list[Batch]], rate: float, test: Batch, seeds: int) -> Tensor:
    """Test accuracy, the mean over the kinds, of new students, each trained on its own batches; [seeds]."""
    found = []
    for seed in range(seeds):
        g = Generator().manual_seed(1000 + seed)
        theta = unrolled_sgd(inner_loss, first_weights(g), rate, batches(g))
        right = (features(theta, *test[:2]) @ HEAD.T).argmax(-1) == test[2]
        found.append(torch.stack([right[test[2] == kind].float().mean() for kind in range(len(KINDS))]).mean())
    return torch.stack(found)


def draw(path: Path, rows: dict[str, Tensor], curve: list[float]) -> None:
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    bars, losses = figure.subplots(1, 2)
    bars.barh(
        list(rows), [100 * x.mean().item() for x in rows.values()], xerr=[100 * x.std().item() for x in rows.values()]
    )
    bars.invert_yaxis()
    bars.set(xlabel="accuracy on test sentences, %", xlim=(0, 100))
    losses.plot(curve)
    losses.set(xlabel="iteration", ylabel=f"loss on real sentences after {STEPS} steps", ylim=(0, None))
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/examples/text_classification"), help="folder")
    parser.add_argument("--quick", action="store_true", help="a few seconds: fewer iterations and seeds")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # the tensors are too small to share
    iterations, seeds = (25, 3) if args.quick else (100, 5)

    tokenizer = Tokenizer.from_file(str(DEMO / "model" / "tokenizer.json"))
    table = load_file(DEMO / "model" / "model.safetensors")["model.embed_tokens.weight"].float()
    train, test = load(tokenizer, "train"), embed(load(tokenizer, "test"), table)
    g = Generator().manual_seed(args.seed)
    first_ids = pick(train, 1, g, shortest=LENGTH)[0][:, :LENGTH]
    x, rate, curve = distil(table[first_ids], train, table, iterations, g)
    special = torch.tensor(
        [token.startswith("<") for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda t: t[1])]
    )
    tokens = nearest_embedding(x.flatten(0, 1), table, banned=special)[0].view_as(first_ids)

    def random_real(steps: int) -> Callable[[Generator], list[Batch]]:
        return lambda g: [embed(pick(train, 1, g), table)] * steps

    by_setting = [accuracies(random_real(n), r, test, seeds) for r in RANDOM_RATES for n in RANDOM_STEPS]
    everything = accuracies(lambda g: [embed(pick(train, 8, g), table) for _ in range(FULL_STEPS)], FULL_RATE, test, 2)
    rows = {
        f"{len(x)} random real sentences": max(by_setting, key=lambda x: x.mean().item()),
        f"{len(x)} distilled, as nearest tokens": accuracies(
            lambda g: [distilled(table[tokens])] * STEPS, rate, test, seeds
        ),
        f"{len(x)} distilled sentences": accuracies(lambda g: [distilled(x)] * STEPS, rate, test, seeds),
        f"all {len(train[0])} sentences": everything,
    }
    print(f"test accuracy, % (mean ± standard deviation of new students; {len(KINDS)} kinds; learned rate {rate:.3g})")
    for name, a in rows.items():
        print(f"  {name:32} {100 * a.mean():5.1f} ± {100 * a.std():.1f}")
    print("the distilled sentences, as nearest tokens")
    for kind, ids in zip(KINDS.values(), tokens.tolist(), strict=True):
        print(f"  {kind:20} {tokenizer.decode(ids)!r}")

    args.out.mkdir(parents=True, exist_ok=True)
    draw(args.out / "accuracy.png", rows, curve)
    print(f"picture: {args.out / 'accuracy.png'}")
    return dict(zip(("random", "decoded", "distilled", "full"), (a.mean().item() for a in rows.values()), strict=True))


if __name__ == "__main__":
    main()
