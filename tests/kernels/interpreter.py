"""What Triton's interpreter (3.6) does otherwise than a GPU, put right; imported by numerics.py.

It cuts float32 off to bfloat16, where a GPU rounds to the nearest, ties to even: twice the error. And NumPy 2.4 refuses
its way of making a loop's bound an int.
"""

from typing import Any

import numpy as np
from triton import language as tl
from triton.runtime import interpreter


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = x.view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def put_right() -> None:
    cast, patch = interpreter.InterpreterBuilder.cast_impl, interpreter._patch_lang_tensor

    def rounding_cast(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return interpreter.TensorHandle(bfloat16_bits(np.ascontiguousarray(src.data)), tl.bfloat16)
        return cast(self, src, dst_type)

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter.InterpreterBuilder.cast_impl = rounding_cast
    interpreter._patch_lang_tensor = patch_with_index


put_right()
