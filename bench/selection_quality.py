"""Does a selection bring a model closer to its target? Held-out loss after tuning on what each method kept.

    python bench/selection_quality.py --json runs/quality.json --pool 6000                    # the demo's model
    python bench/selection_quality.py --json runs/quality.json --smollm2 --pool 1500          # SmolLM2-135M

The pool is drawn from Dolly, CoT and P3 in equal parts, the target is ARC-Easy's validation split (../shared or
$NACD_SHARED). Every method keeps 5 %; the model is tuned on it with the same epochs, rate and batch, the best epoch by
the loss on half of the validation split that no method saw, and scored on ARC-Easy's test split: the mean NLL a
response token, and the share of questions whose answer has the highest mean log-likelihood. Rows are of one seed each;
`minus_random` is the paired difference of the NLLs.
"""

import os
import random
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from timing import Rows, parser
from trajectories import saved_smollm2

from nacd_fast import evaluate, tune
from nacd_fast.config import DataConfig, EvaluateConfig, LessConfig, ModelConfig, SelectConfig, TuneConfig
from nacd_fast.examples import Example, without_copies
from nacd_fast.forms import read_set
from nacd_fast.selection import select
from nacd_fast.selection.method import Context

SHARED = Path(os.environ.get("NACD_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
SETS = ("dolly", "cot_flan", "p3_50k.jsonl.gz")
METHODS: tuple[Literal["random", "bm25", "dsir", "less"], ...] = ("random", "bm25", "dsir", "less")
DATA = DataConfig(max_tokens=128)


def pool_of(n: int) -> list[Example]:
    """n samples, a third of each set, the same every time."""
    found: list[Example] = []
    for name in SETS:
        examples = without_copies(read_set(str(SHARED / name), "train", skip_empty=True))
        found += random.Random(0).sample(examples, n // len(SETS))
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--pool", type=int, default=6000, help="samples to select from")
    arguments.add_argument("--test", type=int, default=1000, help="questions to score on")
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--epochs", type=int, default=4)
    arguments.add_argument("--dimensions", type=int, default=2048, help="features of LESS")
    arguments.add_argument("--smollm2", action="store_true", help="SmolLM2-135M in place of the demo's model")
    arguments.add_argument("--models", type=Path, default=Path("runs/models"), help="folder of the SmolLM2 wheel")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    table = Rows("selection_quality", torch.device(args.device))
    folder = Path(tempfile.mkdtemp())
    if args.quick:
        args.pool, args.test, args.seeds, args.epochs, args.dimensions = 300, 50, 1, 1, 64
    model = ModelConfig(path="demo", rank=8, lora_alpha=16.0, device=args.device)
    if args.smollm2:
        model = replace(model, path=saved_smollm2(args.models, folder / "smollm2"))
    name = f"{'smollm2' if args.smollm2 else 'demo'} n{args.pool}"
    pool = pool_of(args.pool)
    validation, test = (read_set(str(SHARED / "arc_easy"), split) for split in ("validation", "test"))
    target, chosen_on, test = validation[::2], validation[1::2], test[: args.test]
    less = LessConfig(warmup_batch=8, warmup_lr=1e-3, dimensions=args.dimensions)
    untrained = evaluate.run(folder / "untrained", model, DATA, EvaluateConfig(), test, None, "untrained")
    table.add(name, "nll", untrained["nll"], "nats", "untrained")
    for seed in range(args.seeds):
        nll = {}
        for method in METHODS:
            at = folder / f"{method}{seed}"
            aim = "" if method == "random" else "arc_easy"
            config = SelectConfig(method=method, less=less, target=aim)
            ids = set(select(pool, config, seed, Context(target, model, DATA, at / "store")).ids)
            kept = [e for e in pool if e.id in ids]
            tuning = TuneConfig(lr=1e-3, batch=8)
            tune.run(at / "tuned", model, DATA, tuning, kept, chosen_on, seed, epochs=args.epochs, label=method)
            adapter = at / "tuned" / "adapter"
            found = evaluate.run(at / "scores", model, DATA, EvaluateConfig(), test, adapter, method)
            nll[method] = found["nll"]
            table.add(f"{name} seed{seed}", "nll", found["nll"], "nats", method)
            table.add(f"{name} seed{seed}", "accuracy", found["accuracy"], "1", method)
            table.add(f"{name} seed{seed}", "minus_random", nll[method] - nll["random"], "nats", method)
        table.write(args.json)


if __name__ == "__main__":
    main()
