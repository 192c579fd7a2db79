"""`nacd select`: one selection by itself, with its tables."""

from dataclasses import replace
from pathlib import Path

from ..config import DataConfig, SelectionConfig
from ..examples import Example, without_copies
from ..forms import read_set
from . import stage, summary
from .method import Context, kept_count


def read_pool(config: SelectionConfig) -> list[Example]:
    """The full set, without copies unless they are asked for."""
    pool = read_set(config.pool, "train", skip_empty=config.skip_empty)
    return without_copies(pool) if config.deduplicate else pool


def plan(config: SelectionConfig, pool: list[Example]) -> str:
    by = f" for {config.target}" if config.target else ""
    kept = "" if config.ids else f"{kept_count(len(pool), config.fraction):,} of "
    return f"select: {kept}{len(pool):,} samples by {config.method}{by}; out {config.out}"


def run(config: SelectionConfig, pool: list[Example]) -> Path:
    """Select, print the tables, and return the folder."""
    target = read_set(config.target, config.target_split) if config.target else []
    folder = Path(config.out)
    context = Context(
        target,
        replace(config.lora, path=config.model or config.lora.path),
        DataConfig(template=config.template, max_tokens=config.max_tokens),
        folder.with_name(folder.name + ".store"),
    )
    stage.run(folder, pool, config, config.seed, context)
    summary.show(folder, pool)
    return folder
