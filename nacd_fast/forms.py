"""Sets as they are published -> examples. A row is one of

    {"messages": [{"role": "user" | "assistant" | "system", "content": text}, ...]}     (the LESS release's too)
    {"instruction", "input"?, "output"} (Alpaca), {"instruction", "context"?, "response"} (Dolly)
    {"prompt", "completion"}, {"inputs", "targets"} (Flan v2), {"inputs_pretokenized", "targets_pretokenized"} (P3)
    {"question", "answer", "rationale"}: a line of FLAN's chain-of-thought TSV, with \\n for a line's end
    {"question", "choices": {"text", "label"}, "answerKey"} (ARC), {"question", "choices", "answer"} (MMLU; choice0, ..)
    a message of an Open Assistant tree, nested ("replies"), or flat as on the hub ("message_id", "parent_id")

each with, at will, `id`, `source` (or one of SOURCES), and `choices` with `answer`, the index of the right one. Flat
forms are stripped of outer white space, since the template puts its own; messages stay as they are.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .errors import InputError
from .examples import Example
from .oasst import conversations, is_message
from .rows import SPLITS, Row, read_rows

ROLES = ("user", "assistant", "system")
FORMS = (  # question, what goes under it, response
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("prompt", "", "completion"),
    ("inputs", "", "targets"),
    ("inputs_pretokenized", "", "targets_pretokenized"),
)
SOURCES = {  # key -> the set that has it, put in front of its value
    "source": "",
    "dataset": "",
    "template": "p3/",
    "category": "dolly/",
    "_task_name": "flan_v2/",
    "task": "flan_v2/",
}
END_OF_TEXT = "<|endoftext|>"  # GPT-2's end, spelled out at the end of older prompt/completion files
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class EmptyResponse(InputError):
    """A row whose last response says nothing."""


def read_set(source: str, split: str, *, skip_empty: bool = False) -> list[Example]:
    """Every example of a set, in its order, with unique ids; missing ids are made: <file stem>-<line number>.

    source: `demo`, a file, a folder, a hub name `org/name` or `org/name:config`, one of rows.TASKS, or several of them
    with commas between; split: one of SPLITS. In a folder the files that are named after the split are read; all of
    them, where none is named after any split. skip_empty: rows whose response is empty are left out, not refused.
    """
    if split not in SPLITS:
        raise InputError(f"split={split!r}: must be one of {', '.join(SPLITS)}")
    examples: list[Example] = []
    places: dict[str, str] = {}
    for example, place in parse_rows(read_rows(source, split), skip_empty):
        first = places.setdefault(example.id, place)
        if first != place:
            raise InputError(f"{place}: id {example.id!r} is also that of {first}; ids must be unique")
        examples.append(example)
    if not examples:
        raise InputError(f"{source}: the set is empty")
    return examples


def parse_rows(rows: Iterable[Row], skip_empty: bool) -> Iterator[tuple[Example, str]]:
    """Examples and where each stands; messages of trees become conversations at the end, when all are known."""
    messages: list[Row] = []
    empty = 0
    for row in rows:
        if is_message(row.value):
            messages.append(row)
            continue
        try:
            yield parse_row(row), row.place
        except EmptyResponse:
            if not skip_empty:
                raise
            empty += 1
    if empty:
        print(f"{empty:,} rows without a response are left out", file=sys.stderr)
    for name, turns, place in conversations(messages):
        yield Example(name, "oasst1", checked_messages(list(turns), place)), place


def parse_row(row: Row) -> Example:
    value = row.value
    if not isinstance(value, dict):
        raise InputError(f"{row.place}: must be an object, not {type(value).__name__}")
    given = value.get("id")
    name = f"{row.stem}-{row.number}" if given is None else parse_id(given, row.place)
    place = row.place if given is None else f"{row.place} (id {name!r})"
    if "question" in value and "messages" not in value:
        return question_example(name, row.stem, value, place)
    messages = parse_messages(value["messages"], place) if "messages" in value else flat_messages(value, place)
    choices, answer = parse_choices(value, place)
    return Example(name, source_of(value, row.stem, place), checked_messages(messages, place), choices, answer)


def parse_id(given: Any, place: str) -> str:
    name = text(str(given) if type(given) is int else given, "id", place)
    if name.splitlines() != [name] or name != name.strip() or name.startswith("#"):
        raise InputError(f"{place}: id={name!r}: must be one line of text without outer blanks or a leading #")
    return name


def source_of(value: Mapping[str, Any], stem: str, place: str) -> str:
    key = next((key for key in SOURCES if value.get(key)), "")
    return SOURCES[key] + text(value[key], key, place) if key else stem


# --- conversations ----------------------------------------------------------------------------------------------------


def parse_messages(turns: Any, place: str) -> list[dict[str, str]]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise InputError(f"{place}: messages must be a list of objects with role and content")
    for turn in turns:
        if turn.get("role") not in ROLES:
            raise InputError(f"{place}: role={turn.get('role')!r}: must be one of {', '.join(ROLES)}")
    return [{"role": turn["role"], "content": text(turn.get("content"), "content", place)} for turn in turns]


def checked_messages(messages: list[dict[str, str]], place: str) -> tuple[dict[str, str], ...]:
    """With a response that says something."""
    responses = [m["content"] for m in messages if m["role"] == "assistant"]
    if not responses:
        raise InputError(f"{place}: the conversation has no assistant turn")
    if not responses[-1].strip():
        raise EmptyResponse(f"{place}: the response is empty (skip_empty leaves such rows out)")
    return tuple(messages)


def pair(question: str, response: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": response}]


def flat_messages(value: Mapping[str, Any], place: str) -> list[dict[str, str]]:
    """Question and response of one of FORMS; the question's context goes under it."""
    for question, context, response in FORMS:
        if question in value and response in value:
            parts = [text(value.get(key), key, place).strip() for key in (question, context)]
            reply = text(value[response], response, place).strip().removesuffix(END_OF_TEXT).strip()
            return pair("\n".join(filter(None, parts)), reply)
    raise InputError(
        f"{place}: unknown form with the keys {', '.join(map(str, value)) or '(none)'}; known are messages, "
        + ", ".join(f"{question} + {response}" for question, _, response in FORMS)
        + ", and questions"
    )


