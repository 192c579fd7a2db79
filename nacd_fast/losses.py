"""-log p of supervised tokens: what training minimises, what chooses the best epoch, and what evaluation reports.

Only the positions that predict a supervised token reach the vocabulary product. Where no gradient is needed they do so
in pieces, so that at most LOGIT_ELEMENTS logits are held at once.

Sizes: B sequences, T tokens, D hidden, V vocabulary, k prompt tokens, P supervised positions, n rows.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel

from .data import IGNORE, Encoded, collate

LOGIT_ELEMENTS = 2**26  # 256 MiB in float32, 1335 positions of OPT


def base_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model with the adapters in it, in eval mode: nothing is dropped out, in training neither."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return base.eval()


def token_losses(model: PreTrainedModel, input_ids: Tensor, labels: Tensor, prompts: Tensor | None = None) -> Tensor:
    """-log p of every supervised token, row after row: [P] float32.

    input_ids, labels [B, T] right padded; prompts [B, k, D] are put in front, unsupervised. No attention mask: behind a
    causal mask no supervised token sees the padding.
    """
    x = model.get_input_embeddings()(input_ids[:, :-1])
    targets = labels[:, 1:]
    if prompts is not None:
        x = torch.cat([prompts.to(x.dtype), x], 1)
        targets = pad(targets, (prompts.shape[1], 0), value=IGNORE)
    head: Any = model.get_output_embeddings()
    places = (targets != IGNORE).nonzero()
    most = max(1, LOGIT_ELEMENTS // head.weight.shape[0])
    if torch.is_grad_enabled() or len(places) <= most:
        return losses_at(model, x, targets, places)
    found = []
    for piece in places.split(most):  # the sequences that a piece touches go through the decoder once for it
        first, last = int(piece[0, 0]), int(piece[-1, 0])
        within = piece - piece.new_tensor([first, 0])
        found.append(losses_at(model, x[first : last + 1], targets[first : last + 1], within))
    return torch.cat(found)


def losses_at(model: PreTrainedModel, x: Tensor, targets: Tensor, places: Tensor) -> Tensor:
    """-log p of targets [B, T] at `places` [P, 2], given the embedded samples x [B, T, D]: [P] float32.

    A hook on the head picks the hidden states, so that what a family does to its logits still happens.
    """
    rows, columns = places.unbind(1)
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda head, args: (args[0][rows, columns],))
    try:
        logits = model(inputs_embeds=x, use_cache=False).logits
    finally:
        hook.remove()
    return cross_entropy(logits.float(), targets[rows, columns], reduction="none")


@torch.inference_mode()
def losses_by_length(
    model: PreTrainedModel | PeftModel, rows: Sequence[Encoded], batch: int, pad_id: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Batches of `rows`, the shortest first: (their indices, -log p [P] float32, place in the batch of each [P])."""
    base = base_model(model)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        tensors = {name: t.to(base.device) for name, t in collate([rows[i] for i in chosen], pad_id).items()}
        owner = (tensors["labels"][:, 1:] != IGNORE).nonzero()[:, 0]
        yield chosen, token_losses(base, **tensors), owner


def mean_nll(model: PreTrainedModel | PeftModel, rows: Sequence[Encoded], batch: int, pad_id: int) -> float:
    """Mean of -log p over all supervised tokens of `rows` (not the mean of the rows' means)."""
    total, tokens = 0.0, 0
    for _, losses, _ in losses_by_length(model, rows, batch, pad_id):
        total, tokens = total + losses.double().sum().item(), tokens + losses.numel()
    return total / tokens
