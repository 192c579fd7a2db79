"""Reading for a GPU. The recursion and its cache run anywhere, with the CPU's codec in the place of the GPU's."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nacd_fast import codec, codec_cuda
from nacd_fast.codec import Bytes, CodecError
from nacd_fast.errors import InputError
from nacd_fast.store import TrajectoryStore, TrajectoryWriter
from nacd_fast.store.decoder import Caches, FrameCache
from nacd_fast.store.device import DeviceDecoder
from tests.store.snapshots import assert_same_bits, snapshot, write

CPU = torch.device("cpu")


class Stand:
    """codec_cuda's functions on the CPU; counts the frames, and fails at those that it is told to."""

    def __init__(self) -> None:
        self.frames = 0
        self.bad = False

    def upload(self, frame: Bytes, device: torch.device) -> Bytes:
        assert device == CPU
        self.frames += 1
        return frame

    def decode_cuda(
        self, frame: Bytes, references: Sequence[Tensor] = (), *, base_only: bool, status: Tensor
    ) -> Tensor:
        words = codec.decode(frame, [r.numpy().view(np.uint32) for r in references], base_only=base_only)
        return torch.from_numpy(words.view(np.int32))

    def new_status(self, device: torch.device) -> Tensor:
        return torch.zeros(1, dtype=torch.int32, device=device)

    def check(self, status: Tensor) -> None:
        if self.bad:
            raise CodecError("an unknown tile mode")


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    made = Stand()
    for name in ("upload", "decode_cuda", "new_status", "check"):
        monkeypatch.setattr(codec_cuda, name, getattr(made, name))
    return made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write(tmp_path / "t.nacd", range(20))
    return tmp_path / "t.nacd"


def decoder(path: Path, limit: int) -> tuple[TrajectoryStore, DeviceDecoder]:
    store = TrajectoryStore(path)
    return store, DeviceDecoder(store.decoder, CPU, FrameCache(limit))


def kept(device: DeviceDecoder) -> list[int]:
    return [step for _, step in device.cache.keys]


def test_the_same_weights(path: Path, stand: Stand) -> None:
    store, device = decoder(path, 2**20)
    for step in (3, 19, 0, 8, 11, 3):
        whole = torch.cat([t.reshape(-1) for t in store.read(step).values()])
        assert torch.equal(device.flat(step).view(torch.int32), whole.view(torch.int32))
        base = torch.cat([t.reshape(-1) for t in store.read(step, base_only=True).values()])
        assert torch.equal(device.flat(step, base_only=True).view(torch.int32), base.view(torch.int32))


def test_keys_stay(path: Path, stand: Stand) -> None:
    store, device = decoder(path, 2 * 4 * TrajectoryStore(path).schema.count)
    device.flat(1)
    assert stand.frames == store.frames_to(1) == 5 and kept(device) == [0, 8]
    device.flat(3)
    assert stand.frames == 5 + 3  # 4, 2 and 3 itself
    device.flat(12)
    assert kept(device) == [8, 16]  # the least recently used key went
    assert decoder(path, 0)[1].flat(1) is not None and stand.frames == 8 + 2 + 5


def test_stores_share_one_limit(tmp_path: Path, stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of two trajectories are kept apart; "cuda" is the GPU that it means."""
    monkeypatch.setattr(codec_cuda, "available", lambda device: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(codec_cuda, "upload", lambda frame, device: frame)
    monkeypatch.setattr(codec_cuda, "new_status", lambda device: torch.zeros(1, dtype=torch.int32))
    paths = [tmp_path / name for name in "xy"]
    for sign, path in zip((1, -1), paths, strict=True):
        with TrajectoryWriter(path) as writer:
            for step in range(9):
                writer.append(step, {"a": torch.full((9,), float(sign * (step + 1)))})
    caches = Caches(2 * 36)
    stores = [TrajectoryStore(path, caches=caches) for path in paths]
    for _ in range(2):
        for sign, store in zip((1, -1), stores, strict=True):
            for name in ("cuda", "cuda:1"):
                assert store.read(4, device=None)["a"][0] == 5 * sign
                flat = store._on(torch.device(name), store.decoder)
                assert flat is not None and flat.flat(4)[0] == 5 * sign
                assert list(caches.devices) == [torch.device("cuda:1")]
                assert 0 < caches.host.bytes <= 2 * 36
                assert 0 < caches.on(torch.device("cuda:1")).bytes <= 2 * 36
    for store in stores:
        store.close()
    assert caches.host.bytes == caches.on(torch.device("cuda:1")).bytes == 0


def test_what_a_failed_read_decoded_is_not_kept(path: Path, stand: Stand) -> None:
    _, device = decoder(path, 2**20)
    stand.bad = True
    with pytest.raises(InputError, match=r"t\.nacd: the snapshot of step 5, .*: an unknown tile mode"):
        device.flat(5)
    assert not kept(device)


def test_bfloat16(tmp_path: Path, stand: Stand) -> None:
    tensors = {step: {name: t.bfloat16() for name, t in snapshot(step).items()} for step in range(3)}
    with TrajectoryWriter(tmp_path / "t.nacd") as writer:
        for step, state in tensors.items():
            writer.append(step, state)
    _, device = decoder(tmp_path / "t.nacd", 2**20)
    flat = device.flat(1)
    assert flat.dtype == torch.bfloat16
    assert torch.equal(
        flat.view(torch.int16), torch.cat([tensors[1][n].reshape(-1) for n in sorted(tensors[1])]).view(torch.int16)
    )


def test_a_machine_without_a_gpu_decodes_on_the_cpu(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec_cuda, "available", lambda device: False)
    store = TrajectoryStore(path)
    assert all(store._on(device, store.decoder) is None for device in (torch.device("cuda"), CPU))
    assert_same_bits(store.read(5, device="cpu"), snapshot(5))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_reads_the_same(path: Path) -> None:
    assert not codec_cuda.missing(torch.device("cuda"))
    store = TrajectoryStore(path)
    for step in (3, 19, 0, 8, 11, 3):
        made = store.read(step, device="cuda")
        assert all(t.device.type == "cuda" for t in made.values())
        assert_same_bits({name: t.cpu() for name, t in made.items()}, snapshot(step))
    assert list(store.caches.devices) == [torch.device("cuda", torch.cuda.current_device())]
    with store.prefetch([(1, 3), (5, 9)], device="cuda") as pairs:
        for (start, target), (t, t_end) in zip(pairs, [(1, 3), (5, 9)], strict=True):
            assert_same_bits({name: x.cpu() for name, x in start.items()}, snapshot(t))
            assert_same_bits({name: x.cpu() for name, x in target.items()}, snapshot(t_end))
