"""The trajectory codec's decoder for NVIDIA GPUs (csrc/bind_cuda.cpp). What lies on the GPU comes as addresses."""

from numpy import uint8
from numpy.typing import NDArray

SLACK: int
MOST_SHARED_BYTES: int

def version() -> str: ...
def unusable() -> str | None: ...
def describe(status: int) -> str: ...
def plan(head: NDArray[uint8], first: int, blocks: int) -> tuple[NDArray[uint8], int, int, int]: ...
def check_payload(head: NDArray[uint8], payload: NDArray[uint8], first: int, blocks: int) -> None: ...
def launch(
    plan: int,
    payload: int,
    a: int,
    b: int,
    dst: int,
    base_only: bool,
    blocks: int,
    shared_bytes: int,
    status: int,
    stream: int,
) -> None: ...
