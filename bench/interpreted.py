"""What a peer's kernel takes from libdevice, for Triton's interpreter, where libdevice's functions have no body."""

import triton
import triton.language as tl


@triton.jit
def rsqrt(x: tl.tensor) -> tl.tensor:
    return tl.rsqrt(x)
