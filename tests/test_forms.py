"""Reading sets: every form in every kind of file, every error, and the real sets where they are at hand."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nacd_fast.errors import InputError
from nacd_fast.examples import count_sources
from nacd_fast.forms import read_set
from tests.sets import message_row, shared, turn, write_lines

# Reading


FORMS: dict[str, dict[str, Any]] = {
    "messages": message_row("Name two.\nfruits", "Fig, kiwi"),
    "alpaca": {"instruction": "Name two.", "input": "fruits", "output": "Fig, kiwi"},
    "dolly": {"instruction": "Name two.", "context": "fruits", "response": "Fig, kiwi", "category": "open_qa"},
    "prompt": {"prompt": "Name two.\nfruits\n", "completion": " Fig, kiwi<|endoftext|>"},
    "flan": {"inputs": "Name two.\nfruits", "targets": "Fig, kiwi", "_template_type": "zs_opt"},
    "p3": {"inputs_pretokenized": "Name two.\nfruits", "targets_pretokenized": "\nFig, kiwi"},
}


def write_jsonl(path: Path, rows: list[Any]) -> None:
    write_lines(path, *rows)


def write_gzip(path: Path, rows: list[Any]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def write_list(path: Path, rows: list[Any]) -> None:
    path.write_text(json.dumps(rows, indent=2), encoding="utf-8")


def write_parquet(path: Path, rows: list[Any]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS: dict[str, tuple[str, Callable[[Path, list[Any]], None]]] = {
    "jsonl": ("set.jsonl", write_jsonl),
    "gzip": ("set.jsonl.gz", write_gzip),
    "json list": ("set.json", write_list),
    "json lines": ("set.json", write_jsonl),
    "parquet": ("set.parquet", write_parquet),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", WRITERS)
def test_every_form_in_every_file_kind(tmp_path: Path, form: str, kind: str) -> None:
    name, write = WRITERS[kind]
    row = FORMS[form]
    write(tmp_path / name, [{**row, "id": None, "source": None}, {**row, "id": "mine", "source": "web"}])
    first, second = read_set(str(tmp_path / name), "train")
    assert first.messages == second.messages == (turn("user", "Name two.\nfruits"), turn("assistant", "Fig, kiwi"))
    assert (first.id, second.id) == ("set-1", "mine")
    assert (first.source, second.source) == ("dolly/open_qa" if form == "dolly" else "set", "web")


def test_choices_and_answer(tmp_path: Path) -> None:
    rows = [
        message_row(choices=["Hello", "Bye"], answer=0),
        message_row(choices=None, answer=None),
        message_row(answer="some other column"),
    ]
    for name, write in WRITERS.values():
        if name.endswith(".parquet"):
            rows = rows[:2]  # one type a column
        write(tmp_path / name, rows)
        found = read_set(str(tmp_path / name), "train")
        assert [(e.choices, e.answer) for e in found] == [(("Hello", "Bye"), 0), ((), None), ((), None)][: len(rows)]


def test_missing_context_is_no_line(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "a.jsonl",
        {"instruction": "Say hi", "output": "Hi"},
        {"instruction": "Say hi", "input": None, "output": "Hi"},
    )
    assert [e.messages[0]["content"] for e in read_set(str(path), "train")] == ["Say hi", "Say hi"]


def test_whole_conversation_is_kept(tmp_path: Path) -> None:
    turns = [
        turn("system", "Be brief."),
        turn("user", " a "),
        turn("assistant", "b\n"),
        turn("user", "c"),
        turn("assistant", "日本語 😀"),
        turn("user", "e"),
    ]
    path = write_lines(tmp_path / "a.jsonl", {"messages": [{**t, "weight": 1} for t in turns]})
    assert list(read_set(str(path), "train")[0].messages) == turns


def test_crlf_bom_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(message_row("é\u2028x", "ü\r\nz"), ensure_ascii=False), "", "  ", json.dumps(message_row())]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    found = read_set(str(path), "train")
    assert [e.id for e in found] == ["a-1", "a-4"]
    assert found[0].messages[0]["content"] == "é\u2028x" and found[0].messages[1]["content"] == "ü\r\nz"
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf[\r\n" + json.dumps(message_row()).encode() + b"\r\n]\r\n")
    assert [e.id for e in read_set(str(tmp_path / "b.json"), "train")] == ["b-1"]


def test_folder_reads_the_split_or_all(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    write_lines(parts / "b.jsonl", message_row())
    write_list(parts / "a.json", [message_row()])
    (parts / "README.md").write_text("about")
    (parts / "config.json").write_text("{}")  # a stage's own
    assert [e.id for e in read_set(str(parts), "validation")] == ["a-1", "b-1"]
    write_parquet(parts / "train-00000-of-00002.parquet", [message_row()])
    write_lines(parts / "train-00001-of-00002.jsonl", message_row())
    assert [e.id for e in read_set(str(parts), "train")] == ["train-00000-of-00002-1", "train-00001-of-00002-1"]


def test_demo_sets() -> None:
    sizes = {split: len(read_set("demo", split)) for split in ("train", "validation", "test")}
    assert sizes == {"train": 2000, "validation": 300, "test": 700}
    for example in read_set("demo", "test"):
        assert example.choices[example.answer or 0] == example.messages[-1]["content"]
    train, test = ({json.dumps(e.messages) for e in read_set("demo", split)} for split in ("train", "test"))
    assert not train & test


def test_hub_set_goes_through_load_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    (tmp_path / "set").mkdir()
    write_parquet(tmp_path / "set" / "train.parquet", [FORMS["dolly"], {**FORMS["dolly"], "response": "Plum"}])
    real, asked = datasets.load_dataset, []

    def load(name: str, config: str | None, split: str) -> Any:
        asked.append((name, config, split))
        return real(str(tmp_path / "set"), split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = read_set("org/dolly-15k:en", "train")
    assert [e.id for e in found] == ["dolly-15k-1", "dolly-15k-2"] and found[1].messages[-1]["content"] == "Plum"
    read_set("org/dolly-15k", "train")
    assert asked == [("org/dolly-15k", "en", "train"), ("org/dolly-15k", None, "train")]
    with pytest.raises(InputError, match=r"org/dolly-15k: no such file or folder, and its split 'test' cannot"):
        read_set("org/dolly-15k", "test")


def test_hub_set_with_a_broken_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"prompt": "a"}\n{"prom')
    real = datasets.load_dataset
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, config, split: real(str(tmp_path / "set"), split=split, cache_dir=str(tmp_path / "cache")),
    )
    with pytest.raises(InputError, match=r"^org/set: no such file or folder, and its split 'train' cannot be loaded"):
        read_set("org/set", "train")


def test_hub_without_network_is_an_input_error() -> None:
    code = (
        "from nacd_fast.forms import read_set\nfrom nacd_fast.errors import InputError\n"
        "try: read_set('no-such-org/no-such-set', 'train')\nexcept InputError as error: print(error)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        text=True,
        capture_output=True,
        cwd=Path(__file__).parents[1],
        check=True,
    ).stdout
    assert shown.startswith("no-such-org/no-such-set: no such file or folder, and its split 'train' cannot be loaded")
    assert shown.count("\n") == 1


# Sets as they are published


GOOD_ROW = message_row()


def test_flan_cot_and_less_rows_name_their_source(tmp_path: Path) -> None:
    rows = [
        {"inputs": "Q", "targets": "A", "_task_name": "rte", "_template_type": "zs_noopt"},
        {"inputs": "Q", "targets": "A", "task": "gsm8k"},
        {"prompt": "Q", "completion": "A", "template": "sciq"},
        {"dataset": "cot", "id": "cot_7", **message_row("Q", "A")},
    ]
    found = read_set(str(write_lines(tmp_path / "a.jsonl", *rows)), "train")
    assert [e.source for e in found] == ["flan_v2/rte", "flan_v2/gsm8k", "p3/sciq", "cot"]
    assert found[3].id == "cot_7" and all(e.messages[0]["content"] == "Q" for e in found)


def test_chain_of_thought_files(tmp_path: Path) -> None:
    line = "Half of 8?\\nOptions:\\n(A) 3\\n(B) 4\t(B)\t8 / 2 = 4.\\nSo it is 4.\r\n\n"
    (tmp_path / "gsm8k_train.tsv").write_text("\ufeff" + line + "Why?\tit is.\tBecause.\n", encoding="utf-8")
    first, second = read_set(str(tmp_path), "train")
    assert (first.id, first.source, second.id) == ("gsm8k_train-1", "cot/gsm8k", "gsm8k_train-3")
    assert first.messages == (
        turn("user", "Half of 8?\nOptions:\n(A) 3\n(B) 4"),
        turn("assistant", "8 / 2 = 4.\nSo it is 4.\nThe answer is (B)."),
    )
    assert second.messages[-1]["content"] == "Because.\nThe answer is it is."


def test_arc_and_mmlu_on_the_hub_and_in_files(tmp_path: Path) -> None:
    arc = {
        "id": "M_1",
        "question": "Which?",
        "choices": {"text": ["ice", "fire"], "label": ["1", "2"]},
        "answerKey": "2",
    }
    mmlu = {"question": "Which?", "subject": "anatomy", "choices": ["ice", "fire"], "answer": 1}
    letter = {"question": "Which?", "choices": ["ice", "fire"], "answer": "B", "source": "mine"}
    write_lines(tmp_path / "a.jsonl", arc, mmlu, letter)
    (tmp_path / "anatomy_dev.csv").write_text('question,choice0,choice1,answer\n"Which,\nof two?",ice,"fire ""x""",0\n')
    *three, fourth = read_set(str(tmp_path), "train")
    assert [e.source for e in three] == ["arc", "mmlu/anatomy", "mine"]
    for e in three:
        assert e.messages == (turn("user", "Which?"), turn("assistant", "fire"))
        assert (e.choices, e.answer) == (("ice", "fire"), 1)
    assert (fourth.id, fourth.source, fourth.choices) == ("anatomy_dev-3", "mmlu/anatomy", ("ice", 'fire "x"'))
    assert fourth.messages == (turn("user", "Which,\nof two?"), turn("assistant", "ice"))


