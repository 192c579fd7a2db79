"""Make the embedded demo: two small language models, their tokenizers and an instruction subset.

    python tools/make_demo.py --data ../shared/data        # writes nacd_fast/demo/, about an hour on one core

Everything is real text: Dolly-15k (CC BY-SA 3.0), the chain-of-thought files of the FLAN repository (Apache-2.0) and
P3 (Apache-2.0). The steps, in order:

1. The instruction subset: short P3 and Dolly samples, split into train / validation / test by *groups* that share a
   rare run of words, so that one passage under two templates never stands on both sides. Each carries four choices.
2. Pre-training text: every other document, as plain text without a chat template. Prompts and responses are separate
   documents, so that instruction tuning has something to teach; whatever shares a group with the subset is left out.
3. Two tokenizers (byte-level BPE as in OPT and Llama 3; Unigram with byte fallback as in Llama 2) and two models: a
   Llama with grouped query heads, and an OPT as the target of a transfer.

Deterministic for one machine, thread count and library versions; the log is committed beside this file.
"""

import argparse
import collections
import csv
import gzip
import hashlib
import json
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

SEED = 2504
SIZES = {"train": 2000, "validation": 300, "test": 700}
P3_SHARE = 0.65  # of every split; the rest is Dolly
PER_TEMPLATE = 100  # at most so many samples of one P3 template ...
PER_GROUP = 10  # ... and of one group, so that every split has every kind
SHINGLE = 10  # words; samples that share a run of this many words ...
SHINGLE_ROWS = 12  # ... found in at most this many samples belong to one group
MAX_TOKENS, MAX_RESPONSE = 72, 16
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]

MODELS = {
    "model": dict(vocab=2048, block=128, batch=24, steps=3600, lr=2e-3),
    "sibling": dict(vocab=1536, block=128, batch=24, steps=1500, lr=2e-3),
}


def read_pool(data: Path) -> tuple[list[dict], list[dict], list[str]]:
    """P3 and Dolly samples as {source, group key text, prompt, response}, and the chain-of-thought documents."""
    p3, dolly, cot = [], [], []
    with gzip.open(data / "p3_50k.jsonl.gz", "rt", encoding="utf-8") as f:
        for line in f:
            row = json.loads(line)
            response = row["completion"].replace("<|endoftext|>", "").strip()
            if row["prompt"].strip() and response:
                p3.append({"source": f"p3/{row['template']}", "prompt": row["prompt"].strip(), "response": response})
    with open(data / "dolly" / "databricks-dolly-15k.reassembled.jsonl", encoding="utf-8") as f:
        for line in f:
            row = json.loads(line)
            prompt = f"{row['instruction'].strip()}\n{row['context'].strip()}".strip()
            if prompt and row["response"].strip():
                dolly.append(
                    {"source": f"dolly/{row['category']}", "prompt": prompt, "response": row["response"].strip()}
                )
    for path in sorted((data / "cot_flan").glob("*_train.tsv")):
        with open(path, encoding="utf-8", newline="") as f:
            for row in csv.reader(f, delimiter="\t", quoting=csv.QUOTE_NONE):
                question, _, rationale = (cell.replace("\\n", "\n") for cell in row[:3])
                cot += [question, rationale]
    return p3, dolly, cot


