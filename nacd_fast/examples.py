"""What an instruction set is made of: conversations, each with an id and the source that it came from."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Example:
    """One conversation; `choices` are candidates for its last response, `answer` the index of the right one."""

    id: str
    source: str
    messages: tuple[dict[str, str], ...]
    choices: tuple[str, ...] = ()
    answer: int | None = None


def digest(examples: Iterable[Example]) -> str:
    """SHA-256 over every field of every example, in order."""
    total = hashlib.sha256()
    for e in examples:
        total.update(json.dumps([e.id, e.source, e.messages, e.choices, e.answer], sort_keys=True).encode() + b"\n")
    return total.hexdigest()


def count_sources(examples: Iterable[Example]) -> dict[str, int]:
    """Samples by source, the largest first, then by name."""
    counts = Counter(e.source for e in examples)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def without_copies(examples: Sequence[Example]) -> list[Example]:
    """The first of all examples whose turns say the same, whatever their ids and sources; outer blanks do not count."""
    first: dict[bytes, Example] = {}
    for e in examples:
        turns = [(m["role"], m["content"].strip()) for m in e.messages]
        first.setdefault(hashlib.sha256(json.dumps(turns).encode()).digest(), e)
    return list(first.values())


def full_text(example: Example) -> str:
    """Every turn, a line each: what methods that look at words read."""
    return "\n".join(m["content"] for m in example.messages)


def choice_examples(example: Example) -> list[Example]:
    """One example a choice, its text in place of the last response; ids <id>#<index>."""
    last = max(i for i, m in enumerate(example.messages) if m["role"] == "assistant")
    head, tail = example.messages[:last], example.messages[last + 1 :]
    return [
        replace(
            example,
            id=f"{example.id}#{n}",
            choices=(),
            answer=None,
            messages=(*head, {"role": "assistant", "content": choice}, *tail),
        )
        for n, choice in enumerate(example.choices)
    ]
