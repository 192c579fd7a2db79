"""Prompts to tokens and text: never a special, added, unused or padded row, and text that survives."""

from collections.abc import Sequence
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nacd_fast.decode import CANDIDATES, REPLACEMENT, banned_ids, decode_prompts, ids_of, sequences, survive, text_of
from nacd_fast.errors import InputError
from nacd_fast.student import load_tokenizer
from tests.sets import shared

DEMO = load_tokenizer("demo")
WIDTH = 8


def table_of(rows: int = len(DEMO), seed: int = 0) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def byte_ids(data: bytes) -> list[int]:
    """The token of each byte: GPT-2's alphabet shows the bytes from 0xA1 to 0xFF, but for 0xAD, as that character."""
    return DEMO.convert_tokens_to_ids([chr(byte) for byte in data])


def around(targets: Sequence[Sequence[int]], table: Tensor) -> Tensor:
    """Prompts [1, k, WIDTH]: place i is nearest to the rows targets[i], in their order; other rows are moved away."""
    near = {i for row in targets for i in row}
    table[[i for i in range(len(table)) if i not in near]] += 1000
    prompts = table_of(len(targets), seed=1)
    for prompt, ids in zip(prompts, targets, strict=True):
        for order, i in enumerate(ids):
            table[i] = prompt
            table[i, 0] += 0.01 * (order + 1)
    return prompts[None]


def test_special_added_and_padded_rows_are_banned() -> None:
    tokenizer = load_tokenizer("demo")
    tokenizer.add_tokens([AddedToken("<extra>", special=False)])
    size = len(tokenizer)
    banned = banned_ids(tokenizer, size + 7)
    assert banned[:4].all() and banned[size - 1] and banned[size:].all()
    assert int(banned.sum()) == 4 + 1 + 7


def test_unused_tokens_of_a_real_vocabulary_are_banned() -> None:
    from transformers import GPT2Tokenizer

    tokenizer = GPT2Tokenizer.from_pretrained(shared("tokenizers/opt"), bos_token="</s>", eos_token="</s>")
    banned = banned_ids(tokenizer, 50_272).nonzero().flatten().tolist()
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>", *(f"madeupword000{i}" for i in range(3))]
    assert banned == sorted([*tokenizer.convert_tokens_to_ids(names), *range(50_265, 50_272)])


@pytest.mark.parametrize("name", ["demo", "demo-sibling"])
def test_embeddings_of_tokens_decode_to_those_tokens(name: str) -> None:
    tokenizer = load_tokenizer(name)
    table = table_of(len(tokenizer) + 5)
    ids = tokenizer(" why stone", add_special_tokens=False).input_ids[:2]
    (found,) = decode_prompts(table[ids][None], table, tokenizer)
    assert [t.id for t in found.tokens] == ids and found.text == tokenizer.decode(ids) and found.survives
    for token in found.tokens:
        apart = (table[: len(tokenizer)] - table[token.id]).double().norm(dim=1)
        apart[banned_ids(tokenizer, len(tokenizer))] = torch.inf
        order = apart.argsort()
        assert (token.distance, token.rank) == (0, 0) and token.text == tokenizer.decode([token.id])
        assert token.next_id == order[1] and token.next_text == tokenizer.decode([token.next_id])
        assert token.margin == token.next_distance == pytest.approx(float(apart[order[1]]), rel=1e-6)


def test_a_prompt_on_a_special_row_takes_the_next_nearest() -> None:
    table = table_of(seed=1)
    table[9] = table[DEMO.eos_token_id] + 0.01
    ((token,), *_) = decode_prompts(table[DEMO.eos_token_id].view(1, 1, WIDTH), table, DEMO)[0]
    assert token.id == 9 and token.rank == 0 and token.distance == pytest.approx(0.01 * WIDTH**0.5, rel=1e-3)


def test_two_halves_of_a_character_stay_together() -> None:
    table = table_of()
    ids = byte_ids("é".encode())
    (found,) = decode_prompts(table[ids][None], table, DEMO)
    assert (found.text, found.survives, [t.rank for t in found.tokens]) == ("é", True, [0, 0])


