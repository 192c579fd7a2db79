"""The trajectory codec's native core (csrc/bind.cpp). Arrays are one-dimensional, contiguous, on the CPU."""

from collections.abc import Sequence

from numpy import float32, uint8, uint32
from numpy.typing import NDArray

BLOCK: int
TILE: int
SLACK: int

def version() -> str: ...
def kernels() -> str: ...
def encode(
    words: NDArray[uint32],
    a: NDArray[uint32] | None,
    b: NDArray[uint32] | None,
    predictor: int,
    alpha: float | None,
    zero_bits: int,
    runs: Sequence[tuple[int, float | float32, float | float32]],
    threads: int,
    isa: str,
) -> tuple[NDArray[uint8], float, int, float]: ...
def read_head(head: NDArray[uint8]) -> tuple[int, int, int, int, int, float, int, int]: ...
def block_range(head: NDArray[uint8], first: int, blocks: int) -> tuple[int, int]: ...
def decode(
    head: NDArray[uint8],
    payload: NDArray[uint8],
    payload_bytes: int,
    first: int,
    blocks: int,
    a: NDArray[uint32] | None,
    b: NDArray[uint32] | None,
    out: NDArray[uint32],
    threads: int,
    verify: bool,
    base_only: bool,
    isa: str,
) -> None: ...
def decode_emulated(
    head: NDArray[uint8],
    payload: NDArray[uint8],
    payload_bytes: int,
    first: int,
    blocks: int,
    a: NDArray[uint32] | None,
    b: NDArray[uint32] | None,
    out: NDArray[uint32],
    base_only: bool,
) -> None: ...
def base_error(head: NDArray[uint8], payload: NDArray[uint8], payload_bytes: int, first: int, blocks: int) -> float: ...
def crc32c(data: NDArray[uint8], crc: int = 0) -> int: ...
def scan(
    descriptor: int, file_bytes: int
) -> tuple[list[tuple[int, int, int, int, int, int, int, int, int]], int, int, str]: ...
