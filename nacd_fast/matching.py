"""Algorithm 1: prompt embeddings, and a learning rate, that move the student as the full set moved the experts.

For S iterations: draw an expert and a start t before epoch T^m, set the student to theta*_t, take N student steps on
batches of kept samples with their prompts in front (equation 1), and lower

    L = ||theta_N - theta*_{t+M}||^2 / ||theta*_t - theta*_{t+M}||^2                      (equation 2, L_distill)
      + beta / N sum_n mean ||p_n - its nearest token||                                   (equations 3 and 4, L_reg)

with respect to the prompts and log alpha, by Adam. Only the prompts drawn in an iteration move: each has its own count
of updates, so that a prompt first met late is corrected for Adam's zero start as the first was.

    <folder>/prompts.safetensors   prompts [n, k, D] float32, in the order of the kept samples
    <folder>/curve.json            loss, distill, reg, alpha of every iteration
    <folder>/summary.json          the last alpha, the means of the first and last tenth of the curve
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from nacd_kernels import nearest_embedding

from .artifacts import folder_digest, open_stage, read_json, write_atomic, write_json
from .config import DataConfig, ExpertConfig, MatchConfig, ModelConfig
from .data import Encoded, Packed, encode_set, pack
from .decode import banned_ids
from .errors import InputError, NonFiniteError
from .examples import Example, digest
from .experts import TRAJECTORY, steps_per_epoch, total_steps
from .progress import progress_bar
from .store import TrajectoryStore
from .store.decoder import Caches
from .store.prefetch import Prefetch
from .store.reader import CACHE_BYTES
from .student import Student, add_lora, load_model, max_positions, model_digest
from .training import check_batch, check_lengths, data_settings, model_settings
from .unroll import unrolled_sgd
from .updates import SGD, AdamW, Update

UPDATES: dict[str, Update] = {"sgd": SGD(), "momentum": SGD(momentum=0.9), "adamw": AdamW()}
BETAS, EPS = (0.9, 0.999), 1e-8
CURVE = ("loss", "distill", "reg", "alpha")


@dataclass(frozen=True)
class Segment:
    """A start and a target on one expert's trajectory."""

    expert: int
    start: int
    target: int


@dataclass(frozen=True)
class Draw:
    """What chance decides in one iteration, and the generator's state after it."""

    segment: Segment
    rows: Tensor  # of the kept samples, for every step [N, batch]
    after: Tensor


@dataclass(frozen=True)
class Ready:
    """All that an iteration reads."""

    draw: Draw
    start: Tensor  # theta*_t [P], on the student's device
    target: Tensor  # theta*_{t+M} [P]


def check_starts(config: MatchConfig, experts: ExpertConfig, samples: int) -> None:
    """Raise InputError where T^m or M reach beyond the experts' last step, or no two snapshots are M steps apart."""
    per_epoch = steps_per_epoch(samples, experts.batch)
    last = total_steps(experts, per_epoch)
    span = config.span_steps or per_epoch
    reach = (config.max_start_epoch - 1) * per_epoch + span
    if reach > last:
        raise InputError(
            f"match.max_start_epoch={config.max_start_epoch} with a span of {span} steps reaches step {reach}, "
            f"beyond the experts' last snapshot at {last}: train the experts longer or lower it"
        )
    steps = {
        n for n in range(last + 1) if n % per_epoch == 0 or (experts.snapshot_steps and n % experts.snapshot_steps == 0)
    }
    if not any(t + span in steps for t in steps if t < config.max_start_epoch * per_epoch):
        raise InputError(
            f"match.span_steps={config.span_steps}: no two of the experts' snapshots are so many steps apart; "
            f"set experts.snapshot_steps={experts.snapshot_steps} to a divisor of it"
        )


def segments(experts: Sequence[Path], stores: Sequence[TrajectoryStore], config: MatchConfig) -> list[Segment]:
    """Every start before epoch T^m whose target, M steps on, is stored."""
    found: list[Segment] = []
    for i, (folder, store) in enumerate(zip(experts, stores, strict=True)):
        per_epoch, steps = read_json(folder / "schedule.json")["steps_per_epoch"], set(store.steps)
        span = config.span_steps or per_epoch
        found += [
            Segment(i, t, t + span)
            for t in sorted(steps)
            if t < config.max_start_epoch * per_epoch and t + span in steps
        ]
    if not found:
        raise InputError(
            f"match.span_steps={config.span_steps}: no two snapshots of {experts[0]} before epoch "
            f"match.max_start_epoch={config.max_start_epoch} are so many steps apart"
        )
    return found