def said(name: str, role: str, **more: object) -> dict[str, Any]:
    return {"message_id": name, "role": role, "text": f"{name}.", **more}


def test_a_tree_gives_the_paths_of_best_replies(tmp_path: Path) -> None:
    late = [said("u1", "prompter", replies=[said("a3", "assistant")]), said("u2", "prompter")]
    replies = [
        said("a0", "assistant", rank=1, replies=[said("u0", "prompter", replies=[said("ax", "assistant")])]),
        said("a1", "assistant", rank=0, replies=[*late, said("u3", "prompter", replies=[said("a4", "assistant")])]),
        said("a2", "assistant", rank=0, deleted=True),
        said("a5", "assistant"),
    ]
    root = said("p", "prompter", replies=replies)
    tree = {"message_tree_id": "p", "prompt": root}
    found = read_set(str(write_lines(tmp_path / "a.jsonl", tree)), "train")
    assert [(e.id, [m["content"] for m in e.messages]) for e in found] == [
        ("a3", ["p.", "a1.", "u1.", "a3."]),
        ("a4", ["p.", "a1.", "u3.", "a4."]),
    ]
    assert {e.source for e in found} == {"oasst1"} and found[0].messages[1]["role"] == "assistant"

    def flat(message: dict[str, Any], parent: str | None) -> list[dict[str, Any]]:
        mine = {**{key: value for key, value in message.items() if key != "replies"}, "parent_id": parent}
        return [mine, *(row for reply in message.get("replies", []) for row in flat(reply, message["message_id"]))]

    rows = flat(root, None)  # as the hub has them: a message a row
    hub = read_set(str(write_lines(tmp_path / "b.jsonl", *rows[::-1], said("q", "prompter", parent_id=None))), "train")
    assert sorted((e.id, len(e.messages)) for e in hub) == [("a3", 4), ("a4", 4)]