def test_half_a_character_takes_the_nearest_sequence_that_spells_text() -> None:
    half, a, b = byte_ids(b"\xc3") + DEMO.convert_tokens_to_ids(["a", "b"])
    table = table_of()
    (found,) = decode_prompts(around([[half, a], [b]], table), table, DEMO)
    first, second = found.tokens
    assert (found.text, found.survives, first.rank, second.rank) == ("ab", True, 1, 0)
    assert (first.next_id, first.next_text) == (half, REPLACEMENT) and first.margin == pytest.approx(-0.01, rel=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_the_sequence_is_the_nearest_of_all_that_survive(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    table = table_of()
    pieces = byte_ids(bytes([*range(0xC3, 0xC9), *range(0xA1, 0xA9)])) + DEMO.convert_tokens_to_ids(list("abcd"))
    places = [[pieces[i] for i in torch.randperm(len(pieces), generator=draw)[:CANDIDATES]] for _ in range(3)]
    prompts = around(places, table)
    for place in places:  # distances of no pattern
        table[place] += 0.005 * torch.rand(len(place), WIDTH, generator=draw)
    (found,) = decode_prompts(prompts, table, DEMO)
    banned = banned_ids(DEMO, len(DEMO))
    apart = torch.cdist(prompts[0].double(), table.double()).masked_fill(banned, torch.inf)
    rows = [row.argsort()[:CANDIDATES].tolist() for row in apart]
    fine = [ids for ids in product(*rows) if survive([text_of(ids, DEMO)], DEMO)[0]]
    best = min(fine, key=lambda ids: sum(float(apart[place, i]) for place, i in enumerate(ids)))
    assert found.survives and [t.id for t in found.tokens] == list(best)


def test_where_nothing_spells_text_the_nearest_tokens_stay() -> None:
    rest = byte_ids(bytes(range(0xAE, 0xAE + CANDIDATES)))  # bytes that begin no character
    table = table_of()
    (found,) = decode_prompts(around([rest, rest], table), table, DEMO)
    assert not found.survives and [t.rank for t in found.tokens] == [0, 0] and REPLACEMENT in found.text


@given(st.lists(st.lists(st.floats(0, 9), min_size=1, max_size=4).map(sorted), min_size=1, max_size=3))
def test_sequences_come_once_each_and_by_their_sum(distances: list[list[float]]) -> None:
    found = list(sequences(distances))
    sums = [sum(row[rank] for row, rank in zip(distances, ranks, strict=True)) for ranks in found]
    assert sums == sorted(sums)
    assert sorted(found) == list(product(*(range(len(row)) for row in distances)))


def test_text_that_survives() -> None:
    texts = [" why stone", "", REPLACEMENT, f"a{DEMO.eos_token}b", "更\n"]
    assert survive(texts, DEMO) == [True, False, False, True, True] and survive([], DEMO) == []
    assert DEMO.eos_token_id not in ids_of([f"a{DEMO.eos_token}b"], DEMO)[0]


def opt_and_llama() -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    from transformers import GPT2Tokenizer, LlamaTokenizer

    opt = GPT2Tokenizer.from_pretrained(shared("tokenizers/opt"), bos_token="</s>", eos_token="</s>")
    return opt, LlamaTokenizer.from_pretrained(shared("tokenizers/llama2"))


def test_every_token_of_opt_through_llama() -> None:
    """The figures of the README: all but the pieces of characters come through."""
    opt, llama = opt_and_llama()
    texts = [text_of([i], opt) for i in range(50_265)]
    pieces = [REPLACEMENT in text for text in texts]
    through = survive(texts, llama)
    assert sum(through) == 49_913 and sum(pieces) == 352
    assert through == [not piece for piece in pieces] == survive(texts, opt)


def test_prompts_of_another_model_are_refused() -> None:
    with pytest.raises(InputError, match="width 6, the model's embeddings 8"):
        decode_prompts(torch.zeros(1, 2, 6), torch.zeros(2048, 8), DEMO)
