"""Decoding on a GPU: its functions run on the host against the CPU's decoder, its build, and, on a GPU, itself."""

import ctypes
import os
import re
import runpy
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nacd_fast import codec, codec_cuda, native
from nacd_fast.codec import BLOCK, TILE, Bytes, CodecError, Words

ROOT = Path(__file__).resolve().parents[1]
CORE = native.load()
SOURCE = ROOT / "csrc" / "codec_cuda.cu"
COUNT = 2 * BLOCK + 777
CRC_AT = 44  # of the head's checksum

needs_core = pytest.mark.skipif(CORE is None, reason="the native module was not built")


def snapshots(count: int, seed: int = 0) -> tuple[Words, Words, Words]:
    """(words, a, b) whose tiles take, in turn, every mode, with zero cells and exceptions among them."""
    g = np.random.default_rng(seed)
    a, change, noise = (g.standard_normal(count).astype(np.float32) for _ in range(3))
    at = np.arange(count)
    kind = np.where(at < BLOCK, at // TILE % 9, 0)
    rare = (at >= BLOCK) & (at // 2048 % 2 == 0)  # streams where most weights stay: a code of their own pays
    change[rare] *= g.random(int(rare.sum())) < 0.03
    noise[rare] = 0
    scale = np.select([kind == 1, kind == 4, kind == 5], [1e-5, 1e-38, 1e32], 0.02).astype(np.float32)
    step = scale * np.select([kind == 1, kind == 6], [5, 0], 0.005).astype(np.float32)
    a *= scale
    b, w = a + 2 * step * change, a + step * change + step / 2 * noise
    w = np.where(kind == 6, a, w).astype(np.float32)
    w[(kind == 7) & (g.random(count) < 0.02)] *= 1000
    w[(kind == 8) & (g.random(count) < 0.01)] = np.nan
    words = w.view(np.uint32), a.view(np.uint32), b.view(np.uint32)
    for x in words:  # among them what is not finite
        x[kind == 3] = g.integers(0, 2**32, int((kind == 3).sum()), dtype=np.uint32)
    return words


def encoded(count: int, references: int, zero_bits: int = 0, bounded: bool = False) -> tuple[Bytes, list[Words]]:
    """(frame, its references)"""
    mask = np.uint32(0xFFFF0000 if zero_bits else 0xFFFFFFFF)
    words, *others = (x & mask for x in snapshots(count))
    runs = [(0, 1e-4, 6e-5), (-(-count // TILE) // 2, 3e-6, 2e-6)] if bounded else []
    frame = codec.encode(words, others[:references], zero_bits=zero_bits, runs=runs).data
    return frame, others[:references]


def emulated(
    frame: Bytes, references: list[Words], blocks: range | None = None, base_only: bool = False
) -> NDArray[np.uint32]:
    """As codec.decode, by the functions that run on a GPU."""
    assert CORE is not None
    info = codec.read_info(frame)
    blocks = range(info.blocks) if blocks is None else blocks
    begin, end = CORE.block_range(frame, blocks.start, len(blocks))
    out = np.zeros(len(info.weights(blocks)), np.uint32)
    a, b, *_ = (*references, None, None)
    try:
        CORE.decode_emulated(frame, frame[begin:], end - begin, blocks.start, len(blocks), a, b, out, base_only)
    except ValueError as error:
        raise CodecError(str(error)) from None
    return out


def payloads(frame: Bytes) -> list[NDArray[np.uint8]]:
    """The blocks' payloads, as views."""
    assert CORE is not None
    ranges = [CORE.block_range(frame, i, 1) for i in range(codec.read_info(frame).blocks)]
    return [frame[begin:end] for begin, end in ranges]


def seal(frame: Bytes, blocks: list[NDArray[np.uint8]]) -> None:
    """Makes the checksums those of the bytes."""
    head = head_bytes(frame)
    entries = frame[head - 12 * len(blocks) : head].view(np.uint32).reshape(-1, 3)
    entries[:, 1] = [codec.crc32c(block) for block in blocks]
    frame[CRC_AT : CRC_AT + 4] = 0
    frame[CRC_AT : CRC_AT + 4] = np.frombuffer(np.uint32(codec.crc32c(frame[:head])).tobytes(), np.uint8)


def head_bytes(frame: Bytes) -> int:
    blocks, runs, tables = frame[28:40].view(np.uint32).tolist()
    return int(48 + 128 * tables + 8 * runs + 12 * blocks)


# The GPU's functions, on the host


@needs_core
@pytest.mark.parametrize("base_only", [False, True])
@pytest.mark.parametrize(("zero_bits", "bounded"), [(0, False), (16, False), (0, True)])
@pytest.mark.parametrize("references", [0, 1, 2])
def test_words_are_the_cpus(references: int, zero_bits: int, bounded: bool, base_only: bool) -> None:
    frame, others = encoded(COUNT, references, zero_bits, bounded)
    want = codec.decode(frame, others, base_only=base_only)
    np.testing.assert_array_equal(emulated(frame, others, base_only=base_only), want)


@needs_core
@pytest.mark.parametrize("count", [0, 1, 31, 33, 511, 513, 2047, 2049, BLOCK - 1, BLOCK, BLOCK + 1])
def test_words_are_the_cpus_at_ragged_ends(count: int) -> None:
    frame, others = encoded(count, 2)
    np.testing.assert_array_equal(emulated(frame, others), codec.decode(frame, others))


@needs_core
def test_words_of_some_blocks_are_the_cpus() -> None:
    frame, others = encoded(COUNT, 2, bounded=True)
    for blocks in (range(1, 2), range(1, 3), range(2, 3), range(2, 2)):
        part = [x[blocks.start * BLOCK : blocks.stop * BLOCK] for x in others]
        want = codec.decode(frame, part, blocks=blocks)
        np.testing.assert_array_equal(emulated(frame, part, blocks), want)


@needs_core
def test_the_frames_have_every_mode_and_section() -> None:
    modes: set[str] = set()
    for bounded in (False, True):
        frame, _ = encoded(COUNT, 2, bounded=bounded)
        assert frame[36] > 1, "one table only"
        block = payloads(frame)[0]
        zeros, exceptions = block[4:12].view(np.uint32)
        assert (bounded or zeros > 0) and exceptions > 0
        starts = {0: "grid", 192: "integer", 217: "same", 218: "raw", 219: "step"}
        modes |= {starts[max(s for s in starts if s <= mode)] for mode in block[12 : 12 + BLOCK // TILE]}
    assert modes == {"grid", "integer", "same", "raw", "step"}


@needs_core
def test_of_two_exceptions_at_one_place_the_later_stays() -> None:
    frame, others = encoded(BLOCK, 1)
    (payload,) = payloads(frame)
    count, at = int(payload[8:12].view(np.uint32)[0]), places(payload).exceptions
    for k in range(1, count, 3):  # near and, beyond a warp's 32, far
        payload[at + 6 * k : at + 6 * k + 2] = payload[at : at + 2]
    seal(frame, [payload])
    np.testing.assert_array_equal(emulated(frame, others), codec.decode(frame, others))


def outcome(decode: Callable[..., NDArray], *args: Any, **options: Any) -> tuple[str, NDArray | None]:
    """(what it raised, what it returned)"""
    try:
        return "", decode(*args, **options)
    except CodecError as error:
        return str(error), None


@needs_core
@pytest.mark.parametrize(("references", "zero_bits", "bounded"), [(0, 0, False), (2, 0, True), (1, 16, False)])
def test_what_corrupt_bytes_give_is_refused_or_the_cpus(references: int, zero_bits: int, bounded: bool) -> None:
    """Checksums are made to fit: what remains must hold without them. Sanitizers see each access of these."""
    g = np.random.default_rng(references)
    good, others = encoded(BLOCK + 2500, references, zero_bits, bounded)
    sections = 12 + 2 * 128, head_bytes(good) - 24
    refused = 0
    for round_ in range(300):
        frame = good.copy()
        blocks = payloads(frame)
        block = blocks[int(g.integers(2))]
        # half of them where sizes and modes are, a sixth in code lengths and runs
        place = g.integers(min(sections[0], len(block)) if round_ % 2 else len(block), size=int(g.integers(1, 4)))
        if round_ % 6 == 0:
            frame[g.integers(48, sections[1], size=2)] ^= g.integers(1, 256, size=2, dtype=np.uint8)
        else:
            block[place] ^= g.integers(1, 256, size=len(place), dtype=np.uint8)
        seal(frame, blocks)
        base_only = bool(round_ % 5 == 0)
        error, words = outcome(emulated, frame, others, base_only=base_only)
        cpu_error, cpu_words = outcome(codec.decode, frame, others, base_only=base_only)
        assert error or not cpu_error, cpu_error
        refused += bool(error)
        if words is not None:
            np.testing.assert_array_equal(words, cpu_words)
    assert 100 < refused < 300


def places(payload: Bytes) -> SimpleNamespace:
    """Where the sections of a full block without alphas begin."""
    low_bytes, zeros, exceptions = payload[:12].view(np.uint32).tolist()
    at = 12 + BLOCK // TILE + low_bytes + -(-27 * zeros // 8)
    tables = at + 6 * exceptions
    return SimpleNamespace(modes=12, exceptions=at, tables=tables, sizes=tables + 32)


@needs_core
@pytest.mark.parametrize(
    ("zero_bits", "bounded", "section", "value", "error"),
    [
        (0, True, "modes", 235, "an unknown tile mode"),
        (16, False, "modes", 100, "an unknown tile mode"),  # grid: float32 only
        (0, False, "modes", 219, "an unknown tile mode"),  # step, without a step
        (0, False, "tables", 4, "block sections that do not fill the block"),
        (0, False, "sizes", 1, "block sections that do not fill the block"),
    ],
)
def test_each_reason_is_told(zero_bits: int, bounded: bool, section: str, value: int, error: str) -> None:
    frame, others = encoded(BLOCK, 1, zero_bits, bounded)
    (payload,) = payloads(frame)
    payload[getattr(places(payload), section)] = value
    seal(frame, [payload])
    for decode in (emulated, codec.decode):
        with pytest.raises(CodecError, match=error):
            decode(frame, others)


@needs_core
def test_an_exception_outside_the_block_is_refused() -> None:
    frame, others = encoded(BLOCK - 100, 1)
    (payload,) = payloads(frame)
    at = places(payload).exceptions
    payload[at : at + 2] = 255
    seal(frame, [payload])
    with pytest.raises(CodecError, match="a stream that does not fit its tiles"):
        emulated(frame, others)


@needs_core
def test_a_stream_that_is_too_short_is_refused() -> None:
    frame, others = encoded(BLOCK, 1)
    (payload,) = payloads(frame)
    at = places(payload).sizes
    for k, delta in ((0, -1), (1, 1)):  # a byte of the first falls to the second
        size = payload[at + 2 * k : at + 2 * k + 2].copy().view(np.uint16) + np.uint16(delta % 2**16)
        payload[at + 2 * k : at + 2 * k + 2] = size.view(np.uint8)
    seal(frame, [payload])
    with pytest.raises(CodecError, match="a stream that does not fit its tiles"):
        emulated(frame, others)


@needs_core
def test_changed_bytes_are_refused() -> None:
    frame, others = encoded(BLOCK, 1)
    frame[-1] ^= 1
    with pytest.raises(CodecError, match="a checksum that does not fit its bytes"):
        emulated(frame, others)


# The build


@pytest.mark.parametrize("architecture", ["80", "90"])
def test_kernel_compiles_without_spills(architecture: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]))
    if nvcc is None:
        pytest.skip("no nvcc")
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    options = ["-std=c++20", "-O3", "--fmad=false", "-Xptxas", "-v", "-gencode", target, "-cubin"]
    keep = ["--keep", "--keep-dir", str(tmp_path), "-o", str(tmp_path / "out.cubin")]
    done = subprocess.run([nvcc, *options, *keep, str(SOURCE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    assert re.findall(r"(\d+) bytes spill", done.stderr) == ["0", "0"], done.stderr
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(registers) == 1 and 3 * 256 * registers[0] <= 65536, done.stderr  # three thread blocks of 256
    ptx = (tmp_path / "codec_cuda.ptx").read_text()
    assert not re.findall(r"\b(?:fma|mad)\S*\.f32|\.ftz|\.approx", ptx), "arithmetic that is not the CPU's"


def test_build_leaves_the_module_out_without_nvcc(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDACXX", "/nonexistent/nvcc")
    runpy.run_path(str(ROOT / "setup.py"))["build_native"](tmp_path, tmp_path, "_codec_cuda")
    assert "_codec_cuda is left out: there is no nvcc" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# The Python side, with a GPU's part played by the host


class FakeGpu:
    """As nacd_fast._codec_cuda; launch runs the emulation on the addresses it is given."""

    SLACK = 8
    MARK = 16

    def __init__(self) -> None:
        assert CORE is not None
        self.core = CORE
        self.head: Bytes = np.zeros(0, np.uint8)

    def version(self) -> str:
        return self.core.version()

    def unusable(self) -> str | None:
        return "a driver that is too old"

    def describe(self, status: int) -> str:
        return f"status {status}"

    def plan(self, head: Bytes, first: int, blocks: int) -> tuple[NDArray[np.uint8], int, int, int]:
        self.head, self.first = head.copy(), first
        return np.full(self.MARK, 77, np.uint8), *self.core.block_range(head, first, blocks), 1234

    def check_payload(self, head: Bytes, payload: Bytes, first: int, blocks: int) -> None:
        if len(payload) > 0 and payload[-1] == 0xEE:
            raise ValueError("a checksum that does not fit its bytes")

    def launch(
        self,
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
    ) -> None:
        def at(address: int, count: int, dtype: type = np.uint32) -> NDArray | None:
            size = count * np.dtype(dtype).itemsize
            memory = (ctypes.c_uint8 * size).from_address(address) if address else None
            return None if memory is None else np.ctypeslib.as_array(memory).view(dtype)

        if blocks == 0:
            return
        assert shared_bytes == 1234 and payload == plan + self.MARK
        begin, end = self.core.block_range(self.head, self.first, blocks)
        info = codec.read_info(self.head)
        count = len(info.weights(range(self.first, self.first + blocks)))
        try:
            self.core.decode_emulated(
                self.head,
                at(payload, end - begin, np.uint8),
                end - begin,
                self.first,
                blocks,
                at(a, count),
                at(b, count),
                at(dst, count),
                base_only,
            )
        except ValueError:
            ctypes.c_int32.from_address(status).value = 10


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    if CORE is None:
        pytest.skip("the native module was not built")
    gpu = FakeGpu()
    monkeypatch.setattr(native, "load", lambda name="_codec": gpu if name == "_codec_cuda" else CORE)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=5))
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    return gpu


CPU = torch.device("cpu")


def tensors(words: list[Words]) -> list[torch.Tensor]:
    return [torch.from_numpy(x.view(np.int32)) for x in words]


def test_a_frame_is_uploaded_and_decoded(fake: FakeGpu) -> None:
    frame, others = encoded(COUNT, 2)
    for blocks, base_only in ((None, False), (range(1, 3), False), (range(1), True), (range(1, 1), False)):
        at = slice(None) if blocks is None else slice(blocks.start * BLOCK, blocks.stop * BLOCK)
        uploaded = codec_cuda.upload(frame, CPU, blocks=blocks)
        part = [x[at] for x in others]
        out = torch.empty(uploaded.count, dtype=torch.int32)
        assert codec_cuda.decode_cuda(uploaded, tensors(part), out=out, base_only=base_only) is out
        want = codec.decode(frame, part, blocks=blocks, base_only=base_only)
        np.testing.assert_array_equal(out.numpy().view(np.uint32), want)


def test_malformed_frames_are_codec_errors(fake: FakeGpu) -> None:
    frame, others = encoded(1000, 1)
    with pytest.raises(CodecError, match="fewer bytes than its header says"):
        codec_cuda.upload(frame[:-1], CPU)
    with pytest.raises(CodecError, match="not a frame"):
        codec_cuda.upload(frame[1:], CPU)
    bad = frame.copy()
    bad[-1] = 0xEE
    with pytest.raises(CodecError, match="a checksum"):
        codec_cuda.upload(bad, CPU)
    bad[-1] = frame[-1] ^ 1  # passes the fake's check: the GPU's status comes back
    uploaded = codec_cuda.upload(bad, CPU)
    with pytest.raises(CodecError, match="status 10"):
        codec_cuda.decode_cuda(uploaded, tensors(others))
    status = codec_cuda.new_status(CPU)
    codec_cuda.decode_cuda(uploaded, tensors(others), status=status)
    codec_cuda.decode_cuda(codec_cuda.upload(frame, CPU), tensors(others), status=status)
    with pytest.raises(CodecError, match="status 10"):
        codec_cuda.check(status)


def test_wrong_arguments_say_what_they_must_be(fake: FakeGpu) -> None:
    frame, others = encoded(1000, 1)
    uploaded = codec_cuda.upload(frame, CPU)
    (a,) = tensors(others)
    with pytest.raises(ValueError, match=r"blocks range\(0, 2\), must be a part of range\(0, 1\)"):
        codec_cuda.upload(frame, CPU, blocks=range(2))
    with pytest.raises(ValueError, match=r"0 references, must be 1 \(previous\)"):
        codec_cuda.decode_cuda(uploaded)
    with pytest.raises(
        ValueError, match=r"reference a is torch.float32 \[1000\], must be contiguous torch.int32 \[1000\]"
    ):
        codec_cuda.decode_cuda(uploaded, [a.view(torch.float32)])
    with pytest.raises(ValueError, match=r"out is torch.int32 \[999\]"):
        codec_cuda.decode_cuda(uploaded, [a], out=torch.empty(999, dtype=torch.int32))
    with pytest.raises(ValueError, match="reference a is on meta, must be on cpu"):
        codec_cuda.decode_cuda(uploaded, [torch.empty(1000, dtype=torch.int32, device="meta")])
    with pytest.raises(ValueError, match="out overlaps a reference"):
        codec_cuda.decode_cuda(uploaded, [a], out=a)


def test_it_says_why_there_is_no_gpu(fake: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert codec_cuda.explain() == "codec on CUDA: on the CPU (torch sees no CUDA device)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not codec_cuda.available() and codec_cuda.missing() == "CUDA: a driver that is too old"
    monkeypatch.setattr(fake, "unusable", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert codec_cuda.missing() == "compute capability 7.5, must be at least 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert codec_cuda.available() and codec_cuda.explain() == "codec on CUDA: on the GPU"
    monkeypatch.setattr(native, "load", lambda name: None)
    assert "was not built" in codec_cuda.missing()
    with pytest.raises(ImportError, match="_codec_cuda was not built"):
        codec_cuda.upload(np.zeros(100, np.uint8), CPU)


# On a GPU


def on_gpu(frame: Bytes, references: list[Words], base_only: bool = False) -> Words:
    device = torch.device("cuda")
    there = [x.to(device) for x in tensors(references)]
    words = codec_cuda.decode_cuda(codec_cuda.upload(frame, device), there, base_only=base_only)
    return words.cpu().numpy().view(np.uint32)


@pytest.mark.gpu
def test_gpu_can_be_used() -> None:
    assert codec_cuda.missing() == ""


@pytest.mark.gpu
@pytest.mark.parametrize("base_only", [False, True])
@pytest.mark.parametrize(("zero_bits", "bounded"), [(0, False), (16, False), (0, True)])
@pytest.mark.parametrize("references", [0, 1, 2])
def test_gpu_words_are_the_cpus(references: int, zero_bits: int, bounded: bool, base_only: bool) -> None:
    for count in (0, 1, 33, 513, BLOCK, COUNT):
        frame, others = encoded(count, references, zero_bits, bounded)
        want = codec.decode(frame, others, base_only=base_only)
        np.testing.assert_array_equal(on_gpu(frame, others, base_only), want)


@pytest.mark.gpu
def test_gpu_words_of_some_blocks_are_the_cpus() -> None:
    device = torch.device("cuda")
    frame, others = encoded(COUNT, 2, bounded=True)
    part = [x[BLOCK:] for x in others]
    uploaded = codec_cuda.upload(frame, device, blocks=range(1, 3))
    out = torch.empty(COUNT - BLOCK + 1, dtype=torch.int32, device=device)[1:]  # aligned to 4 bytes and no more
    codec_cuda.decode_cuda(uploaded, [x.to(device) for x in tensors(part)], out=out)
    np.testing.assert_array_equal(out.cpu().numpy().view(np.uint32), codec.decode(frame, part, blocks=range(1, 3)))


@pytest.mark.gpu
def test_gpu_chain_of_many_blocks_with_one_status() -> None:
    """More blocks than run at once; a frame's words are the next one's reference; the host waits once."""
    device = torch.device("cuda")
    words, a, b = snapshots(700 * BLOCK + 5)
    first, second = codec.encode(a, threads=4).data, codec.encode(words, (a, b), threads=4).data
    status = codec_cuda.new_status(device)
    decoded_a = codec_cuda.decode_cuda(codec_cuda.upload(first, device), status=status)
    references = [decoded_a, *(x.to(device) for x in tensors([b]))]
    got = codec_cuda.decode_cuda(codec_cuda.upload(second, device), references, status=status)
    codec_cuda.check(status)
    np.testing.assert_array_equal(got.cpu().numpy().view(np.uint32), words)


@pytest.mark.gpu
@needs_core
def test_gpu_refuses_what_the_host_refuses() -> None:
    good, others = encoded(BLOCK + 2500, 2, bounded=True)
    g = np.random.default_rng(0)
    for round_ in range(100):
        frame = good.copy()
        blocks = payloads(frame)
        place = g.integers(12 + 2 * 128 if round_ % 2 else len(blocks[0]), size=3)
        blocks[0][place] ^= g.integers(1, 256, size=3, dtype=np.uint8)
        seal(frame, blocks)
        error, words = outcome(emulated, frame, others)
        gpu_error, gpu_words = outcome(on_gpu, frame, others)
        assert bool(gpu_error) == bool(error), (error, gpu_error)
        if words is not None:
            np.testing.assert_array_equal(gpu_words, words)