def group_ids(samples: list[dict]) -> list[int]:
    """A group for every sample: samples that share a rare run of SHINGLE words are in one group (union-find)."""
    rows_of = collections.defaultdict(list)
    for i, sample in enumerate(samples):
        words = f"{sample['prompt']} {sample['response']}".lower().split()
        for run in {tuple(words[j : j + SHINGLE]) for j in range(len(words) - SHINGLE + 1)} or {tuple(words)}:
            rows_of[run].append(i)
    parent = list(range(len(samples)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for rows in rows_of.values():
        if len(rows) <= SHINGLE_ROWS:
            for i in rows[1:]:
                parent[root(i)] = root(rows[0])
    return [root(i) for i in range(len(samples))]


def choices_of(sample: dict, responses: list[str], rng: random.Random) -> list[str]:
    """The response and up to three other responses to the same source, in a random order."""
    others = sorted({r for r in responses if r != sample["response"] and len(r) <= 60})
    choices = [sample["response"], *rng.sample(others, min(3, len(others)))]
    rng.shuffle(choices)
    return choices


def varied_sources(samples: list[dict]) -> set[str]:
    """Sources whose commonest response makes up at most 70 % (some P3 files hold one label only)."""
    responses = collections.defaultdict(collections.Counter)
    for s in samples:
        responses[s["source"]][s["response"]] += 1
    return {source for source, seen in responses.items() if max(seen.values()) <= 0.7 * seen.total()}


def pick_subset(samples: list[dict], tokenizer: PreTrainedTokenizerFast) -> tuple[dict[str, list[int]], list[int]]:
    """Splits of the instruction subset, and the samples that share no group with it (both as indices)."""
    rng = random.Random(SEED)
    groups, varied = group_ids(samples), varied_sources(samples)
    taken: collections.Counter = collections.Counter()
    eligible: dict[str, dict[int, list[int]]] = {"p3": {}, "dolly": {}}
    order = list(range(len(samples)))
    rng.shuffle(order)
    for i in order:
        s = samples[i]
        if s["source"] not in varied or len(s["prompt"]) > 280 or len(s["response"]) > 80:
            continue
        if s["source"].startswith("p3/") and taken[s["source"]] >= PER_TEMPLATE:
            continue
        response = len(tokenizer(" " + s["response"]).input_ids) + 1
        if (
            response > MAX_RESPONSE
            or response + len(tokenizer(f"User: {s['prompt']}\nAssistant:").input_ids) + 1 > MAX_TOKENS
        ):
            continue
        rows = eligible[s["source"].split("/")[0]].setdefault(groups[i], [])
        if len(rows) < PER_GROUP:
            taken[s["source"]] += 1
            rows.append(i)

    splits: dict[str, list[int]] = {name: [] for name in SIZES}
    for pool, share in (("p3", P3_SHARE), ("dolly", 1 - P3_SHARE)):
        print(f"{pool}: {sum(map(len, eligible[pool].values()))} eligible samples in {len(eligible[pool])} groups")
        rows_by_group = iter(eligible[pool].values())
        for name, size in SIZES.items():
            want = len(splits[name]) + round(size * share)
            while len(splits[name]) < want:
                splits[name] += next(rows_by_group)[: want - len(splits[name])]
    touched = {groups[i] for rows in splits.values() for i in rows}
    for rows in splits.values():
        rng.shuffle(rows)
    return splits, [i for i in range(len(samples)) if groups[i] not in touched]


def write_subset(out: Path, samples: list[dict], splits: dict[str, list[int]]) -> None:
    """{train,validation,test}.jsonl: id, source, messages, choices (with the index of the right one)."""
    rng = random.Random(SEED + 1)
    by_source = collections.defaultdict(list)
    for s in samples:
        by_source[s["source"]].append(s["response"])
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        with open(out / f"{name}.jsonl", "w", encoding="utf-8") as f:
            for n, i in enumerate(rows):
                s = samples[i]
                choices = choices_of(s, by_source[s["source"]], rng)
                row = {
                    "id": f"{name}-{n:04d}",
                    "source": s["source"],
                    "messages": [
                        {"role": "user", "content": s["prompt"]},
                        {"role": "assistant", "content": s["response"]},
                    ],
                    "choices": choices,
                    "answer": choices.index(s["response"]),
                }
                f.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(f"{name}: {len(rows)} samples, {len({samples[i]['source'] for i in rows})} sources")


def train_tokenizer(kind: str, vocab: int, documents: list[str]) -> PreTrainedTokenizerFast:
    if kind == "model":
        tok = Tokenizer(models.BPE())
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tok.train_from_iterator(documents, trainer)
    else:
        tok = Tokenizer(models.Unigram())
        tok.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")])
        tok.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        byte_pieces = [f"<0x{b:02X}>" for b in range(256)]
        trainer = trainers.UnigramTrainer(
            vocab_size=vocab - len(byte_pieces), special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
        tok.train_from_iterator(documents, trainer)
        state = json.loads(tok.to_str())["model"]
        pieces = [(piece, score) for piece, score in state["vocab"]]
        pieces = pieces[: len(SPECIAL)] + [(b, -20.0) for b in byte_pieces] + pieces[len(SPECIAL) :]
        tok.model = models.Unigram(pieces, unk_id=SPECIAL.index("<unk>"), byte_fallback=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def build(kind: str, vocab: int) -> torch.nn.Module:
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if kind == "model":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab,
                hidden_size=128,
                intermediate_size=352,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
                tie_word_embeddings=True,
                **ids,
            )
        )
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=vocab,
            hidden_size=96,
            ffn_dim=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            word_embed_proj_dim=96,
            max_position_embeddings=256,
            dropout=0.0,
            attention_dropout=0.0,
            **ids,
        )
    )


