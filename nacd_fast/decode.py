"""Prompt embeddings -> nearest tokens -> text, which any other tokenizer can read.

Each pseudo token becomes its nearest row of the embedding table, but never a special, added, unused or padded one. The
k tokens of a prompt must spell text that survives: it is not empty, and is the same after the tokenizer has encoded and
decoded it again. A byte-level token may be a piece of a character: then the prompt takes the next sequence by the sum
of its distances, out of the CANDIDATES nearest tokens of each place, and the ranks of its tokens say so.

n samples, k prompt tokens, V vocabulary, D width, c candidates. Source: section 3.3 of the paper.
"""

import heapq
import re
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nacd_kernels import nearest_embedding

from .errors import InputError

CANDIDATES = 8  # nearest tokens of a place
TRIES = 256  # sequences of a prompt; the paper's two tokens have CANDIDATES**2 = 64
# tokens that no text was meant to hold, where a tokenizer does not say that they are special (OPT's: <s>, <mask>, ..)
UNUSED = re.compile(r"<(s|/s|pad|unk|mask|unused\d+)>|<\|.+\|>|\[unused\d+\]|madeupword\d{4}")
REPLACEMENT = "\ufffd"  # what decoding writes for bytes that are no character


class Token(NamedTuple):
    """One pseudo token read back: the token taken, and the nearest of the others."""

    id: int
    text: str
    distance: float
    rank: int
    """How many ordinary tokens are nearer; they spell nothing together with their neighbours."""
    next_id: int
    next_text: str
    next_distance: float

    @property
    def margin(self) -> float:
        """How much further the other token is; negative where that is the nearer one."""
        return self.next_distance - self.distance


class Spelling(NamedTuple):
    """A prompt read back."""

    tokens: list[Token]
    text: str
    survives: bool
    """The text is not empty, and the same after encoding and decoding."""


def banned_ids(tokenizer: PreTrainedTokenizerBase, rows: int) -> Tensor:
    """bool [rows]: rows of the table that are no ordinary token: special, added, unused, or beyond the tokenizer."""
    banned = torch.zeros(rows, dtype=torch.bool)
    banned[len(tokenizer) :] = True
    names = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), rows))))
    unused = [i for i, name in enumerate(names) if name is None or UNUSED.fullmatch(name)]
    for i in {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder, *unused}:
        if i < rows:
            banned[i] = True
    return banned


def text_of(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def ids_of(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of each text by itself. A special token's name in it is text, and no special token."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def survive(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[bool]:
    """Which texts are not empty, whole, and the same after this tokenizer has encoded and decoded them.

    One blank in front does not count: SentencePiece puts one before any text, and takes it away again.
    """
    again = [text_of(ids, tokenizer) for ids in ids_of(texts, tokenizer)]
    return [
        bool(text) and REPLACEMENT not in text and other.removeprefix(" ") == text.removeprefix(" ")
        for text, other in zip(texts, again, strict=True)
    ]


def sequences(distances: Sequence[Sequence[float]]) -> Iterator[tuple[int, ...]]:
    """Ranks of one candidate for each place, by the sum of their distances [k][c], which ascend in c."""

    def total(ranks: tuple[int, ...]) -> float:
        return sum(row[rank] for row, rank in zip(distances, ranks, strict=True))

    first = (0,) * len(distances)
    heap, seen = [(total(first), first)], {first}
    while heap:
        _, ranks = heapq.heappop(heap)
        yield ranks
        for place, rank in enumerate(ranks):
            further = (*ranks[:place], rank + 1, *ranks[place + 1 :])
            if rank + 1 < len(distances[place]) and further not in seen:
                seen.add(further)
                heapq.heappush(heap, (total(further), further))


def spell(ids: list[list[int]], distances: list[list[float]], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ranks of the first sequence whose text survives, of candidates [k][c]; of the nearest tokens if none does."""
    for tries, ranks in enumerate(sequences(distances)):
        if tries == TRIES:
            break
        if survive([text_of([row[rank] for row, rank in zip(ids, ranks, strict=True)], tokenizer)], tokenizer)[0]:
            return ranks
    return (0,) * len(ids)


def read_token(ids: Sequence[int], distances: Sequence[float], rank: int, tokenizer: PreTrainedTokenizerBase) -> Token:
    """The candidate of that rank, and the nearest of the others (itself where there are none)."""
    other = min(int(rank == 0), len(ids) - 1)
    (taken, text), (next_id, next_text) = ((ids[i], text_of([ids[i]], tokenizer)) for i in (rank, other))
    return Token(taken, text, distances[rank], rank, next_id, next_text, distances[other])


def decode_prompts(prompts: Tensor, table: Tensor, tokenizer: PreTrainedTokenizerBase) -> list[Spelling]:
    """Every prompt read back; prompts [n, k, D], table [V, D]. Raises InputError if their widths differ."""
    n, k, width = prompts.shape
    if width != table.shape[1]:
        raise InputError(
            f"the prompts have width {width}, the model's embeddings {table.shape[1]}: they were made for another model"
        )
    banned = banned_ids(tokenizer, table.shape[0]).to(table.device)
    count = min(CANDIDATES, int((~banned).sum()))
    index, distance = nearest_embedding(prompts.to(table.device), table, banned=banned, k=count)
    ids, distances = index.view(n, k, count).tolist(), distance.view(n, k, count).tolist()
    nearest = survive([text_of([row[0] for row in rows], tokenizer) for rows in ids], tokenizer)
    spellings = []
    for i, fine in enumerate(nearest):
        ranks = (0,) * k if fine else spell(ids[i], distances[i], tokenizer)
        tokens = [read_token(*place, tokenizer) for place in zip(ids[i], distances[i], ranks, strict=True)]
        text = text_of([token.id for token in tokens], tokenizer)
        spellings.append(Spelling(tokens, text, fine or survive([text], tokenizer)[0]))
    return spellings


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["decode", *sys.argv[1:]]))
