"""What Triton's interpreter (3.6) does otherwise than a GPU, put right; imported by numerics.py.

It cuts float32 off to bfloat16, where a GPU rounds to the nearest, ties to even: twice the error. It multiplies the
bits of bfloat16 matrices as if they were integers. It hands a float over as Python's, where a kernel gets a float32.
NumPy 2.4 refuses its way of making a loop's bound an int. And it patches the language anew whenever a kernel calls a
function, which takes most of the time.
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


def wide(x: Any) -> Any:
    """A handle's bfloat16 as float32; others as they are."""
    if x.dtype.scalar != tl.bfloat16:
        return x
    return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def put_right() -> None:
    builder = interpreter.InterpreterBuilder
    cast, dot, patch = builder.cast_impl, builder.create_dot, interpreter._patch_lang_tensor
    convert = interpreter._implicit_cvt

    def rounding_cast(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return interpreter.TensorHandle(bfloat16_bits(np.ascontiguousarray(src.data)), tl.bfloat16)
        if src.dtype.scalar == tl.bfloat16 and dst_type.scalar == tl.float32:
            return wide(src)
        return cast(self, src, dst_type)

    def wide_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        return dot(self, wide(a), wide(b), d, *options)

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def convert_floats_too(argument: Any) -> Any:
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return convert(argument)

    patched: set[str] = set()  # modules

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    builder.cast_impl, builder.create_dot = rounding_cast, wide_dot
    interpreter._patch_lang_tensor = patch_with_index
    interpreter._implicit_cvt = convert_floats_too


put_right()
