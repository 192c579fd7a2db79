"""Small sets for tests, and the real ones where they are at hand."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from nacd_fast.examples import Example


def shared(name: str) -> Path:
    """A file of the shared real data, or a skip."""
    path = Path(os.environ.get("NACD_SHARED", Path(__file__).parents[2] / "shared")) / name
    if not path.exists():
        pytest.skip("no shared data")  # the real sets lie beside the checkout and are not shipped with it
    return path


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def talk(*contents: str, name: str = "x") -> Example:
    """user, assistant, user, ..."""
    return Example(name, "s", tuple(turn(("user", "assistant")[i % 2], c) for i, c in enumerate(contents)))


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def message_row(user: str = "Hi", assistant: str = "Hello", **more: object) -> dict[str, Any]:
    return {"messages": [turn("user", user), turn("assistant", assistant)], **more}