@dataclass
class Learned:
    """What is learned, with Adam's moments, the random state and the curve so far: all that a resume needs."""

    prompts: Tensor  # [n, k, D]
    log_alpha: Tensor  # [1]
    moments: list[Tensor]  # of the prompts, first and second, then of log alpha
    counts: Tensor  # [n + 1] updates of each prompt, and of alpha
    generator: torch.Generator
    curve: Tensor  # [iterations done, 4] float64

    def tensors(self) -> dict[str, Tensor]:
        named = {f"moment{i}": t for i, t in enumerate(self.moments)}
        named |= {"prompts": self.prompts, "log_alpha": self.log_alpha, "counts": self.counts, "curve": self.curve}
        return {name: t.detach().cpu().contiguous() for name, t in named.items()} | {
            "generator": self.generator.get_state()
        }

    @classmethod
    def start(cls, prompts: Tensor, alpha: float, seed: int) -> "Learned":
        log_alpha = torch.tensor([alpha], device=prompts.device).log()
        moments = [torch.zeros_like(t) for t in (prompts, prompts, log_alpha, log_alpha)]
        counts = torch.zeros(len(prompts) + 1, dtype=torch.int64, device=prompts.device)
        return cls(
            prompts,
            log_alpha,
            moments,
            counts,
            torch.Generator().manual_seed(seed),
            torch.zeros(0, 4, dtype=torch.float64),
        )

    @classmethod
    def load(cls, path: Path, device: torch.device) -> "Learned":
        with safe_open(path, "pt") as f:
            read = {name: f.get_tensor(name) for name in f.keys()}
        generator = torch.Generator()
        generator.set_state(read["generator"])
        moments = [read[f"moment{i}"].to(device) for i in range(4)]
        return cls(
            read["prompts"].to(device),
            read["log_alpha"].to(device),
            moments,
            read["counts"].to(device),
            generator,
            read["curve"],
        )


def adam_step(x: Tensor, grad: Tensor, moments: tuple[Tensor, Tensor], rows: Tensor, counts: Tensor, lr: float) -> None:
    """Adam (arXiv 1412.6980) on the rows of x that have a gradient: x[rows] changes in place.

    counts holds the rows' numbers of updates, this one included.
    """
    at = counts.view(-1, *(1,) * (x.ndim - 1))
    m = moments[0][rows].lerp(grad, 1 - BETAS[0])
    v = moments[1][rows].lerp(grad * grad, 1 - BETAS[1])
    moments[0][rows], moments[1][rows] = m, v
    x[rows] -= lr * (m / (1 - BETAS[0] ** at)) / ((v / (1 - BETAS[1] ** at)).sqrt() + EPS)


