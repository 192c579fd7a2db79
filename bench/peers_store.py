"""What the trajectory codec is compared with: other ways to store one snapshot, given the previous one.

    torch_load      torch.save and torch.load(weights_only=True) of the tensors, in memory
    safetensors     safetensors' save and load of the tensors; load gives each its own copy
    zipnn_raw       ZipNN on the snapshot alone
    zipnn_delta     ZipNN's own delta mode, an XOR with the previous snapshot
    zstd1_planes    integer deltas (byteplanes.c) in byte planes, zstd level 1
    pcodec          integer deltas, pcodec level 8

    python bench/peers_store.py --trajectory runs/trajectories/smollm2.safetensors --json runs/bench/peers_store.json

Every peer runs on one thread in its strongest setting found on these data, keeps its contexts and buffers from call to
call, and is checked bit for bit before it is timed. Figures are CPU time, MB of weights a second. Needs the `bench`
extra and a C compiler.
"""

import argparse
import ctypes
import io
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
import zstandard
from pcodec import ChunkConfig, DeltaSpec, ModeSpec
from pcodec.standalone import simple_compress, simple_decompress_into
from timing import Rows, interleaved, median_ratio
from torch import Tensor
from trajectories import load
from zipnn import ZipNN

Bits = npt.NDArray[np.uint32]  # [P], the bit patterns of float32 weights
Blob = bytes | list[bytes]

BLOCK = 1 << 17  # weights a byte-plane block, 512 KiB: the planes stay in the cache between zstd and join
DECODE_ROUNDS, ENCODE_ROUNDS = 21, 5
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


@dataclass(frozen=True)
class Peer:
    """One way to store the snapshot that it was made with."""

    encode: Callable[[], Blob]
    decode: Callable[[Any], Any]
    bits: Callable[[Any], Bits]  # of what decode gives; not timed


@dataclass(frozen=True)
class Figures:
    ratio: float
    encode: list[float]  # CPU seconds, a round each
    decode: list[float]


def flat_bits(tensors: Mapping[str, Tensor]) -> Bits:
    """[P] uint32: the tensors in the order of their names, one after the other. A copy."""
    return torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)]).numpy().view(np.uint32)


def stored_bytes(blob: Blob) -> int:
    """Bytes of an encoded snapshot; a list counts four more for the length of each part."""
    return len(blob) if isinstance(blob, bytes | bytearray) else sum(len(part) + 4 for part in blob)


def native() -> ctypes.CDLL:
    """byteplanes.c, compiled for this machine."""
    compiler = os.environ.get("CC") or shutil.which("cc")
    if compiler is None:
        sys.exit("no C compiler: install one or set CC; the peers need bench/byteplanes.c")
    source = Path(__file__).with_name("byteplanes.c")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "byteplanes.so"
        flags = ["-O3", "-march=native", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))


def call(function: Any, first: npt.NDArray, second: npt.NDArray, out: npt.NDArray, count: int) -> None:
    """A function of byteplanes.c; the arrays are contiguous and hold `count` weights."""
    first_at, second_at, out_at = (ctypes.c_void_p(a.ctypes.data) for a in (first, second, out))
    function(first_at, second_at, out_at, ctypes.c_size_t(count))


def torch_load(tensors: dict[str, Tensor]) -> Peer:
    def encode() -> bytes:
        file = io.BytesIO()
        torch.save(tensors, file)
        return file.getvalue()

    return Peer(encode, lambda blob: torch.load(io.BytesIO(blob), weights_only=True), flat_bits)


def safetensors_(tensors: dict[str, Tensor]) -> Peer:
    return Peer(lambda: safetensors.torch.save(tensors), safetensors.torch.load, flat_bits)


def zipnn_raw(weights: Bits) -> Peer:
    codec = ZipNN(input_format="torch", threads=1)
    tensor = torch.from_numpy(weights.view(np.float32))
    return Peer(
        lambda: codec.compress(tensor.clone()),  # it reorders the bits of what it is given, in place
        codec.decompress,
        lambda decoded: decoded.numpy().view(np.uint32),
    )


def zipnn_delta(weights: Bits, previous: Bits) -> Peer:
    codec = ZipNN(input_format="byte", bytearray_dtype="float32", delta_compressed_type="byte", threads=1)
    data, base = weights.tobytes(), previous.tobytes()
    return Peer(
        lambda: codec.compress(data, delta_second_data=base),
        lambda blob: codec.decompress(blob, delta_second_data=base),
        lambda decoded: np.frombuffer(decoded, np.uint32),
    )