def pretrain(kind: str, documents: list[str], held: list[str], out: Path, scratch: Path) -> None:
    """Next-token training on packed blocks; writes fp16 safetensors and the tokenizer."""
    recipe = MODELS[kind]
    set_seed(SEED)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    model = build(kind, recipe["vocab"])

    def blocks(texts: list[str]) -> list[dict]:
        ids: list[int] = []
        for text in texts:
            ids += [
                tokenizer.bos_token_id,
                *tokenizer(text, add_special_tokens=False).input_ids,
                tokenizer.eos_token_id,
            ]
        rows = torch.tensor(ids[: len(ids) // recipe["block"] * recipe["block"]]).view(-1, recipe["block"])
        return [{"input_ids": row, "labels": row} for row in rows]

    train, evaluation = blocks(documents), blocks(held)
    tokens = recipe["steps"] * recipe["batch"] * recipe["block"]
    parameters, text = sum(p.numel() for p in model.parameters()), len(train) * recipe["block"]
    print(f"{kind}: {parameters:,} parameters; {text:,} tokens of text, {tokens:,} trained on", flush=True)

    class Log(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            shown = {k: round(logs[k], 4) for k in ("loss", "eval_loss") if k in logs}
            if shown:
                print(f"{kind} step {state.global_step}: {shown}", flush=True)

    args = TrainingArguments(
        output_dir=str(scratch / kind),
        per_device_train_batch_size=recipe["batch"],
        per_device_eval_batch_size=recipe["batch"],
        max_steps=recipe["steps"],
        learning_rate=recipe["lr"],
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        logging_steps=100,
        eval_strategy="steps",
        eval_steps=600,
        save_steps=600,
        save_total_limit=1,
        report_to=[],
        seed=SEED,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=default_data_collator,
        callbacks=[Log()],
    )
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=any((scratch / kind).glob("checkpoint-*")))
    print(f"{kind}: trained in {time.perf_counter() - start:.0f} s on {torch.get_num_threads()} thread(s)", flush=True)
    model.half().save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="folder with dolly/, cot_flan/ and p3_50k.jsonl.gz"
    )
    parser.add_argument("--out", type=Path, default=Path("nacd_fast/demo"), help="where the demo is written")
    parser.add_argument("--scratch", type=Path, default=Path("runs/make_demo"), help="checkpoints of the pre-training")
    parser.add_argument("--only", choices=["data", "model", "sibling"], help="do one part")
    args = parser.parse_args()

    p3, dolly, cot = read_pool(args.data)
    print(f"P3 {len(p3)}, Dolly {len(dolly)}, chain of thought {len(cot)} documents")
    samples = p3 + dolly
    tokenizers = {}
    for kind, recipe in MODELS.items():
        if not (args.out / kind / "tokenizer.json").exists():
            sample_text = random.Random(SEED).sample(
                [s["prompt"] for s in samples] + [s["response"] for s in samples] + cot, 40_000
            )
            train_tokenizer(kind, recipe["vocab"], sample_text).save_pretrained(args.out / kind)
        tokenizers[kind] = PreTrainedTokenizerFast.from_pretrained(args.out / kind)
    splits, left = pick_subset(samples, tokenizers["model"])
    if args.only in (None, "data"):
        write_subset(args.out / "data", samples, splits)

    documents = [
        text for i in left for text in (samples[i]["prompt"], samples[i]["response"]) if len(text.split()) > 2
    ] + cot
    documents = list(dict.fromkeys(documents))
    random.Random(SEED).shuffle(documents)
    digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()[:16]
    print(
        f"pre-training text: {len(documents)} documents, {sum(map(len, documents)):,} characters, sha256 {digest}",
        flush=True,
    )
    for kind in MODELS:
        if args.only in (None, kind):
            pretrain(kind, documents[500:], documents[:500], args.out / kind, args.scratch)


if __name__ == "__main__":
    main()
