"""Every setting of a run, once: name, default, meaning, limits. Flags and recipe files are generated from the fields.

Letters in the meanings are those of the paper (arXiv 2504.09818, Algorithm 1). The defaults are the paper's where the
paper states one; recipes/ holds whole settings.
"""

from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Literal

from .errors import InputError


def require(ok: bool, name: str, value: object, limit: str) -> None:
    """Raise InputError "name=value, must be limit" unless ok."""
    if not ok:
        raise InputError(f"{name}={value!r}: must be {limit}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The student: a causal language model with LoRA adapters."""

    path: str = "demo"
    """Hub name or folder of the model; `demo` and `demo-sibling` are the embedded ones."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the frozen base; the adapters are always float32."""
    rank: int = 16
    """LoRA rank R."""
    lora_alpha: float = 32.0
    """LoRA scaling numerator: the adapters' output is multiplied by lora_alpha / rank."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "c_attn", "attn.c_proj")
    """Ends of the names of the linear layers that get adapters; those that the model lacks are passed over."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:0`, ...; `auto` takes a GPU where there is one."""

    def __post_init__(self) -> None:
        require(1 <= self.rank <= 256, "model.rank", self.rank, "from 1 to 256")
        require(self.lora_alpha > 0, "model.lora_alpha", self.lora_alpha, "positive")
        require(len(self.targets) > 0, "model.targets", self.targets, "at least one layer name")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The instruction set and how a conversation becomes tokens."""

    train: str = "demo"
    """Full set: a file (.jsonl, .json, .parquet), a folder of them, a hub name, or `demo`."""
    validation: str = "demo"
    """Split that every choice is made on (epoch, learning rates). Form as `train`; all three are `demo`, or none."""
    test: str = "demo"
    """Held-out split that scores are reported on. Form as `train`."""
    template: Literal["plain", "chat"] = "plain"
    """`plain` is the paper's `User: ... Assistant: ...`; `chat` is the tokenizer's own template."""
    max_tokens: int = 1024
    """Longer samples are cut; at least one token of the last response is always kept."""
    deduplicate: bool = True
    """Of samples of the full set that say the same, only the first is taken."""
    skip_empty: bool = False
    """Leave out rows whose response is empty, instead of refusing the set."""

    def __post_init__(self) -> None:
        require(self.max_tokens >= 8, "data.max_tokens", self.max_tokens, "at least 8")
        sources = {f"data.{split}": getattr(self, split) for split in ("train", "validation", "test")}
        own = next((f"{name}={source!r}" for name, source in sources.items() if source != "demo"), None)
        for name, source in sources.items():
            require(source != "demo" or own is None, name, source, f"given together with {own}, not the demo's")
        paths = {name: Path(source).expanduser().resolve() for name, source in sources.items()}
        for first, second in combinations(sources, 2):
            shared = paths[first] == paths[second] and paths[first].is_file()  # folders and hub sets have parts
            require(
                not shared,
                second,
                sources[second],
                f"another file than {first}, or the scores are of what was trained on",
            )


@dataclass(frozen=True, kw_only=True)
class LessConfig:
    """LESS (arXiv 2402.04333): influence of a sample on the target, by projected gradients. The paper's settings."""

    warmup_fraction: float = 0.05
    """Share of the pool that the adapters are warmed up on, drawn at random."""
    warmup_epochs: int = 4
    """Epochs of the warm-up; its state after each is a checkpoint that gradients are taken at."""
    warmup_batch: int = 32
    """Samples an optimiser step of the warm-up."""
    warmup_lr: float = 2e-5
    """AdamW's peak learning rate: it rises over the first 3 % of the steps and falls to 0, both linearly."""
    dimensions: int = 8192
    """Features a gradient is projected to."""
    batch: int = 8
    """Samples whose gradients come from one backward pass."""

    def __post_init__(self) -> None:
        require(0 < self.warmup_fraction <= 1, "less.warmup_fraction", self.warmup_fraction, "in (0, 1]")
        require(self.warmup_lr > 0, "less.warmup_lr", self.warmup_lr, "positive")
        require(
            self.dimensions >= 64 and self.dimensions % 64 == 0, "less.dimensions", self.dimensions, "a multiple of 64"
        )
        for name in ("warmup_epochs", "warmup_batch", "batch"):
            require(getattr(self, name) >= 1, f"less.{name}", getattr(self, name), "at least 1")


@dataclass(frozen=True, kw_only=True)
class DqConfig:
    """Dataset quantization (arXiv 2308.10524): bins of falling submodular gain, sampled evenly."""

    bins: int = 10
    """Bins that the pool is divided into."""
    block: int = 20_000
    """Samples quantised at a time, drawn at random: the work grows with its square."""
    batch: int = 32
    """Samples embedded at a time."""

    def __post_init__(self) -> None:
        for name in ("bins", "block", "batch"):
            require(getattr(self, name) >= 1, f"dq.{name}", getattr(self, name), "at least 1")
        require(self.bins <= self.block, "dq.bins", self.bins, f"at most block={self.block}")


AIMED = ("bm25", "dsir", "less")  # methods that look at the target


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Which samples of the full set are kept."""

    method: Literal["random", "stratified", "bm25", "dsir", "less", "dq", "ids"] = "random"
    """`random`; `stratified`: at random, each source by its share; `bm25`, `dsir` and `less`: those that are most like
    the target, by words, n-grams or gradients; `dq`: those that cover the set; `ids`: the list in `ids`."""
    fraction: float = 0.05
    """Share of the full set that is kept, in (0, 1]."""
    ids: str = ""
    """File with one sample id a line (method `ids`)."""
    target: str = ""
    """What is to be learned: a few samples of it, in the forms of `train`, or `arc_easy` or `mmlu` (methods `bm25`,
    `dsir` and `less`). Never the test split."""
    target_split: Literal["train", "validation"] = "validation"
    """Split of the target, where it has several."""
    model: str = ""
    """Model whose gradients or embeddings are looked at (methods `less` and `dq`); empty: the one that is tuned."""
    less: LessConfig = field(default_factory=LessConfig)
    """Settings of method `less`."""
    dq: DqConfig = field(default_factory=DqConfig)
    """Settings of method `dq`."""

    def __post_init__(self) -> None:
        require(0 < self.fraction <= 1, "select.fraction", self.fraction, "in (0, 1]")
        require(
            (self.method == "ids") == bool(self.ids), "select.ids", self.ids, "given with method `ids` and only then"
        )
        aims = self.method in AIMED
        require(aims == bool(self.target), "select.target", self.target, "given with bm25, dsir and less and only then")


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """Training on the full set, whose weight trajectories are matched."""

    count: int = 3
    """Number of experts |{tau*}|; each has its own seed."""
    epochs: int = 3
    """Epochs over the full set, T."""
    batch: int = 16
    """Samples an optimiser step."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """The experts' optimiser: `adamw` as is usual for LoRA; `sgd` is the student's own (see the README)."""
    lr: float = 1e-4
    """Learning rate, constant."""
    snapshot_steps: int = 0
    """Snapshot every so many steps beside those at every epoch's end; 0: epochs only."""
    max_steps: int = 0
    """Stop after so many steps; 0: all epochs."""

    def __post_init__(self) -> None:
        require(self.count >= 1, "experts.count", self.count, "at least 1")
        require(self.epochs >= 1, "experts.epochs", self.epochs, "at least 1")
        require(self.batch >= 1, "experts.batch", self.batch, "at least 1")
        require(self.lr > 0, "experts.lr", self.lr, "positive")
        require(self.snapshot_steps >= 0, "experts.snapshot_steps", self.snapshot_steps, "0 or more")
        require(self.max_steps >= 0, "experts.max_steps", self.max_steps, "0 or more")


@dataclass(frozen=True, kw_only=True)
class MatchConfig:
    """Algorithm 1: learn the prompts by matching the experts' trajectories."""

    iterations: int = 3000
    """S, updates of the prompts."""
    inner_steps: int = 6
    """N, student steps unrolled in an iteration."""
    span_steps: int = 0
    """M, expert steps from the start to the target snapshot; 0: one epoch."""
    max_start_epoch: int = 2
    """T^m, starts are drawn from the snapshots before this epoch."""
    prompt_tokens: int = 2
    """k, pseudo tokens in front of every sample."""
    batch: int = 8
    """Samples a student step."""
    prompt_init: Literal["mean", "tokens"] = "mean"
    """Prompts start at the mean vocabulary embedding, or at random tokens' embeddings."""
    prompt_lr: float = 0.01
    """Adam's learning rate for the prompt embeddings."""
    alpha: float = 0.1
    """alpha_0, the student's learning rate at the start."""
    alpha_lr: float = 0.01
    """Adam's learning rate for log alpha; 0 keeps alpha fixed."""
    alpha_max: float = 10.0
    """Guard: alpha is held at or below this."""
    beta: float = 100.0
    """Weight of L_reg, the mean distance of the prompts to their nearest tokens (equation 3)."""
    update: Literal["sgd", "momentum", "adamw"] = "sgd"
    """The student's optimiser; the paper's is plain SGD (equation 1)."""
    checkpointing: bool = False
    """Recompute activations layer by layer: less memory, one more forward pass."""
    retain_steps: int = 0
    """The last inner steps whose graphs are kept: each costs a third less time, and its activations and logits."""
    save_every: int = 50
    """Iterations between resumable states on disk."""

    def __post_init__(self) -> None:
        for name in ("iterations", "inner_steps", "max_start_epoch", "prompt_tokens", "batch", "save_every"):
            require(getattr(self, name) >= 1, f"match.{name}", getattr(self, name), "at least 1")
        for name in ("span_steps", "retain_steps"):
            require(getattr(self, name) >= 0, f"match.{name}", getattr(self, name), "0 or more")
        require(self.prompt_lr > 0, "match.prompt_lr", self.prompt_lr, "positive")
        require(0 < self.alpha <= self.alpha_max, "match.alpha", self.alpha, f"in (0, alpha_max={self.alpha_max}]")
        require(self.alpha_lr >= 0, "match.alpha_lr", self.alpha_lr, "0 or more")
        require(self.beta >= 0, "match.beta", self.beta, "0 or more")


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Instruction tuning, the same for every row of the comparison."""

    epochs: int = 3
    """Epochs over the 5 %; the best one on the validation split is kept."""
    full_epochs: int = 3
    """Epochs of the FULL row."""
    batch: int = 8
    """Samples an optimiser step."""
    lr: float = 1e-4
    """AdamW's learning rate, constant."""

    def __post_init__(self) -> None:
        for name in ("epochs", "full_epochs", "batch"):
            require(getattr(self, name) >= 1, f"tune.{name}", getattr(self, name), "at least 1")
        require(self.lr > 0, "tune.lr", self.lr, "positive")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Scores on the test split."""

    batch: int = 32
    """Sequences a forward pass."""
    bootstrap: int = 2000
    """Resamples for the 95 % intervals."""

    def __post_init__(self) -> None:
        require(self.batch >= 1, "evaluate.batch", self.batch, "at least 1")
        require(self.bootstrap >= 100, "evaluate.bootstrap", self.bootstrap, "at least 100")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The whole job."""

    out: str = "runs/nacd"
    """Folder of the run; finished stages in it are reused, unfinished ones resume."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One subset, distillation and tuning of every row for each seed; the experts are shared."""
    transfer: str = "demo-sibling"
    """Model with another tokenizer that is tuned on the decoded prompts; empty: none."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model that is distilled on."""
    data: DataConfig = field(default_factory=DataConfig)
    """The instruction set."""
    select: SelectConfig = field(default_factory=SelectConfig)
    """The kept samples."""
    experts: ExpertConfig = field(default_factory=ExpertConfig)
    """The trajectories to match."""
    match: MatchConfig = field(default_factory=MatchConfig)
    """The distillation."""
    tune: TuneConfig = field(default_factory=TuneConfig)
    """The training on the result."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """The scores."""

    def __post_init__(self) -> None:
        require(len(self.seeds) >= 1, "seeds", self.seeds, "at least one seed")
        require(len(set(self.seeds)) == len(self.seeds), "seeds", self.seeds, "without repetition")
        require(all(0 <= seed < 2**32 for seed in self.seeds), "seeds", self.seeds, "from 0 to 2**32 - 1 each")
        target, test = (Path(path).expanduser().resolve() for path in (self.select.target, self.data.test))
        leaks = bool(self.select.target) and target == test and test.is_file()
        require(not leaks, "select.target", self.select.target, "another file than data.test")


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """Tuning on a distilled set alone, of any model."""

    distilled: str
    """Folder of the distilled set: `runs/demo/distilled/seed0`, say."""
    validation: str
    """Split that the epoch is chosen on: a file, a folder, a hub name, or `demo`."""
    out: str = "runs/transfer"
    """Folder for the adapter and the log."""
    prompts: Literal["decoded", "embeddings", "none"] = "decoded"
    """What goes in front of each sample: the prompts' text; their embeddings, for the model they were learned for."""
    seed: int = 0
    """Draws the adapters and the order of the samples."""
    template: Literal["plain", "chat"] = "plain"
    """`plain` is the paper's `User: ... Assistant: ...`; `chat` is the tokenizer's own template."""
    max_tokens: int = 1024
    """Longer samples are cut; at least one token of the last response is always kept."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model that is tuned."""
    tune: TuneConfig = field(default_factory=TuneConfig)
    """The training; full_epochs is not used."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, "seed", self.seed, "from 0 to 2**32 - 1")
        require(self.max_tokens >= 8, "max_tokens", self.max_tokens, "at least 8")


@dataclass(frozen=True, kw_only=True)
class SelectionConfig(SelectConfig):
    """One selection by itself: `nacd select`."""

    pool: str = "demo"
    """Full set: a file, a folder, a hub name, `demo`, or several of them with commas between."""
    out: str = "runs/selection"
    """Folder for the result; other finished selections beside it are compared with it."""
    seed: int = 0
    """Whatever is drawn is drawn from it."""
    template: Literal["plain", "chat"] = "plain"
    """How samples become tokens, as in `data.template` (methods `less` and `dq`)."""
    max_tokens: int = 1024
    """Longer samples are cut (methods `less` and `dq`)."""
    deduplicate: bool = True
    """Of samples that say the same, only the first is in the pool."""
    skip_empty: bool = False
    """Leave out rows whose response is empty, instead of refusing the set."""
    lora: ModelConfig = field(default_factory=ModelConfig)
    """The model of `less` and `dq` and its adapters; `model` is a short form of `lora.path`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.seed < 2**32, "seed", self.seed, "from 0 to 2**32 - 1")
        require(self.max_tokens >= 8, "max_tokens", self.max_tokens, "at least 8")
