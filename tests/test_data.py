"""Reading, encoding and collating: properties over any text, every error, and the real sets where they are at hand."""

import gzip
import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nacd_fast.config import DataConfig
from nacd_fast.data import (
    IGNORE,
    Encoded,
    Example,
    choice_examples,
    collate,
    count_sources,
    digest,
    encode,
    encode_set,
    pack,
    read_set,
)
from nacd_fast.errors import InputError

DEMO = Path(__file__).parents[1] / "nacd_fast" / "demo"
MODEL: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(DEMO / "model")
SIBLING: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(DEMO / "sibling")
LONG = DataConfig(max_tokens=1_000_000)
CHAT = DataConfig(template="chat", max_tokens=1_000_000)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
responses = texts.filter(str.strip)
quick = settings(max_examples=60, deadline=None)


def shared(name: str) -> Path:
    """A file of the shared real data, or a skip."""
    path = Path(os.environ.get("NACD_SHARED", Path(__file__).parents[2] / "shared")) / name
    if not path.exists():
        pytest.skip("no shared data")
    return path


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def talk(*contents: str, name: str = "x") -> Example:
    """user, assistant, user, ..."""
    return Example(name, "s", tuple(turn(("user", "assistant")[i % 2], c) for i, c in enumerate(contents)))


@st.composite
def conversations(draw: st.DrawFn) -> Example:
    """Any order of roles that ends with a response."""
    roles = draw(st.lists(st.sampled_from(["user", "assistant", "system"]), max_size=4))
    return Example("x", "s", (*(turn(role, draw(texts)) for role in roles), turn("assistant", draw(responses))))


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def message_row(user: str = "Hi", assistant: str = "Hello", **more: object) -> dict[str, Any]:
    return {"messages": [turn("user", user), turn("assistant", assistant)], **more}


