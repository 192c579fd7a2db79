"""Tiny random models with the demo's tokenizer, examples for them, and processes that kill themselves."""

import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from nacd_fast import distilled
from nacd_fast.artifacts import file_digest, open_stage, write_atomic
from nacd_fast.config import ModelConfig
from nacd_fast.examples import Example
from nacd_fast.student import load_tokenizer

POSITIONS = 64
WIDTH = 32
WORDS = "the a cat dog river stone runs sleeps over under green small why where is it".split()


def make_model(folder: Path, family: str = "llama", scale: float = 0.2) -> str:
    """A random model of width 32 and depth 2 with its tokenizer, saved in `folder`; returns the folder."""
    tokenizer = load_tokenizer("demo")
    torch.manual_seed(0)
    model: PreTrainedModel
    if family == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=POSITIONS,
                initializer_range=scale,
            )
        )
    elif family == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_embd=WIDTH,
                n_inner=48,
                n_layer=2,
                n_head=4,
                n_positions=POSITIONS,
                initializer_range=scale,
            )
        )
    else:
        model = OPTForCausalLM(
            OPTConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                word_embed_proj_dim=WIDTH,
                max_position_embeddings=POSITIONS,
                init_std=scale,
                dropout=0.1,
                attention_dropout=0.1,
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_examples(n: int, seed: int = 0) -> list[Example]:
    draw = random.Random(seed)
    return [
        Example(
            f"x{seed}-{i}",
            "test",
            (
                {"role": "user", "content": " ".join(draw.choices(WORDS, k=draw.randint(1, 8)))},
                {"role": "assistant", "content": " ".join(draw.choices(WORDS, k=draw.randint(1, 5)))},
            ),
        )
        for i in range(n)
    ]


def kill_self(*args: Any, **kwargs: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def at_call(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose call of that number (from 0) is kill -9 instead."""
    left = [number]

    def call(*args: Any, **kwargs: Any) -> Any:
        if left[0] == 0:
            kill_self()
        left[0] -= 1
        return function(*args, **kwargs)

    return call


def run_killed(work: Callable[[], object]) -> None:
    """Run `work` in a process of its own and see it end by kill -9."""

    def child() -> None:
        torch.set_num_threads(1)  # a forked OpenMP pool hangs
        work()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def tree_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a finished stage but timing.json, which is no part of the result."""
    return {
        str(p.relative_to(folder)): file_digest(p)
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "timing.json"
    }


def make_distilled(folder: Path, model: str, examples: list[Example], prompts: Tensor) -> Path:
    """The distilled set of a matching stage that left `prompts`; returns the set's folder."""
    matched = folder / "matching"
    with open_stage(matched, {"inner_steps": 6, "seed": 3}):
        write_atomic(matched / "prompts.safetensors", save({"prompts": prompts}))
    config = ModelConfig(path=model, device="cpu")
    return distilled.run(folder / "distilled", config, examples, matched, {"matching": matched})
