"""Open Assistant trees -> conversations (Köpf et al., arXiv 2304.07327).

A tree is a prompt with replies to it, replies to those, and so on; prompters and assistants take turns, and volunteers
ranked the assistants' replies, 0 the best. A conversation is a path from the root that takes the best-ranked reply at
each assistant's turn and any at a prompter's, down to the last assistant: so one tree gives a conversation for every
follow-up that was answered. Deleted messages are passed over with what hangs on them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .errors import InputError
from .rows import Row

ROLE_OF = {"prompter": "user", "assistant": "assistant"}
Turns = tuple[dict[str, str], ...]


def is_message(value: Any) -> bool:
    """A message, or a tree of them under `prompt`."""
    return isinstance(value, Mapping) and ("message_id" in value or "message_tree_id" in value)


def conversations(rows: Sequence[Row]) -> Iterator[tuple[str, Turns, str]]:
    """(id of the last message, turns, where its root stands), in the order of the roots."""
    roots: list[tuple[Mapping[str, Any], str]] = []
    replies: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        message = row.value.get("prompt", row.value)
        if not isinstance(message, Mapping) or "message_id" not in message or message.get("role") not in ROLE_OF:
            raise InputError(f"{row.place}: a message of a tree needs message_id and the role prompter or assistant")
        if message.get("parent_id") is None:
            roots.append((message, row.place))
        else:
            replies.setdefault(message["parent_id"], []).append(message)
    for root, place in roots:
        if root.get("deleted"):
            continue
        if root["role"] != "prompter":
            raise InputError(f"{place}: role={root['role']!r}: a tree begins with a prompter")
        for name, turns in paths(root, (), replies):
            yield name, turns, place


def paths(
    prompt: Mapping[str, Any], before: Turns, replies: Mapping[str, list[Mapping[str, Any]]]
) -> Iterator[tuple[str, Turns]]:
    """The conversations that go on with this prompt; none where nobody answered it."""
    answers = answered(prompt, replies, "assistant")
    if not answers:
        return
    best = min(answers, key=lambda message: message["rank"] if message.get("rank") is not None else len(answers))
    turns = (*before, turn(prompt), turn(best))
    further = [path for follow_up in answered(best, replies, "prompter") for path in paths(follow_up, turns, replies)]
    yield from further or [(best["message_id"], turns)]


def answered(
    message: Mapping[str, Any], replies: Mapping[str, list[Mapping[str, Any]]], role: str
) -> list[Mapping[str, Any]]:
    """The replies to a message that were not deleted."""
    found = message.get("replies") or replies.get(message["message_id"], [])
    return [reply for reply in found if reply.get("role") == role and not reply.get("deleted")]


def turn(message: Mapping[str, Any]) -> dict[str, str]:
    return {"role": ROLE_OF[message["role"]], "content": str(message.get("text") or "").strip()}