def draw_batches(n: int, steps: int, batch: int, generator: torch.Generator) -> Tensor:
    """Rows of the kept samples for every step [N, batch], without repetition until all were drawn."""
    rounds = -(-steps * batch // n)
    order = torch.cat([torch.randperm(n, generator=generator) for _ in range(rounds)])
    return order[: steps * batch].view(steps, batch)


def first_prompts(config: MatchConfig, n: int, table: Tensor, allowed: Tensor, seed: int) -> Tensor:
    """[n, k, D] float32: the mean vocabulary embedding, or random tokens."""
    if config.prompt_init == "mean":
        return table.float().mean(0).expand(n, config.prompt_tokens, -1).clone()
    picks = torch.randint(len(allowed), (n, config.prompt_tokens), generator=torch.Generator().manual_seed(seed))
    return table[allowed[picks.to(allowed.device)]].float()


class Matcher:
    """One distillation: the student, the kept samples and the trajectories; `iterate` is one round of Algorithm 1."""

    def __init__(
        self,
        config: MatchConfig,
        student: Student,
        rows: Sequence[Encoded],
        ids: Sequence[str],
        experts: Sequence[Path],
        banned: Tensor,
    ):
        self.config, self.student, self.rows, self.ids, self.banned = config, student, rows, ids, banned
        caches = Caches(CACHE_BYTES)  # one limit for all experts, however many
        self.stores = [TrajectoryStore(folder / TRAJECTORY, caches=caches) for folder in experts]
        self.segments = segments(experts, self.stores, config)

    def close(self) -> None:
        for store in self.stores:
            store.close()

    def batch(self, rows: Tensor) -> Packed:
        """Some kept samples with room for their prompts, on the student's device."""
        return pack([self.rows[i] for i in rows.tolist()], self.config.prompt_tokens).to(self.student.device)

    def blame(self, rows: Tensor, log_alpha: Tensor) -> str:
        """The samples and the rate at which a number stopped being finite, for a message."""
        return f"(samples {', '.join(self.ids[i] for i in rows.tolist())}; alpha {float(log_alpha.exp()):.4g})"

    def draws(self, state: Tensor) -> Iterator[Draw]:
        """Those of all iterations to come, from a generator's state."""
        generator = torch.Generator()
        generator.set_state(state)
        while True:
            segment = self.segments[int(torch.randint(len(self.segments), (1,), generator=generator))]
            rows = draw_batches(len(self.rows), self.config.inner_steps, self.config.batch, generator)
            yield Draw(segment, rows, generator.get_state())

    def read(self, draw: Draw) -> Ready:
        segment = draw.segment
        start, target = self.stores[segment.expert].read_pair(segment.start, segment.target, device=self.student.device)
        return Ready(draw, self.student.flatten(start), self.student.flatten(target))

    def ahead(self, learned: Learned) -> Prefetch[Draw, Ready]:
        """What the iterations still to be made need, in their order, read in a thread while others run."""
        left = self.config.iterations - len(learned.curve)
        return Prefetch(self.read, islice(self.draws(learned.generator.get_state()), left))

    def iterate(self, learned: Learned, ready: Ready) -> dict[str, float]:
        """One update of the prompts and of alpha, in place. Raises NonFiniteError, leaving `learned` as it was."""
        config, student = self.config, self.student
        drawn, start, target = ready.draw.rows, ready.start, ready.target
        used, position = drawn.to(student.device).unique(return_inverse=True)
        prompts = learned.prompts[used].requires_grad_()
        log_alpha = learned.log_alpha.clone().requires_grad_()
        first_retained = config.inner_steps - config.retain_steps
        inputs = [(prompts[position[n]], self.batch(drawn[n]), n >= first_retained) for n in range(config.inner_steps)]

        def inner_loss(theta: Tensor, step: tuple[Tensor, Packed, bool]) -> Tensor:
            own_prompts, batch, retain = step
            return student.loss(student.unflatten(theta), own_prompts, batch, retain=retain)

        how: dict[str, Any] = dict(update=UPDATES[config.update], retain=config.retain_steps)
        try:
            theta = unrolled_sgd(inner_loss, start, log_alpha.exp()[0], inputs, **how)
        except NonFiniteError as error:
            step = error.step if error.step is not None else 0
            raise NonFiniteError(f"{error} {self.blame(drawn[step], log_alpha)}") from None
        distill = (theta - target).square().sum() / (start - target).square().sum()
        flat = torch.cat([batch[0] for batch in inputs]).flatten(0, 1)
        reg = nearest_embedding(flat, student.embedding, banned=self.banned)[1].mean()
        loss = distill + config.beta * reg
        d_prompts, d_log_alpha = torch.autograd.grad(loss, (prompts, log_alpha))
        if not bool(d_prompts.isfinite().all() & d_log_alpha.isfinite().all()):
            raise NonFiniteError(f"the hypergradient is not finite {self.blame(used, log_alpha)}")
        numbers = dict(zip(CURVE, torch.stack([loss, distill, reg, log_alpha.exp()[0]]).tolist(), strict=True))
        learned.generator.set_state(ready.draw.after)
        learned.counts[used] += 1
        adam_step(
            learned.prompts,
            d_prompts,
            (learned.moments[0], learned.moments[1]),
            used,
            learned.counts[used],
            config.prompt_lr,
        )
        if config.alpha_lr > 0:
            learned.counts[-1] += 1
            only = torch.zeros(1, dtype=torch.int64, device=student.device)
            adam_step(
                learned.log_alpha,
                d_log_alpha,
                (learned.moments[2], learned.moments[3]),
                only,
                learned.counts[-1:],
                config.alpha_lr,
            )
            learned.log_alpha.clamp_(max=torch.tensor(config.alpha_max).log().item())
        learned.curve = torch.cat(
            [learned.curve, torch.tensor([[numbers[name] for name in CURVE]], dtype=torch.float64)]
        )
        return numbers


def settings(model: ModelConfig, data: DataConfig, config: MatchConfig, seed: int) -> dict[str, Any]:
    """What determines the result: neither the device nor how often the state is saved does."""
    match = {name: value for name, value in asdict(config).items() if name != "save_every"}
    return {"model": model_settings(model), "data": data_settings(data), "match": match, "seed": seed}


def prepare(
    model: ModelConfig, data: DataConfig, config: MatchConfig, examples: Sequence[Example], experts: Sequence[Path]
) -> tuple[Matcher, Tensor]:
    """A Matcher and the ids that prompts may stand for.

    Every check of the input is made here, before a file is written.
    """
    check_batch("the kept set", len(examples), "match.batch", config.batch)
    base, tokenizer = load_model(model.path, model.dtype, model.device)
    rows = encode_set(examples, tokenizer, data)
    ids = [e.id for e in examples]
    check_lengths(ids, rows, [config.prompt_tokens] * len(rows), max_positions(base))
    student = Student(add_lora(base, model, seed=0), checkpointing=config.checkpointing)
    banned = banned_ids(tokenizer, student.embedding.shape[0]).to(student.device)
    matcher = Matcher(config, student, rows, ids, experts, banned)
    student.flatten(matcher.stores[0].read(matcher.segments[0].start))  # the adapters fit the model
    return matcher, (~banned).nonzero().squeeze(-1)


def run(
    folder: Path,
    model: ModelConfig,
    data: DataConfig,
    config: MatchConfig,
    examples: Sequence[Example],
    experts: Sequence[Path],
    seed: int,
) -> Path:
    """Learn prompts for `examples`, the kept samples, from finished expert folders. Returns `folder`."""
    if not (folder / "manifest.json").exists():
        matcher, allowed = prepare(model, data, config, examples, experts)
    inputs = {f"expert{i}": folder_digest(path) for i, path in enumerate(experts)}
    inputs |= {"kept": digest(examples), "model": model_digest(model.path)}
    with open_stage(folder, settings(model, data, config, seed), inputs) as stage:
        if stage.finished:
            return folder
        state, student = stage.work / "state.safetensors", matcher.student
        if state.exists():
            learned = Learned.load(state, student.device)
        else:
            learned = Learned.start(
                first_prompts(config, len(examples), student.embedding, allowed, seed), config.alpha, seed
            )
        with (
            closing(matcher),
            progress_bar(f"matching, seed {seed}", config.iterations, len(learned.curve)) as bar,
            matcher.ahead(learned) as ahead,
        ):
            for iteration, ready in enumerate(ahead, len(learned.curve)):
                try:
                    numbers = matcher.iterate(learned, ready)
                except NonFiniteError as error:
                    write_atomic(state, save(learned.tensors()))
                    raise NonFiniteError(
                        f"iteration {iteration}: {error}; the last good state is kept in {state}"
                    ) from None
                if (iteration + 1) % config.save_every == 0:
                    write_atomic(state, save(learned.tensors()))
                bar.advance(loss=numbers["loss"], alpha=numbers["alpha"])
        write_outputs(folder, learned)
    return folder


def write_outputs(folder: Path, learned: Learned) -> None:
    write_atomic(folder / "prompts.safetensors", save({"prompts": learned.prompts.detach().cpu().contiguous()}))
    curve = [{"iteration": i} | dict(zip(CURVE, row, strict=True)) for i, row in enumerate(learned.curve.tolist())]
    write_json(folder / "curve.json", curve)
    tenth = max(1, len(curve) // 10)
    means = {
        name: {"first": learned.curve[:tenth, i].mean().item(), "last": learned.curve[-tenth:, i].mean().item()}
        for i, name in enumerate(CURVE)
    }
    write_json(
        folder / "summary.json", {"iterations": len(curve), "alpha": float(learned.log_alpha.exp()), "means": means}
    )


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["match", *sys.argv[1:]]))
