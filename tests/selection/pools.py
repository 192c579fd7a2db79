"""Pools, targets and what else a selection method is given."""

from collections.abc import Sequence
from pathlib import Path

from nacd_fast.config import DataConfig, ModelConfig, SelectConfig
from nacd_fast.examples import Example
from nacd_fast.selection.method import Context


def numbered(n: int) -> list[Example]:
    """n samples of two sources, whose texts are their numbers."""
    return [Example(f"s{i}", "odd" if i % 2 else "even", ({"role": "assistant", "content": str(i)},)) for i in range(n)]


def spoken(*texts: str, source: str = "s") -> list[Example]:
    """A sample a text "question|response"."""
    return [
        Example(
            f"{source}{i}",
            source,
            tuple({"role": role, "content": part} for role, part in zip(("user", "assistant"), text.split("|"))),
        )
        for i, text in enumerate(texts)
    ]


def context(
    target: Sequence[Example] = (), model: str = "demo", store: Path = Path("nowhere"), rank: int = 2
) -> Context:
    return Context(target, ModelConfig(path=model, rank=rank, lora_alpha=2.0 * rank, device="cpu"), DataConfig(), store)


def write_ids(path: Path, content: str | bytes) -> SelectConfig:
    """A list of ids, as settings that select it."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return SelectConfig(method="ids", ids=str(path))