def test_several_sets_with_commas_between(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", message_row())
    write_lines(tmp_path / "b.jsonl", message_row())
    found = read_set(f"{tmp_path / 'a.jsonl'}, {tmp_path / 'b.jsonl'}", "train")
    assert [e.id for e in found] == ["a-1", "b-1"]
    write_lines(tmp_path / "c,d.jsonl", message_row())
    assert [e.id for e in read_set(str(tmp_path / "c,d.jsonl"), "train")] == ["c,d-1"]


def test_a_benchmark_by_name_is_its_hub_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[str, ...]] = []

    def load(*names: str, split: str) -> list[dict[str, Any]]:
        asked.append((*names, split))
        return [GOOD_ROW]

    monkeypatch.setattr(datasets, "load_dataset", load)
    read_set("arc_easy", "validation")
    read_set("mmlu", "train")
    assert asked == [("allenai/ai2_arc", "ARC-Easy", "validation"), ("cais/mmlu", "all", "train")]


def test_a_split_is_a_word_of_the_file_name(tmp_path: Path) -> None:
    for name in ("ARC-Easy-train", "ARC-Easy-validation", "constrained"):
        write_lines(tmp_path / f"{name}.jsonl", message_row())
    assert [e.id for e in read_set(str(tmp_path), "validation")] == ["ARC-Easy-validation-1"]
    assert [e.id for e in read_set(str(tmp_path), "train")] == ["ARC-Easy-train-1"]


