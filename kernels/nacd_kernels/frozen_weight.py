"""A frozen weight: a dense tensor, or one that bitsandbytes quantised, dequantised where it is used and never kept.

bitsandbytes' own functions dequantise (imported only then; the package needs torch alone), so that the values are
those of its layers:

    NF4, FP4    `Params4bit`, blockwise; Dettmers et al., QLoRA (arXiv 2305.14314), section 3
    int8        `Int8Params`, codes [o, i] row_max [o] / 127; Dettmers et al., arXiv 2208.07339, section 2.1

The product is then y = x W^T in x's type. LLM.int8()'s own product, which rounds x to int8 too and keeps outlier
columns apart, is not used: rounding has no derivative.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import check


@dataclass(frozen=True, eq=False)
class FourBitWeight:
    """[D_out, D_in] in NF4 or FP4: packed codes, and bitsandbytes' QuantState."""

    codes: Tensor
    state: Any

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.state.shape)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def dense(self, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.codes, self.state).to(dtype)


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """[D_out, D_in] in int8, codes [D_out, D_in] and row_max [D_out] float32.

    A `Linear8bitLt` that has run once keeps the maxima in its state: Int8Weight(layer.weight.data, layer.state.SCB).
    """

    codes: Tensor
    row_max: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def dense(self, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(self.codes, self.row_max).to(dtype)


FrozenWeight = Tensor | FourBitWeight | Int8Weight


def frozen_weight(w: FrozenWeight) -> FrozenWeight:
    """w as the ops take it: bitsandbytes' parameters become what holds their codes, all else is returned as it is.

    Raises ValueError where a parameter is not quantised yet, or not in the layout that can be dequantised.
    """
    kind = type(w).__name__  # bitsandbytes may be absent, and is slow to import
    parameter: Any = w
    if kind == "Params4bit":
        state = getattr(w, "quant_state", None)
        check(state is not None, "w is a Params4bit without a quant_state: call .to(device) first, which quantises it")
        packed = getattr(state, "packing_format_for_cpu", False)
        check(
            not packed, "w is packed for bitsandbytes' own product on a CPU: keep its layer in train(), or load it anew"
        )
        return FourBitWeight(parameter.data, state)
    if kind == "Int8Params":
        quantised = parameter.dtype == torch.int8
        check(quantised, f"w is an Int8Params in {parameter.dtype}: call .to(device) first, which quantises it")
        lost = "its layer has run and keeps them; pass Int8Weight(layer.weight.data, layer.state.SCB)"
        check(parameter.SCB is not None, f"w is an Int8Params without its row maxima SCB: {lost}")
        return Int8Weight(parameter.data, parameter.SCB)
    return w


def dense(w: FrozenWeight, dtype: torch.dtype) -> Tensor:
    """[D_out, D_in] in dtype; a dense weight is in it already."""
    return w if isinstance(w, Tensor) else w.dense(dtype)
