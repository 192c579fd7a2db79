"""Prompts to tokens and text: never a special, added, unused or padded row."""

import pytest
import torch
from tokenizers import AddedToken

from nacd_fast.decode import banned_ids, decode_prompts
from nacd_fast.errors import InputError
from nacd_fast.student import load_tokenizer


def test_special_added_and_padded_rows_are_banned() -> None:
    tokenizer = load_tokenizer("demo")
    tokenizer.add_tokens([AddedToken("<extra>", special=False)])
    size = len(tokenizer)
    banned = banned_ids(tokenizer, size + 7)
    assert banned[:4].all() and banned[size - 1] and banned[size:].all()
    assert int(banned.sum()) == 4 + 1 + 7


@pytest.mark.parametrize("name", ["demo", "demo-sibling"])
def test_embeddings_of_tokens_decode_to_those_tokens(name: str) -> None:
    tokenizer = load_tokenizer(name)
    table = torch.randn(len(tokenizer) + 5, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor(tokenizer(" why stone", add_special_tokens=False).input_ids[:2])
    index, distance, texts = decode_prompts(table[ids][None], table, tokenizer)
    assert torch.equal(index[0], ids) and not distance.any()
    assert texts == [tokenizer.decode(ids.tolist())]


def test_a_prompt_on_a_special_row_takes_the_next_nearest() -> None:
    tokenizer = load_tokenizer("demo")
    table = torch.randn(len(tokenizer), 8, generator=torch.Generator().manual_seed(1))
    table[9] = table[tokenizer.eos_token_id] + 0.01
    index, distance, _ = decode_prompts(table[tokenizer.eos_token_id].view(1, 1, 8), table, tokenizer)
    assert index.item() == 9 and distance.item() == pytest.approx(0.01 * 8**0.5, rel=1e-3)


def test_prompts_of_another_model_are_refused() -> None:
    with pytest.raises(InputError, match="width 6, the model's embeddings 8"):
        decode_prompts(torch.zeros(1, 2, 6), torch.zeros(2048, 8), load_tokenizer("demo"))