def supervised_runs(row: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts of the maximal runs of supervised tokens."""
    runs: list[list[int]] = []
    for before, label in zip([IGNORE, *row.labels], row.labels):
        if label != IGNORE:
            if before == IGNORE:
                runs.append([])
            runs[-1].append(label)
    return [str(tokenizer.decode(run)) for run in runs]


# Reading


FORMS: dict[str, dict[str, Any]] = {
    "messages": message_row("Name two.\nfruits", "Fig, kiwi"),
    "alpaca": {"instruction": "Name two.", "input": "fruits", "output": "Fig, kiwi"},
    "dolly": {"instruction": "Name two.", "context": "fruits", "response": "Fig, kiwi", "category": "open_qa"},
    "prompt": {"prompt": "Name two.\nfruits\n", "completion": " Fig, kiwi<|endoftext|>"},
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
    assert (first.source, second.source) == ("open_qa" if form == "dolly" else "set", "web")


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
        "from nacd_fast.data import read_set\nfrom nacd_fast.errors import InputError\n"
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
    "other suffix": ("a.csv", GOOD, r"a\.csv: must end in \.jsonl\.gz, \.jsonl, \.json, \.parquet"),
    "row is no object": ("a.jsonl", "[1]", r"a\.jsonl, line 1: must be an object, not list"),
    "unknown form": (
        "a.jsonl",
        f'{GOOD}\n{{"question": "q", "reply": "r"}}',
        r"line 2: unknown form with the keys question, reply;",
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
    with pytest.raises(InputError, match=r"holds no \.jsonl\.gz, \.jsonl, \.json, \.parquet file"):
        read_set(str(tmp_path), "train")


def test_folder_of_other_splits_does_not_leak(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", message_row())
    with pytest.raises(InputError, match="holds no file whose name begins with 'validation'"):
        read_set(str(tmp_path), "validation")


def test_duplicate_ids_across_files(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", message_row(id="x"))
    write_lines(tmp_path / "b.jsonl", message_row(id="x"))
    with pytest.raises(InputError, match=r"b\.jsonl, line 1: id 'x' is also that of .*a\.jsonl, line 1"):
        read_set(str(tmp_path), "train")


def test_unknown_split() -> None:
    with pytest.raises(InputError, match="split='dev': must be one of train, validation, test"):
        read_set("demo", "dev")


# Examples


def test_digest_sees_every_field_and_the_order() -> None:
    base = Example("a", "s", (turn("user", "q"), turn("assistant", "r")), ("r", "t"), 0)
    other = [
        Example("b", "s", base.messages, base.choices, 0),
        Example("a", "t", base.messages, base.choices, 0),
        Example("a", "s", base.messages[::-1], base.choices, 0),
        Example("a", "s", base.messages, ("r",), 0),
        Example("a", "s", base.messages, base.choices, 1),
        Example("a", "s", base.messages, base.choices),
    ]
    assert len({digest([e]) for e in [base, *other]}) == 7
    assert digest([base, other[0]]) != digest([other[0], base])
    assert digest([base]) == "9555f2ac708aa7fd78226bc8f72107a756003baaecaaa03c93a26ed22a69898d"


def test_count_sources_largest_first() -> None:
    examples = [Example(str(i), s, ()) for i, s in enumerate("bcaacc")]
    assert list(count_sources(examples).items()) == [("c", 3), ("a", 2), ("b", 1)]
    assert sum(count_sources(read_set("demo", "train")).values()) == 2000


def test_choice_examples_replace_the_last_response() -> None:
    example = Example("x", "s", (*talk("a", "b", "c", "d").messages, turn("user", "e")), ("no", "d"), 1)
    first, second = choice_examples(example)
    assert [m["content"] for m in first.messages] == ["a", "b", "c", "no", "e"]
    assert second.messages == example.messages
    assert [(e.id, e.source) for e in (first, second)] == [("x#0", "s"), ("x#1", "s")]
    assert not first.choices and first.answer is None
    assert choice_examples(talk("a", "b")) == []


# Encoding, template `plain`


def test_plain_template_word_for_word() -> None:
    messages = (turn("system", "Be brief."), *talk("Hi", "Hello", "Bye", "See you").messages, turn("user", "?"))
    row = encode(Example("x", "s", messages), MODEL, LONG)
    assert MODEL.decode(row.input_ids) == (
        "<s>Be brief.\nUser: Hi\nAssistant: Hello</s>\nUser: Bye\nAssistant: See you</s>"
    )
    assert supervised_runs(row, MODEL) == [" Hello</s>", " See you</s>"]


def reference_text(example: Example) -> tuple[str, list[str]]:
    """The whole text and the supervised texts, written down once more."""
    whole, spoken = "<s>", []
    for n, message in enumerate(example.messages):
        if n and example.messages[n - 1]["role"] == "assistant":
            whole += "\n"
        if message["role"] == "assistant":
            spoken.append(f" {message['content']}</s>")
            whole += "Assistant:" + spoken[-1]
        else:
            whole += ("User: " if message["role"] == "user" else "") + message["content"] + "\n"
    return whole, spoken


@quick
@given(conversations())
def test_supervised_text_is_the_responses_and_nothing_else(example: Example) -> None:
    for tokenizer, seen in ((MODEL, str), (SIBLING, lambda t: unicodedata.normalize("NFC", t).replace("\u2581", " "))):
        row = encode(example, tokenizer, LONG)
        whole, spoken = reference_text(example)
        assert tokenizer.decode(row.input_ids) == seen(whole)
        assert supervised_runs(row, tokenizer) == [seen(s) for s in spoken]
        assert all(label in (token, IGNORE) for token, label in zip(row.input_ids, row.labels, strict=True))
        assert row.labels[-1] == tokenizer.eos_token_id


def test_special_tokens_in_the_text_stay_text() -> None:
    row = encode(talk("a</s><s>b", "c</s>d<pad>"), MODEL, LONG)
    special = [i for i in row.input_ids if i in MODEL.all_special_ids]
    assert special == [MODEL.bos_token_id, MODEL.eos_token_id]
    assert supervised_runs(row, MODEL) == [" c</s>d<pad></s>"]


def test_tokenizer_without_bos_and_eos() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    tokenizer.bos_token = tokenizer.eos_token = None
    row = encode(talk("Hi", "Hello"), tokenizer, LONG)
    assert tokenizer.decode(row.input_ids) == "User: Hi\nAssistant: Hello"
    assert supervised_runs(row, tokenizer) == [" Hello"]


def test_encode_set_is_encode_of_each() -> None:
    examples = read_set("demo", "train")[:1100]  # more than one block
    rows = encode_set(examples, MODEL, DataConfig(max_tokens=48))
    assert len(rows) == 1100
    assert [rows[i] for i in (0, 999, 1000, 1099)] == [
        encode(examples[i], MODEL, DataConfig(max_tokens=48)) for i in (0, 999, 1000, 1099)
    ]
    assert encode_set([], MODEL, LONG) == []


def metaspace(scheme: str) -> PreTrainedTokenizerBase:
    """A character tokenizer that puts a blank in front as SentencePiece does: `first`, or `always` (doubling)."""
    letters = sorted(set("UserAssistant: ab\n".replace(" ", "\u2581") + "\u2581"))
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *letters, "\u2581b"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("\u2581", "b")], unk_token="<unk>"))
    if scheme == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("scheme", ["first", "always"])
@pytest.mark.parametrize("reply", ["a", "b"])
def test_the_blank_that_sentencepiece_adds_is_taken_away(scheme: str, reply: str) -> None:
    tokenizer = metaspace(scheme)
    row = encode(talk("a", reply, "b", "a"), tokenizer, LONG)
    shown = "".join(tokenizer.convert_ids_to_tokens(row.input_ids)).replace("\u2581", " ")
    assert shown == f"<s> User: a\nAssistant: {reply}</s>\nUser: b\nAssistant: a</s>"


@pytest.mark.parametrize("name", ["tokenizers/llama2", "models/stories260k"])
def test_real_sentencepiece_tokenizers(name: str) -> None:
    from transformers import LlamaTokenizer

    path = shared(name)
    kind = LlamaTokenizer if name.endswith("llama2") else AutoTokenizer
    tokenizer = kind.from_pretrained(path)
    row = encode(talk("Hi", "Yes two", "更", "日本"), tokenizer, LONG)
    shown = tokenizer.convert_ids_to_tokens([i for i in row.labels if i != IGNORE])
    pieces = ["▁Yes", "▁two", "</s>", "▁", "日", "本", "</s>"]
    assert shown == pieces if name.endswith("llama2") else shown[:6] == ["▁", "Y", "es", "▁t", "w", "o"]
    tokens = tokenizer.convert_ids_to_tokens(row.input_ids)
    assert tokens[tokens.index("</s>") + 1] == "<0x0A>"  # no blank between a response and the next turn


def test_real_opt_tokenizer() -> None:
    from transformers import GPT2Tokenizer

    tokenizer = GPT2Tokenizer.from_pretrained(
        shared("tokenizers/opt"), bos_token="</s>", eos_token="</s>", unk_token="</s>"
    )
    row = encode(talk("Hi", "Hello world"), tokenizer, LONG)
    assert row.input_ids[0] == 2 and [i for i in row.labels if i != IGNORE] == [20920, 232, 2]


# Truncation


@quick
@given(st.integers(0, 60), st.integers(1, 60), st.integers(0, 30), st.integers(8, 64))
def test_truncation_keeps_the_response(prompt: int, response: int, first: int, limit: int) -> None:
    turns = (" z" * prompt, "w" + " w" * (response - 1))
    example = talk(" x" * first, "y", *turns) if first else talk(*turns)
    whole, row = (encode(example, MODEL, c) for c in (LONG, DataConfig(max_tokens=limit)))
    last = max(i for i, label in enumerate(whole.labels) if label == IGNORE) + 1  # where the last response begins
    room, length = limit - 1, len(whole.input_ids) - last
    assert len(row.input_ids) == len(row.labels) == min(limit, len(whole.input_ids))
    assert row.input_ids[0] == MODEL.bos_token_id and row.labels[0] == IGNORE and row.labels[-1] != IGNORE
    kept = len(row.labels) - max(i for i, label in enumerate(row.labels) if label == IGNORE) - 1
    assert kept == min(length, max(room - (last - 1), room - room // 2)) >= 1  # half of the room, or all that is free
    start = last + kept - (len(row.input_ids) - 1)  # behind bos: one contiguous piece that ends in the response
    assert (
        row.input_ids[1:] == whole.input_ids[start : last + kept]
        and row.labels[1:] == whole.labels[start : last + kept]
    )


def test_truncation_without_bos_or_prompt() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    tokenizer.bos_token = None
    example = talk("a " * 50, "b " * 50)
    whole, row = (encode(example, tokenizer, c) for c in (LONG, DataConfig(max_tokens=10)))
    border = whole.labels.count(IGNORE)
    assert (
        row.input_ids == whole.input_ids[border - 5 : border + 5]
        and row.labels == whole.labels[border - 5 : border + 5]
    )
    only = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    tokenizer.chat_template = only  # everything is supervised
    row = encode(example, tokenizer, DataConfig(template="chat", max_tokens=10))
    assert row.labels == row.input_ids and len(row.labels) == 10


def test_response_without_tokens_is_an_error() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}{% generation %}{% endgeneration %}{% endfor %}"
    with pytest.raises(InputError, match="x: the tokenizer leaves no token of the response"):
        encode(talk("Hi", "Hello"), tokenizer, CHAT)


# Encoding, template `chat`

HEADER = "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}"
ASK = "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
PREFIX = HEADER + "{{ m['content'] + eos_token }}" + ASK
MARKED = (
    HEADER + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}" + ASK
)


def chat_tokenizer(template: str) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [PREFIX, MARKED])
def test_chat_template_supervises_the_responses(template: str) -> None:
    tokenizer = chat_tokenizer(template)
    turns = talk("Hi", "Hello", "日本", "\n😀", "?").messages
    example = Example("x", "s", (turn("system", "Be brief."), *turns))
    row = encode(example, tokenizer, CHAT)
    assert tokenizer.decode(row.input_ids) == (
        "<s><|system|>\nBe brief.</s><|user|>\nHi</s><|assistant|>\nHello</s><|user|>\n日本</s><|assistant|>\n\n😀</s>"
    )
    assert [s.lstrip("\n") for s in supervised_runs(row, tokenizer)] == ["Hello</s>", "😀</s>"]
    assert row.input_ids[-1] == tokenizer.eos_token_id and row.input_ids.count(tokenizer.bos_token_id) == 1


@quick
@given(st.lists(responses, min_size=1, max_size=3).map(lambda r: [c for x in r for c in ("q", x)]))
def test_chat_prefix_borders_are_exact(contents: list[str]) -> None:
    tokenizer = chat_tokenizer(PREFIX)
    row = encode(talk(*contents), tokenizer, CHAT)
    specials = ("<s>", "</s>", "<pad>", "<unk>")  # here the template's own, so also those in the text
    if not any(s in c for s in specials for c in contents):
        assert supervised_runs(row, tokenizer) == [f"{c}</s>" for c in contents[1::2]]


def test_chat_truncation_keeps_bos() -> None:
    row = encode(talk("a " * 50, "b"), chat_tokenizer(MARKED), DataConfig(template="chat", max_tokens=16))
    assert len(row.input_ids) == 16 and row.input_ids[0] == MODEL.bos_token_id and row.labels[-1] == MODEL.eos_token_id


def test_tokenizer_without_chat_template() -> None:
    with pytest.raises(InputError, match=r"data.template='chat': the model's tokenizer has no chat template"):
        encode(talk("Hi", "Hello"), MODEL, CHAT)


def test_chat_template_that_rewrites_history() -> None:
    rewriting = HEADER + "{{ m['content'] if loop.last else '...' }}{{ eos_token }}" + ASK
    with pytest.raises(InputError, match="x: the chat template rewrites earlier text when turn 2 is added"):
        encode(talk("Hi", "Hello"), chat_tokenizer(rewriting), CHAT)
    late = HEADER + "{{ m['content'] if m['role'] == 'user' or loop.last else '...' }}{{ eos_token }}" + ASK
    with pytest.raises(InputError, match="x: the chat template rewrites earlier text when turn 4 is added"):
        encode(talk("Hi", "Hello", "Bye", "See you"), chat_tokenizer(late), CHAT)


@pytest.mark.parametrize("extra", ["", "{% generation %}{% endgeneration %}"])
def test_chat_template_that_refuses(extra: str) -> None:
    refusing = "{{ raise_exception('Roles must alternate') }}" + extra
    with pytest.raises(InputError, match=r"^x: the chat template refuses the conversation \(Roles must alternate\)$"):
        encode(talk("Hi", "Hello"), chat_tokenizer(refusing), CHAT)


def test_chat_that_starts_with_a_response() -> None:
    example = Example("x", "s", (turn("assistant", "Hello"),))
    with pytest.raises(InputError, match="x: the chat template refuses the conversation"):
        encode(example, chat_tokenizer(PREFIX), CHAT)
    assert supervised_runs(encode(example, chat_tokenizer(MARKED), CHAT), MODEL) == ["Hello</s>"]


# Batches


@quick
@given(st.lists(st.lists(st.integers(5, 99), min_size=1, max_size=12), min_size=1, max_size=5), st.integers(0, 4))
def test_collate_pads_on_the_right(samples: list[list[int]], pad: int) -> None:
    batch = collate([Encoded(ids, [IGNORE, *ids[1:]]) for ids in samples], pad)
    width = max(map(len, samples))
    assert set(batch) == {"input_ids", "labels"}
    for name, tensor in batch.items():
        assert tensor.shape == (len(samples), width) and tensor.dtype == torch.int64, name
    for ids, tokens, labels in zip(samples, batch["input_ids"].tolist(), batch["labels"].tolist()):
        assert tokens == ids + [pad] * (width - len(ids))
        assert labels == [IGNORE, *ids[1:]] + [IGNORE] * (width - len(ids))


@quick
@given(st.lists(st.lists(st.integers(5, 99), min_size=2, max_size=12), min_size=1, max_size=5), st.integers(0, 3))
def test_pack_lays_samples_end_to_end(samples: list[list[int]], k: int) -> None:
    """Read off place by place: what stands there, where it is in its sample, and what it predicts."""
    rows = [Encoded(ids, [IGNORE, *ids[1:]]) for ids in samples]
    packed = pack(rows, k)
    places = []
    for ids in samples:
        whole = [None] * k + ids
        for i, token in enumerate(whole[:-1]):
            follows = whole[i + 1]
            places.append((token or 0, IGNORE if follows is None or i + 1 == k else follows, i, token is None))
    got = zip(packed.input_ids.tolist(), packed.targets.tolist(), packed.position_ids.tolist(), strict=True)
    assert list(got) == [place[:3] for place in places]
    assert packed.prompt_places.tolist() == [i for i, place in enumerate(places) if place[3]]
    lengths = [k + len(ids) - 1 for ids in samples]
    assert packed.cu_seqlens == [sum(lengths[:i]) for i in range(len(samples) + 1)]
    assert {t.dtype for t in (packed.input_ids, packed.targets, packed.position_ids)} == {torch.int64}


def test_the_last_prompt_token_predicts_a_supervised_first_one() -> None:
    assert pack([Encoded([7], [7]), Encoded([8, 9], [8, 9])], 2).targets.tolist() == [IGNORE, 7, IGNORE, 8, 9]


def test_pack_takes_samples_that_are_cut() -> None:
    with pytest.raises(AssertionError):
        pack([Encoded([7, 8, 9], [IGNORE, 8, IGNORE])], 1)


# Real sets


def test_demo_encodes_within_its_limits() -> None:
    for tokenizer in (MODEL, SIBLING):
        examples = read_set("demo", "validation")
        for example, row in zip(examples, encode_set(examples, tokenizer, DataConfig(max_tokens=256)), strict=True):
            assert supervised_runs(row, tokenizer) == [f" {example.messages[-1]['content']}</s>"]


def test_real_dolly() -> None:
    examples = read_set(str(shared("data/dolly/databricks-dolly-15k.reassembled.jsonl")), "train")
    assert len(examples) == 15_011 and count_sources(examples)["open_qa"] > 3000
    for example, row in zip(examples[:200], encode_set(examples[:200], MODEL, DataConfig(max_tokens=64))):
        assert len(row.input_ids) <= 64 and row.labels[-1] != IGNORE
        assert f" {example.messages[-1]['content']}</s>".startswith(supervised_runs(row, MODEL)[0].rstrip("\ufffd"))


def test_real_p3_has_one_empty_response(tmp_path: Path) -> None:
    source = shared("data/p3_50k.jsonl.gz")
    with pytest.raises(InputError, match=r"p3_50k\.jsonl\.gz, line 44938: the response is empty"):
        read_set(str(source), "train")
    with gzip.open(source, "rb") as f, gzip.open(tmp_path / "p3.jsonl.gz", "wb", compresslevel=1) as out:
        out.writelines(f.readline() for _ in range(3000))
    examples = read_set(str(tmp_path / "p3.jsonl.gz"), "train")
    assert len(examples) == 3000 and examples[-1].id == "p3-3000" and len(count_sources(examples)) > 5
    assert not any("<|endoftext|>" in m["content"] for e in examples for m in e.messages)


def test_real_files_of_other_forms() -> None:
    for name, says in (
        ("seed_tasks.jsonl", "line 1 .*unknown form with the keys id, name, instruction, instances"),
        ("arc_easy/ARC-Easy-test.jsonl", "unknown form with the keys id, question, choices, answerKey"),
        ("oasst1/en_100_text.jsonl", "line 1: must be an object, not str"),
    ):
        with pytest.raises(InputError, match=says):
            read_set(str(shared(f"data/{name}")), "train")
