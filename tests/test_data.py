"""Encoding and collating: properties over any text, and the real tokenizers where they are at hand."""

import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nacd_fast.config import DataConfig
from nacd_fast.data import IGNORE, Encoded, collate, encode, encode_set, pack
from nacd_fast.errors import InputError
from nacd_fast.examples import Example
from nacd_fast.forms import read_set
from tests.sets import shared, talk, turn

DEMO = Path(__file__).parents[1] / "nacd_fast" / "demo"
MODEL: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(DEMO / "model")
SIBLING: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(DEMO / "sibling")
LONG = DataConfig(max_tokens=1_000_000)
CHAT = DataConfig(template="chat", max_tokens=1_000_000)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
responses = texts.filter(str.strip)
quick = settings(max_examples=60, deadline=None)


@st.composite
def conversations(draw: st.DrawFn) -> Example:
    """Any order of roles that ends with a response."""
    roles = draw(st.lists(st.sampled_from(["user", "assistant", "system"]), max_size=4))
    return Example("x", "s", (*(turn(role, draw(texts)) for role in roles), turn("assistant", draw(responses))))


def supervised_runs(row: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts of the maximal runs of supervised tokens."""
    runs: list[list[int]] = []
    for before, label in zip([IGNORE, *row.labels], row.labels):
        if label != IGNORE:
            if before == IGNORE:
                runs.append([])
            runs[-1].append(label)
    return [str(tokenizer.decode(run)) for run in runs]


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
