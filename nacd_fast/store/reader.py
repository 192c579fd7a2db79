"""Reads snapshots of a trajectory, in any order, while a writer may be appending.

A store sees what was there when it was opened, until a read finds that a writer has cut it: it then looks once what is
there now. Whatever bytes are not those that were written end in an InputError that names the file and the step. Words
are compared with their checksums at every read, but with base_only and on a GPU.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from .. import codec_cuda
from ..codec import BLOCK
from ..errors import InputError
from .bounds import by_name
from .decoder import Caches, ChangedError, Decoder, FrameCache
from .device import DeviceDecoder
from .index import Index, open_name, read_index
from .layout import GROUP, frames_to
from .prefetch import Prefetch
from .schema import Schema, Words, to_flat

CACHE_BYTES = 2**29  # of decoded frames that others are coded against
ATTEMPTS = 100  # at opening, while a writer changes the files

Result = TypeVar("Result")
Pair = tuple[dict[str, Tensor], dict[str, Tensor]]


class TrajectoryStore:
    """A trajectory for reading: `steps`, and the snapshot at each. One store can be read from several threads.

    cache_bytes: of decoded frames, in memory and on each GPU; stores that are given the same caches share one limit.
    """

    def __init__(self, path: Path, *, cache_bytes: int = CACHE_BYTES, caches: Caches | None = None, threads: int = 1):
        self.path, self.caches = path, caches or Caches(cache_bytes)
        self.lock = threading.Lock()
        self.files, index = open_files(path)
        # a file whose schema was not written to its end holds nothing
        self.schema = index.schema or Schema({}, "float32", "hierarchical", GROUP, 0.0)
        self.decoder = Decoder(index, self.schema, self.caches.host, threads)

    def __enter__(self) -> "TrajectoryStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.caches.drop(self.decoder)
        for file in self.files:
            file.close()

    def __len__(self) -> int:
        return len(self.index.frames)

    @property
    def index(self) -> Index:
        return self.decoder.index

    @property
    def steps(self) -> list[int]:
        return list(self.index.frames)

    @property
    def shapes(self) -> dict[str, list[int]]:
        return self.schema.tensors

    def check_step(self, step: int) -> None:
        """Raise InputError, with the nearest steps, unless there is a snapshot at `step`."""
        if step in self.index.frames:
            return
        below = [str(s) for s in self.steps if s < step][-1:]
        above = [str(s) for s in self.steps if s > step][:1]
        raise InputError(f"{self.path}: no snapshot at step {step}; nearest: {' and '.join(below + above) or 'none'}")

    def frames_to(self, step: int) -> int:
        """How many frames are decoded for the snapshot when none is in the cache."""
        self.check_step(step)
        return len(frames_to(step, self.index.references))

    def bounds(self, step: int) -> Mapping[str, float]:
        """The most that a weight of each tensor is off; 0 is lossless."""
        return by_name(self._current(step, lambda decoder: decoder.bounds(step)), self.schema)

    def base_error(self, step: int) -> float:
        """The most that a weight of the snapshot is off where it is read with base_only."""
        return self._current(step, lambda decoder: decoder.base_error(step))

    def read(
        self,
        step: int,
        *,
        tensors: Sequence[str] | None = None,
        out: Tensor | Mapping[str, Tensor] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        base_only: bool = False,
    ) -> dict[str, Tensor]:
        """The snapshot of `step`: name -> tensor, names sorted; views of one flat tensor.

        tensors: names, or the whole parts, between dots, that names begin with; only the blocks that hold them are
        decoded. out is filled: a flat tensor of all that is read, or a tensor by name. Without it: on `device`, as
        `dtype` (default: the CPU, as they are stored); a whole snapshot for a GPU is decoded there. base_only: less
        work, the same bytes; each weight is at most base_error(step) off.
        """
        self.check_step(step)
        names = self._select(tensors)
        sizes = [self.schema.slices[name].stop - self.schema.slices[name].start for name in names]
        if out is not None:
            if device is not None or dtype is not None:
                raise InputError("out with device or dtype: out has its own")
            self._check_out(out, names, sum(sizes))

        def flat_from(decoder: Decoder) -> Tensor:
            on_gpu = device is not None and names == list(self.shapes)
            gpu = self._on(torch.device(device), decoder) if device is not None and on_gpu else None
            if gpu is not None:
                return gpu.flat(step, base_only=base_only)
            return to_flat(self._words(decoder, step, names, out, base_only), self.schema)

        flat = self._current(step, flat_from)
        if isinstance(out, Tensor):
            flat = out if flat.data_ptr() == out.data_ptr() else out.copy_(flat)
        elif device is not None or dtype is not None:
            flat = flat.to(device=device, dtype=dtype)
        pieces = flat.split(sizes)
        made = {name: piece.view(self.shapes[name]) for name, piece in zip(names, pieces, strict=True)}
        if isinstance(out, Mapping):
            return {name: out[name].copy_(t) for name, t in made.items()}
        return made

    def read_flat(self, step: int) -> Words:
        """The snapshot as words [P] uint32: float32 bits, bfloat16 widened; tensors in the order of their names."""
        return self._current(step, lambda decoder: self._words(decoder, step, list(self.shapes), None, False))

    def read_pair(self, t: int, t_end: int, *, device: torch.device | str | None = None) -> Pair:
        """The snapshots of a matching segment: its start and its target."""
        self.check_step(t)
        self.check_step(t_end)
        return self.read(t, device=device), self.read(t_end, device=device)

    def prefetch(
        self, pairs: Iterable[tuple[int, int]], depth: int = 2, *, device: torch.device | str | None = None
    ) -> Prefetch[tuple[int, int], Pair]:
        """Iterates over read_pair of each pair, read in a thread that is at most `depth` pairs ahead."""
        return Prefetch(lambda pair: self.read_pair(*pair, device=device), pairs, depth)

    def verify(self, done: Callable[[int], object] = lambda step: None) -> None:
        """Decode every frame; `done(step)` is called after each. Raises InputError for the first damaged snapshot."""
        decoder = Decoder(self.index, self.schema, FrameCache(self.caches.limit), self.decoder.threads)
        for step in self.steps:
            decoder.bounds(step)
            decoder.words(step)
            done(step)

    def _current(self, step: int, work: Callable[[Decoder], Result]) -> Result:
        """`work`, a second time with what is in the files now, if a writer has cut them and `step` is there still."""
        self.check_step(step)
        decoder = self.decoder
        try:
            return work(decoder)
        except ChangedError:
            newer = self._renew(decoder)
            if newer is None or step not in newer.index.frames:
                raise
        return work(newer)

    def _renew(self, old: Decoder) -> Decoder | None:
        """A decoder of what is in the files now, which knows nothing of what was decoded from `old`; None without."""
        with self.lock:
            if self.decoder is old:
                try:
                    files, index = open_files(self.path)
                except InputError:
                    return None
                if index.schema != self.schema:
                    for file in files:
                        file.close()
                    return None
                self.files += files  # the former ones are in use, maybe
                self.decoder = Decoder(index, self.schema, self.caches.host, old.threads)
                self.caches.drop(old)
            return self.decoder

    def _on(self, device: torch.device, decoder: Decoder) -> DeviceDecoder | None:
        """What decodes on that device; None where the CPU does."""
        if device.type != "cuda" or not codec_cuda.available(device):
            return None
        if device == torch.device("cuda"):
            device = torch.device("cuda", torch.cuda.current_device())
        return DeviceDecoder(decoder, device, self.caches.on(device))

    def _check_out(self, out: Tensor | Mapping[str, Tensor], names: list[str], count: int) -> None:
        """Raise InputError unless `out` can take those tensors, `count` weights."""
        if isinstance(out, Tensor):
            if list(out.shape) != [count]:
                raise InputError(f"out of shape {list(out.shape)}: must be [{count}]")
            if not out.is_floating_point():
                raise InputError(f"out is {out.dtype}, must be of a floating type")
            return
        if out.keys() != set(names):
            raise InputError(f"out has tensors {', '.join(sorted(out))}, must have {', '.join(names)}")
        for name in names:
            if list(out[name].shape) != self.shapes[name]:
                raise InputError(f"out: tensor {name} has shape {list(out[name].shape)}, must be {self.shapes[name]}")
            if not out[name].is_floating_point():
                raise InputError(f"out: tensor {name} is {out[name].dtype}, must be of a floating type")

    def _select(self, tensors: Sequence[str] | None) -> list[str]:
        """Names, sorted, each once."""
        if tensors is None:
            return list(self.shapes)
        chosen: set[str] = set()
        for wanted in tensors:
            parts = wanted if wanted.endswith(".") or not wanted else wanted + "."
            found = {wanted} & self.shapes.keys() or {name for name in self.shapes if name.startswith(parts)}
            if not found:
                raise InputError(f"{self.path}: no tensor is {wanted!r} or begins with it")
            chosen |= found
        return sorted(chosen)

    def _words(
        self,
        decoder: Decoder,
        step: int,
        names: list[str],
        out: Tensor | Mapping[str, Tensor] | None,
        base_only: bool,
    ) -> Words:
        """The words of those tensors, in memory of their own or, where it fits, that of `out`."""
        if len(names) == len(self.shapes):
            direct = isinstance(out, Tensor) and out.device.type == "cpu" and out.dtype == torch.float32
            if direct and isinstance(out, Tensor) and out.is_contiguous() and not self.schema.zero_bits:
                return whole(decoder, step, base_only, out.detach().view(torch.int32).numpy().view(np.uint32))
            return whole(decoder, step, base_only)
        pieces: dict[str, Words] = {}
        for blocks, held in runs_of_blocks({name: self.schema.slices[name] for name in names}):
            decoded, first = decoder.decode(step, blocks, base_only=base_only), blocks.start * BLOCK
            for name in held:
                place = self.schema.slices[name]
                pieces[name] = decoded[place.start - first : place.stop - first]
        return np.concatenate([np.empty(0, np.uint32), *(pieces[name] for name in names)])


def whole(decoder: Decoder, step: int, base_only: bool, out: Words | None = None) -> Words:
    """All words of the snapshot, in `out` or memory of their own, which is asked for when the frame was checked.

    Keys are kept in the cache; other snapshots if others need them.
    """
    is_key = not decoder.index.frames[step].record.references
    if base_only or (not is_key and decoder.cache.get(step, decoder) is None):
        return decoder.decode(step, decoder.all, out, base_only=base_only)
    words = decoder.words(step)
    if out is None:
        return words.copy()
    out[:] = words
    return out


def runs_of_blocks(places: Mapping[str, slice]) -> Iterator[tuple[range, list[str]]]:
    """The blocks that hold the tensors, as few ranges, and which tensors lie in each. places rise."""
    begin = end = 0
    held: list[str] = []
    for name, place in places.items():
        first, last = place.start // BLOCK, -(-place.stop // BLOCK)
        if held and first > end:
            yield range(begin, end), held
            held = []
        begin, end = (first, last) if not held else (begin, max(end, last))
        held.append(name)
    if held:
        yield range(begin, end), held


def open_files(path: Path) -> tuple[list[FileIO], Index]:
    """The files and their index. A writer may seal a group meanwhile: then the open file is another one afterwards."""
    for attempt in range(ATTEMPTS):
        files: list[FileIO] = []
        try:
            with suppress(FileNotFoundError):
                files.append(FileIO(open_name(path)))
            open_file = files[0] if files else None
            files.append(FileIO(path))
            index = read_index(files[-1], open_file, path)
            if is_at(open_name(path), open_file):
                return files, index
        except FileNotFoundError:
            raise InputError(f"{path}: no such file") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        except InputError:
            if attempt > 1 and is_at(open_name(path), open_file):
                raise
        for file in files:
            file.close()
    raise InputError(f"{path}: a writer changes it faster than it can be opened")


def is_at(path: Path, file: FileIO | None) -> bool:
    """Whether `path` names the open file still, or nothing where it is None."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return file is None
    return file is not None and os.path.samestat(found, os.fstat(file.fileno()))