def zstd1_planes(weights: Bits, previous: Bits, library: ctypes.CDLL) -> Peer:
    compressor, decompressor = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    planes, out = np.empty(4 * BLOCK, np.uint8), np.empty_like(weights)
    blocks = [slice(start, min(start + BLOCK, weights.size)) for start in range(0, weights.size, BLOCK)]

    def parts(count: int) -> list[memoryview]:
        return [planes.data[k * count : (k + 1) * count] for k in range(4)]

    def encode() -> list[bytes]:
        blob = []
        for block in blocks:
            count = block.stop - block.start
            call(library.split, weights[block], previous[block], planes, count)
            blob += [compressor.compress(part) for part in parts(count)]
        return blob

    def decode(blob: list[bytes]) -> Bits:
        sources = iter(blob)
        for block in blocks:
            count = block.stop - block.start
            for part in parts(count):
                decompressor.stream_reader(next(sources)).readinto(part)
            call(library.join, planes, previous[block], out[block], count)
        return out

    return Peer(encode, decode, lambda decoded: decoded)


def pcodec(weights: Bits, previous: Bits, library: ctypes.CDLL) -> Peer:
    config = ChunkConfig(compression_level=8, mode_spec=ModeSpec.classic(), delta_spec=DeltaSpec.no_op())
    deltas, out = np.empty(weights.size, np.int32), np.empty_like(weights)

    def encode() -> bytes:
        call(library.delta, weights, previous, deltas, weights.size)
        return simple_compress(deltas, config)

    def decode(blob: bytes) -> Bits:
        simple_decompress_into(blob, deltas)
        call(library.undelta, deltas, previous, out, weights.size)
        return out

    return Peer(encode, decode, lambda decoded: decoded)


def peers(tensors: dict[str, Tensor], previous: dict[str, Tensor]) -> dict[str, Peer]:
    """All peers on one snapshot. tensors, previous: same names and shapes, float32."""
    weights, base, library = flat_bits(tensors), flat_bits(previous), native()
    return {
        "torch_load": torch_load(tensors),
        "safetensors": safetensors_(tensors),
        "zipnn_raw": zipnn_raw(weights),
        "zipnn_delta": zipnn_delta(weights, base),
        "zstd1_planes": zstd1_planes(weights, base, library),
        "pcodec": pcodec(weights, base, library),
    }


def keep_memory() -> None:
    """Have glibc keep freed memory: else allocations meet fresh pages or not by chance, and ZipNN's speed halves."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 1 << 30)
        mallopt(M_MMAP_THRESHOLD, 1 << 25)  # the largest it takes


def on_cpu(work: Callable[[], object], seconds: list[float]) -> Callable[[], None]:
    """`work`, which then adds its CPU time to `seconds`."""

    def timed() -> None:
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)

    return timed


def cpu_seconds(contestants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """As timing.interleaved, in CPU time."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    timed = {name: on_cpu(work, seconds[name]) for name, work in contestants.items()}
    interleaved(timed, rounds, torch.device("cpu"), warmup=1)
    return {name: times[1:] for name, times in seconds.items()}


def measure(
    contestants: Mapping[str, Peer],
    tensors: dict[str, Tensor],
    decode_rounds: int = DECODE_ROUNDS,
    encode_rounds: int = ENCODE_ROUNDS,
    *,
    keep: bool = True,
) -> dict[str, Figures]:
    """Ratio and times of every contestant. Ends the program if one does not give `tensors` back bit for bit.

    keep: with keep_memory, which stays in force.
    """
    if keep:
        keep_memory()
    exact = flat_bits(tensors)
    encode = cpu_seconds({name: peer.encode for name, peer in contestants.items()}, encode_rounds)
    blobs = {name: peer.encode() for name, peer in contestants.items()}  # only now: one that changes its input shows
    decoders = {name: partial(peer.decode, blobs[name]) for name, peer in contestants.items()}
    for name, peer in contestants.items():
        if not np.array_equal(peer.bits(decoders[name]()), exact):
            sys.exit(f"{name}: the decoded weights differ; nothing is reported")
    decode = cpu_seconds(decoders, decode_rounds)
    return {name: Figures(exact.nbytes / stored_bytes(blobs[name]), encode[name], decode[name]) for name in contestants}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectory", type=Path, required=True, help="a file of bench/trajectories.py")
    parser.add_argument("--index", type=int, default=10, help="which snapshot; the one before is given")
    parser.add_argument("--json", type=Path, required=True, help="file for the rows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    snapshots = list(load(args.trajectory).items())
    (_, previous), (step, tensors) = snapshots[args.index - 1], snapshots[args.index]
    rows = Rows("peers_store", torch.device("cpu"))
    found = measure(peers(tensors, previous), tensors)
    mb = flat_bits(tensors).nbytes / 1e6
    for name, figures in found.items():
        case = f"{args.trajectory.stem} step {step} {name}"
        rows.add(case, "ratio", figures.ratio, "x")
        rows.add(case, "encode", mb / statistics.median(figures.encode), "MB/s")
        rows.add(case, "decode", mb / statistics.median(figures.decode), "MB/s")
        over = median_ratio(found["zstd1_planes"].decode, figures.decode)
        rows.add(case, "decode_speed_over", over, "x", "zstd1_planes")
    rows.write(args.json)


if __name__ == "__main__":
    main()