def text(value: Any, name: str, place: str) -> str:
    if value is not None and not isinstance(value, str):
        raise InputError(f"{place}: {name} must be text, not {type(value).__name__}")
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        raise InputError(f"{place}: {name} holds half a surrogate pair, which is no character") from None
    return value or ""


def parse_choices(value: Mapping[str, Any], place: str) -> tuple[tuple[str, ...], int | None]:
    choices, answer = value.get("choices"), value.get("answer")
    if not choices:
        return (), None  # without choices `answer` is some other column
    if not isinstance(choices, list) or not all(text(c, "choice", place).strip() for c in choices):
        raise InputError(f"{place}: choices must be a list of texts, none of them empty")
    if answer is not None and (type(answer) is not int or not 0 <= answer < len(choices)):
        raise InputError(f"{place}: answer={answer!r}: must be the index of one of the {len(choices)} choices, from 0")
    return tuple(choices), answer


# --- questions --------------------------------------------------------------------------------------------------------


def question_example(name: str, stem: str, value: Mapping[str, Any], place: str) -> Example:
    """A question with a rationale (chain of thought), or with choices, of which the right one is the response."""
    question = text(value["question"], "question", place).strip()
    if "rationale" in value:
        why, answer = (text(value.get(key), key, place).strip() for key in ("rationale", "answer"))
        reply = f"{why}\nThe answer is {answer.removesuffix('.')}."
        source = f"cot/{stem.removesuffix('_train')}"
        return Example(name, source, checked_messages(pair(question, reply), place))
    choices, index = parse_choices(numbered_choices(value, place), place)
    if index is None:
        raise InputError(f"{place}: a question needs choices, and an answer among them")
    kind = "arc" if "answerKey" in value else f"mmlu/{value.get('subject') or stem.rpartition('_')[0] or stem}"
    source = next((text(value[key], key, place) for key in ("source", "dataset") if value.get(key)), kind)
    return Example(name, source, checked_messages(pair(question, choices[index]), place), choices, index)


def numbered_choices(value: Mapping[str, Any], place: str) -> dict[str, Any]:
    """{"choices": [text, ..], "answer": index} of ARC's labelled choices, MMLU's columns, or as they are."""
    given = value.get("choices")
    if isinstance(given, Mapping):
        texts, labels, key = list(given.get("text") or ()), list(given.get("label") or ()), value.get("answerKey")
        if len(texts) != len(labels) or key not in labels:
            raise InputError(f"{place}: answerKey={key!r}: must be one of the labels {labels} of {len(texts)} choices")
        return {"choices": texts, "answer": labels.index(key)}
    if "choice0" in value:
        columns = [key for key in value if key.removeprefix("choice").isdigit()]
        given = [value[key] for key in columns]
    answer = value.get("answer")
    if isinstance(answer, str):  # of a CSV file, or a letter
        answer = int(answer) if answer.isdecimal() else LETTERS.find(answer) if len(answer) == 1 else answer
    return {"choices": given, "answer": answer}
