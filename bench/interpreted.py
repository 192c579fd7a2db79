"""What a peer's kernel takes from libdevice, for Triton's interpreter, where libdevice's functions have no body."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def rsqrt(x):
    return tl.rsqrt(x)
