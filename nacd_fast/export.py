"""A distilled set for other trainers: conversations with the decoded prompts in place.

    <out>/train.jsonl           a sample a line, {"id", "source", "messages": [{"role", "content"}]}
    <out>/dataset_info.json     its entry for LLaMA-Factory
    <out>/axolotl.yaml          its entry for Axolotl
    <out>/prompts.safetensors   prompts [n, k, D], as in the distilled set
    <out>/README.md             the set's card

TRL takes train.jsonl as it is (`load_dataset("json", data_files=...)` -> SFTTrainer). A prompt stands at the start of
the first turn, on a line of its own: what a trainer tokenises is one text, and a line's end keeps the last token of the
prompt from growing into the first word.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .arguments import Parser
from .artifacts import write_atomic, write_json
from .distilled import load_distilled
from .errors import InputError

FILE = "train.jsonl"
LLAMA_FACTORY = {
    "distilled": {
        "file_name": FILE,
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    }
}
AXOLOTL = {
    "datasets": [{"path": FILE, "ds_type": "json", "type": "chat_template", "field_messages": "messages"}],
}


def with_prompt(messages: Sequence[dict[str, str]], prompt: str) -> list[dict[str, str]]:
    """The conversation with the prompt on a line of its own at the start of its first turn."""
    first, *others = messages
    content = f"{prompt}\n{first['content']}" if prompt else first["content"]
    return [{"role": first["role"], "content": content}, *others]


def run(folder: Path, out: Path) -> Path:
    """Write `out`, which must be new or empty. Returns it."""
    distilled = load_distilled(folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: must be a new or empty folder")
    rows: list[dict[str, Any]] = [
        {
            "id": row["id"],
            "source": row["source"],
            "messages": with_prompt(row["messages"], row["prompt_text"]),
        }
        for row in distilled.samples.to_list()
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    card = (
        (folder / "README.md").read_text(encoding="utf-8").replace("data_files: dataset.parquet", f"data_files: {FILE}")
    )
    write_atomic(out / "prompts.safetensors", (folder / "prompts.safetensors").read_bytes())
    write_json(out / "dataset_info.json", LLAMA_FACTORY)
    write_atomic(out / "axolotl.yaml", yaml.safe_dump(AXOLOTL, sort_keys=False).encode())
    write_atomic(out / "README.md", card.encode())
    write_atomic(out / FILE, lines.encode())
    return out


def command(arguments: Sequence[str]) -> None:
    """`nacd export DISTILLED OUT`."""
    parser = Parser(prog="nacd export", description="A distilled set for TRL, Axolotl and LLaMA-Factory.")
    parser.add_argument("distilled", metavar="DISTILLED", type=Path, help="folder of a distilled set")
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder for the files")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    found = parser.parse_args(arguments)
    print(f"export: {run(found.distilled, found.out)}")


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["export", *sys.argv[1:]]))
