"""Examples -> supervised tokens -> batches.

Sizes: B batch, T tokens. Labels are as in Hugging Face models: aligned with the tokens, IGNORE where there is no loss.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .config import DataConfig
from .errors import InputError
from .examples import Example
from .rows import first_line

IGNORE = -100
BLOCK = 1000  # examples tokenised at a time: a tokenizer's raw results are large
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Encoded:
    """One example as tokens, at most max_tokens of them; the last one is supervised."""

    input_ids: list[int]
    labels: list[int]


# Examples -> tokens

Pieces = list[tuple[str, bool]]  # (text, supervised), alternating


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> Encoded:
    """`encode_set` of one example."""
    return encode_set([example], tokenizer, config)[0]


def encode_set(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> list[Encoded]:
    """Tokens and labels of every example; only assistant text and the end behind it are supervised.

    Template `plain`: bos, then "{content}\\n" of a system turn, "User: {content}\\n", "Assistant:" + " {content}" +
    eos, with "\\n" before a turn that follows an assistant's; bos and eos where the tokenizer has them. What stands in
    a conversation is text: a "</s>" in it does not become the special token. Template `chat`: the tokenizer's own.
    Supervised are its {% generation %} blocks if it has them, else what it puts behind each generation prompt.

    Everything behind the last response is dropped; longer samples are cut to max_tokens as `cut` says.
    """
    chat = config.template == "chat"
    if chat and not tokenizer.chat_template:
        raise InputError("data.template='chat': the model's tokenizer has no chat template; take 'plain'")
    masks = chat and tokenizer.is_fast and GENERATION.search(tokenizer.get_chat_template())
    out: list[Encoded] = []
    for start in range(0, len(examples), BLOCK):
        block = examples[start : start + BLOCK]
        if masks:
            rows = [generation_row(e, tokenizer) for e in block]
        else:
            pieces = [chat_pieces(e, tokenizer) if chat else plain_pieces(e) for e in block]
            rows = piece_rows(pieces, tokenizer, literal=not chat)
        out += [cut(e.id, *row, tokenizer.bos_token_id, config.max_tokens) for e, row in zip(block, rows)]
    return out


def plain_pieces(example: Example) -> Pieces:
    """Each piece is tokenised by itself, so that no token crosses a border."""
    pieces: Pieces = []
    context = ""
    for message in example.messages:
        if message["role"] == "assistant":
            pieces += [(f"{context}Assistant:", False), (f" {message['content']}", True)]
            context = "\n"
        else:
            context += f"{'User: ' if message['role'] == 'user' else ''}{message['content']}\n"
    return pieces


def chat_pieces(example: Example, tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """As `plain_pieces`: a response is what the template renders with it, less what it renders to ask for it."""
    pieces: Pieces = []
    done, messages = "", list(example.messages)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(example.id, tokenizer, messages[:i], add_generation_prompt=True)
            after = render(example.id, tokenizer, messages[: i + 1])
            if not before.startswith(done) or not after.startswith(before):
                raise InputError(
                    f"{example.id}: the chat template rewrites earlier text when turn {i + 1} is added, "
                    "so the response cannot be told from the prompt; take data.template='plain'"
                )
            pieces += [(before[len(done) :], False), (after[len(before) :], True)]
            done = after
    return pieces


def generation_row(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    out = render(
        example.id,
        tokenizer,
        list(example.messages),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )
    return out["input_ids"], [bool(m) for m in out["assistant_masks"]]


def render(name: str, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **how: Any) -> Any:
    from jinja2 import TemplateError  # what a template's own refusals are, e.g. of a system turn

    try:
        return tokenizer.apply_chat_template(messages, **{"tokenize": False, **how})
    except (TemplateError, ValueError) as error:
        raise InputError(f"{name}: the chat template refuses the conversation ({first_line(error)})") from None


def piece_rows(
    samples: list[Pieces], tokenizer: PreTrainedTokenizerBase, literal: bool
) -> list[tuple[list[int], list[bool]]]:
    """(ids, supervised) of every sample. literal: content holds no special tokens; put bos in front and eos behind."""
    encoded = iter(piece_ids(samples, tokenizer, literal))
    bos, eos = ([x] if literal and x is not None else [] for x in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    rows = []
    for pieces in samples:
        ids, mask = [*bos], [False] * len(bos)
        for _, supervised in pieces:
            new = next(encoded) + (eos if supervised else [])
            ids += new
            mask += [supervised] * len(new)
        rows.append((ids, mask))
    return rows


def piece_ids(samples: list[Pieces], tokenizer: PreTrainedTokenizerBase, literal: bool) -> list[list[int]]:
    """Token ids of every piece, flat.

    A SentencePiece tokenizer puts a blank (U+2581) in front of whatever it is given. That is right for the first piece
    of a sample; in the others it is taken away again, unless it has grown into a longer token.
    """
    how = dict(add_special_tokens=False, split_special_tokens=literal, verbose=False)

    def ids(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, **how)["input_ids"]

    blank = tokenizer.convert_tokens_to_ids("\u2581")
    bare, spaced = ids(["a", " a"])
    adds_blank = "".join(tokenizer.convert_ids_to_tokens(bare)).startswith("\u2581")
    cut_space = adds_blank and bare != spaced  # it adds one even in front of a blank
    texts = [(text, n > 0) for pieces in samples for n, (text, _) in enumerate(pieces)]
    out = ids([text.removeprefix(" ") if cut_space and inner else text for text, inner in texts])
    return [
        row[1:] if adds_blank and inner and text[:1] != " " and row[:1] == [blank] else row
        for row, (text, inner) in zip(out, texts)
    ]


def cut(name: str, ids: list[int], mask: list[bool], bos: int | None, limit: int) -> Encoded:
    """Drop what stands behind the last supervised token, then all but `limit` tokens.

    The last response gives way last: bos stays, the context in front of the response loses its oldest tokens, down to
    half of the room behind bos; then the response loses its tail. So at least one token of it is left (limit >= 8).
    """
    if not any(mask):
        raise InputError(f"{name}: the tokenizer leaves no token of the response")
    end = len(mask) - mask[::-1].index(True)
    start = end - (mask[:end][::-1].index(False) if False in mask[:end] else end)  # of the last response
    head = int(start > 0 and ids[0] == bos)
    room = limit - head
    context = min(start - head, max(room - (end - start), room // 2))
    kept = [*range(head), *range(start - context, min(end, start + room - context))]
    return Encoded([ids[i] for i in kept], [ids[i] if mask[i] else IGNORE for i in kept])


# Tokens -> batches


@dataclass(frozen=True)
class Packed:
    """Samples laid end to end in one row, with room for k prompt tokens in front of each: no padding.

    The last token of a sample is no input, as nothing is predicted from it: P = sum of k + T - 1 over the samples.
    """

    input_ids: Tensor  # [P] int64; 0 where a prompt goes
    targets: Tensor  # [P] int64, the token that follows each place where it is supervised, else IGNORE
    position_ids: Tensor  # [P] int64, from 0 in every sample
    prompt_places: Tensor  # [B k] int64, sample after sample
    cu_seqlens: list[int]  # [B + 1] borders of the samples, from 0 to P

    def to(self, device: torch.device) -> "Packed":
        ids, targets, positions, places = (
            t.to(device) for t in (self.input_ids, self.targets, self.position_ids, self.prompt_places)
        )
        return Packed(ids, targets, positions, places, self.cu_seqlens)


def pack(rows: Sequence[Encoded], prompt_tokens: int) -> Packed:
    """Each sample ends, as `cut` left it, with a supervised token; a prompt's last place predicts its first token."""
    assert all(row.labels[-1] != IGNORE for row in rows)
    ahead = [IGNORE] * prompt_tokens
    ids, labels = (
        torch.cat([torch.tensor(values) for values in column])
        for column in (
            [[0] * prompt_tokens + row.input_ids[:-1] for row in rows],
            [(ahead + row.labels)[1:] for row in rows],
        )
    )
    lengths = torch.tensor([prompt_tokens + len(row.input_ids) - 1 for row in rows])
    borders = pad(lengths.cumsum(0), (1, 0))
    position_ids = torch.arange(len(ids)) - borders[:-1].repeat_interleave(lengths)
    places = (borders[:-1, None] + torch.arange(prompt_tokens)).flatten()
    return Packed(ids, labels, position_ids, places, borders.tolist())


def collate(rows: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """input_ids and labels, both [B, T] int64, padded on the right with pad_id and IGNORE.

    No attention mask: with the padding on the right a causal model never looks at it.
    """
    ids, labels = (
        [torch.tensor(values) for values in column]
        for column in ([row.input_ids for row in rows], [row.labels for row in rows])
    )
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_id),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
    }