def test_skip_empty_leaves_out_rows_without_a_response_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(tmp_path / "a.jsonl", message_row(), message_row(assistant=" "), message_row("x"))
    assert [e.id for e in read_set(str(path), "train", skip_empty=True)] == ["a-1", "a-3"]
    assert capsys.readouterr().err == "1 rows without a response are left out\n"
    write_lines(path, {"messages": [turn("user", "x")]})
    with pytest.raises(InputError, match="has no assistant turn"):
        read_set(str(path), "train", skip_empty=True)


# Errors: (file name, content, what the message must say)

GOOD = json.dumps(message_row())
NO_ASSISTANT = json.dumps({"messages": [turn("user", "Hi")]})
ERRORS: dict[str, tuple[str, str | bytes, str]] = {
    "malformed line": ("a.jsonl", f"{GOOD}\n\n{{oops\n", r"a\.jsonl, line 3: malformed JSON \("),
    "malformed list": ("a.json", f"[{GOOD},\n{GOOD}\n{GOOD}]", r"a\.json, line 3: malformed JSON \("),
    "nested too deep": ("a.jsonl", "[" * 200_000, r"a\.jsonl, line 1: malformed JSON \("),
    "huge number": ("a.jsonl", f"{GOOD}\n{'9' * 5000}", r"a\.jsonl, line 2: malformed JSON \("),
    "not utf-8": ("a.jsonl", GOOD.encode() + b"\n\xff\n", r"a\.jsonl, line 2: not UTF-8 \(byte 0xff\)"),
    "not utf-8 in a list": ("a.json", b"[\n\n\xff]", r"a\.json, line 3: not UTF-8"),
    "half a surrogate": ("a.jsonl", json.dumps(message_row("\ud800")), r"a\.jsonl, line 1: content holds half a surro"),
    "not gzip": ("a.jsonl.gz", GOOD, r"a\.jsonl\.gz: cannot be read \("),
    "torn gzip": ("a.jsonl.gz", gzip.compress(GOOD.encode())[:-12], r"a\.jsonl\.gz: cannot be read \("),
    "bad gzip block": (
        "a.jsonl.gz",
        gzip.compress(GOOD.encode())[:10] + b"\xff" * 40,
        r"a\.jsonl\.gz: cannot be read \(",
    ),
    "not parquet": ("a.parquet", GOOD, r"a\.parquet: not a Parquet file \("),
    "other suffix": ("a.xml", GOOD, r"a\.xml: must end in \.jsonl\.gz, \.jsonl, \.json, \.parquet, \.tsv, \.csv"),
    "row is no object": ("a.jsonl", "[1]", r"a\.jsonl, line 1: must be an object, not list"),
    "unknown form": (
        "a.jsonl",
        f'{GOOD}\n{{"query": "q", "reply": "r"}}',
        r"line 2: unknown form with the keys query, reply;",
    ),
    "no keys": ("a.jsonl", "{}", r"line 1: unknown form with the keys \(none\);"),
    "empty response": (
        "a.jsonl",
        f"{GOOD}\n{json.dumps(message_row(assistant=' '))}",
        r"a\.jsonl, line 2: the response is empty",
    ),
    "empty response, id": (
        "a.jsonl",
        json.dumps(message_row(assistant="", id=7)),
        r"line 1 \(id '7'\): the response is empty",
    ),
    "null response": ("a.jsonl", '{"prompt": "a", "completion": null}', r"line 1: the response is empty"),
    "end mark only": ("a.jsonl", '{"prompt": "a", "completion": "<|endoftext|>"}', r"line 1: the response is empty"),
    "empty file": ("a.jsonl", "", r"a\.jsonl: the set is empty"),
    "empty list": ("a.json", "[]", r"a\.json: the set is empty"),
    "no assistant": ("a.jsonl", NO_ASSISTANT, r"a\.jsonl, line 1: the conversation has no assistant turn"),
    "no turns": ("a.jsonl", '{"messages": []}', r"line 1: the conversation has no assistant turn"),
    "messages no list": ("a.jsonl", '{"messages": "hi"}', r"line 1: messages must be a list of objects"),
    "turn no object": ("a.jsonl", '{"messages": ["hi"]}', r"line 1: messages must be a list of objects"),
    "unknown role": (
        "a.jsonl",
        '{"messages": [{"role": "gpt", "content": "a"}]}',
        r"line 1: role='gpt': must be one of user, assistant, system",
    ),
    "content no text": (
        "a.jsonl",
        '{"messages": [{"role": "user", "content": 1}]}',
        r"line 1: content must be text, not int",
    ),
    "output no text": ("a.jsonl", '{"instruction": "a", "output": ["b"]}', r"line 1: output must be text, not list"),
    "answer out of range": (
        "a.jsonl",
        json.dumps(message_row(choices=["a", "b"], answer=2)),
        r"line 1: answer=2: must be the index of one of the 2",
    ),
    "answer negative": (
        "a.jsonl",
        json.dumps(message_row(choices=["a", "b"], answer=-1)),
        r"line 1: answer=-1: must be the index",
    ),
    "answer no integer": (
        "a.jsonl",
        json.dumps(message_row(choices=["a", "b"], answer=True)),
        r"line 1: answer=True: must be the index",
    ),
    "choices no list": (
        "a.jsonl",
        json.dumps(message_row(choices={"text": ["a"]})),
        r"line 1: choices must be a list of texts",
    ),
    "empty choice": (
        "a.jsonl",
        json.dumps(message_row(choices=["a", " "], answer=0)),
        r"line 1: choices must be a list of texts",
    ),
    "duplicate id": (
        "a.jsonl",
        f"{json.dumps(message_row(id='a-2'))}\n{GOOD}",
        r"line 2: id 'a-2' is also that of .*a\.jsonl, line 1; ids must be unique",
    ),
    "blank id": ("a.jsonl", json.dumps(message_row(id=" ")), r"line 1: id=' ': must be one line of text"),
    "outer blanks in id": ("a.jsonl", json.dumps(message_row(id="a ")), r"line 1: id='a ': must be one line of text"),
    "two lines in id": ("a.jsonl", json.dumps(message_row(id="a\nb")), r"line 1: id='a\\nb': must be one line of text"),
    "id no text": ("a.jsonl", json.dumps(message_row(id=[1])), r"line 1: id must be text, not list"),
    "source no text": ("a.jsonl", json.dumps(message_row(source=3)), r"line 1: source must be text, not int"),
    "columns of a TSV": (
        "a.tsv",
        "Q\tA\tR\nQ\tA\n",
        r"a\.tsv, line 2: 2 columns: must be 3, question, answer, rationale",
    ),
    "TSV not UTF-8": ("a.tsv", b"Q\tA\tR\nQ\t\xff\tR\n", r"a\.tsv, line 2: not UTF-8 \(byte 0xff\)"),
    "columns of a CSV": ("a.csv", "question,answer\nQ\n", r"a\.csv, line 2: must have 2 columns"),
    "CSV quotes": ("a.csv", 'question,answer\n"Q"x,1\n', r"a\.csv, line 2: malformed CSV"),
    "question alone": ("a.jsonl", '{"question": "Q"}', "line 1: a question needs choices, and an answer among them"),
    "ARC key": (
        "a.jsonl",
        '{"question": "Q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "C"}',
        r"line 1: answerKey='C': must be one of the labels \['A', 'B'\] of 2 choices",
    ),
    "MMLU answer": (
        "a.jsonl",
        '{"question": "Q", "choices": ["x", "y"], "answer": "E"}',
        "line 1: answer=4: must be the index of one of the 2 choices, from 0",
    ),
    "tree without roles": (
        "a.jsonl",
        '{"message_id": "m", "text": "x"}',
        "line 1: a message of a tree needs message_id",
    ),
    "tree from an assistant": (
        "a.jsonl",
        '{"message_id": "m", "role": "assistant", "text": "x"}',
        "line 1: role='assistant': a tree begins with a prompter",
    ),
    "comment as id": ("a.jsonl", json.dumps(message_row(id="#a")), r"line 1: id='#a': must be one line of text"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_file_is_one_sentence(tmp_path: Path, case: str) -> None:
    name, content, says = ERRORS[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError, match=says) as caught:
        read_set(str(tmp_path / name), "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["nothing.jsonl", "no/such.jsonl", "./no/set", "/no/set", "nothing", "a/b/c"])
def test_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"^{source}: no such file or folder$"):
        read_set(source, "train")


def test_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"holds no \.jsonl\.gz, \.jsonl, \.json, \.parquet, \.tsv, \.csv file"):
        read_set(str(tmp_path), "train")


def test_folder_of_other_splits_does_not_leak(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", message_row())
    with pytest.raises(InputError, match="holds no file that is named 'validation'"):
        read_set(str(tmp_path), "validation")


def test_duplicate_ids_across_files(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", message_row(id="x"))
    write_lines(tmp_path / "b.jsonl", message_row(id="x"))
    with pytest.raises(InputError, match=r"b\.jsonl, line 1: id 'x' is also that of .*a\.jsonl, line 1"):
        read_set(str(tmp_path), "train")


def test_unknown_split() -> None:
    with pytest.raises(InputError, match="split='dev': must be one of train, validation, test"):
        read_set("demo", "dev")


# Real sets


def test_real_dolly() -> None:
    examples = read_set(str(shared("data/dolly/databricks-dolly-15k.reassembled.jsonl")), "train")
    assert len(examples) == 15_011 and count_sources(examples)["dolly/open_qa"] > 3000


def test_real_p3_has_empty_responses(tmp_path: Path) -> None:
    source = shared("data/p3_50k.jsonl.gz")
    with pytest.raises(InputError, match=r"p3_50k\.jsonl\.gz, line 44938: the response is empty \(skip_empty leaves"):
        read_set(str(source), "train")
    assert len(read_set(str(source), "train", skip_empty=True)) == 53_785
    with gzip.open(source, "rb") as f, gzip.open(tmp_path / "p3.jsonl.gz", "wb", compresslevel=1) as out:
        out.writelines(f.readline() for _ in range(3000))
    examples = read_set(str(tmp_path / "p3.jsonl.gz"), "train")
    assert len(examples) == 3000 and examples[-1].id == "p3-3000" and len(count_sources(examples)) > 5
    assert not any("<|endoftext|>" in m["content"] for e in examples for m in e.messages)


def test_real_files_of_other_forms() -> None:
    for name, says in (
        ("seed_tasks.jsonl", "line 1 .*unknown form with the keys id, name, instruction, instances"),
        ("oasst1/en_100_text.jsonl", "line 1: must be an object, not str"),
    ):
        with pytest.raises(InputError, match=says):
            read_set(str(shared(f"data/{name}")), "train")


@pytest.mark.parametrize(
    "name, split, samples, sources",
    [
        ("cot_flan", "train", 33_443, 7),
        ("oasst1/en_100_tree.jsonl", "train", 102, 1),
        ("oasst1/en_100_message.jsonl", "train", 102, 1),
        ("arc_easy", "validation", 570, 1),
        ("mmlu/dev", "validation", 285, 57),
    ],
)
def test_real_sets_whole(name: str, split: str, samples: int, sources: int) -> None:
    found = read_set(str(shared(f"data/{name}")), split)
    assert (len(found), len(count_sources(found))) == (samples, sources)
    assert all(e.answer is None or e.messages[-1]["content"] == e.choices[e.answer] for e in found)
