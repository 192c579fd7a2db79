"""What a sample looks like to a model: the mean of its last hidden states, of unit length."""

from collections.abc import Sequence

import numpy as np
import torch

from ..data import collate, encode_set
from ..examples import Example
from ..losses import base_model
from ..progress import progress_bar
from ..student import load_model, max_positions
from ..training import check_lengths
from .method import Context


@torch.inference_mode()
def embed(pool: Sequence[Example], context: Context, batch: int) -> np.ndarray:
    """[n, D] float32. Samples are cut as for training; the shortest go first, so that little is padded."""
    model, tokenizer = load_model(context.model.path, context.model.dtype, context.model.device)
    rows = encode_set(pool, tokenizer, context.data)
    check_lengths([e.id for e in pool], rows, [0] * len(rows), max_positions(model))
    decoder, order = base_model(model).get_decoder(), sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    found = np.empty((len(rows), model.get_input_embeddings().weight.shape[1]), np.float32)
    with progress_bar("embed", len(rows)) as bar:
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            ids = collate([rows[i] for i in chosen], tokenizer.pad_token_id or 0)["input_ids"].to(model.device)
            hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state.float()
            lengths = torch.tensor([len(rows[i].input_ids) for i in chosen], device=model.device)
            inside = torch.arange(ids.shape[1], device=model.device) < lengths[:, None]
            mean = (hidden * inside[..., None]).sum(1) / lengths[:, None]
            found[chosen] = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
            bar.advance(len(chosen))
    return found
