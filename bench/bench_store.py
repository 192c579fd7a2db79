"""The trajectory store beside other ways to keep snapshots: ratios of whole files, speed of one frame, reading pairs.

    lossless_ratio            bytes of the snapshots over those of their records in the file, whole groups of 8
    lossless_ratio_fast       the same in the `fast` layout, at most 3 frames to a snapshot
    bounded_ratio             the same as lossless_ratio with errors up to eps x the RMS of the change, from the first
                              lossy snapshot on; bounded_ratio_with_first counts the exact first one, too
    ratio_over_<peer>         one frame, the snapshot before given: our ratio over the peer's
    decode_over_<peer>, encode_over_<peer>
                              the same frame, one thread: our speed over the peer's, in CPU time; as the store decodes,
                              with checksums of the bytes and of the decoded words (the peers compare none)
    decode_unverified_over_<peer>
                              without the second
    decode_two_threads        speed of two threads over one, in wall time
    read_pair, append         milliseconds a pair of snapshots, and a snapshot made durable

    python bench/bench_store.py --json runs/bench/bench_store.json [--trajectories runs/trajectories]

The trajectories are those of bench/trajectories.py, which makes what is missing: minutes of training; smollm2 needs its
wheel. A frame's rows come twice: with the allocator as every program finds it, and, `memory kept`, with a glibc told to
keep freed memory, where a peer that allocates its output anew for each call never meets fresh pages. --quick measures a
small random walk instead. With --device cuda: decoding there beside decoding here and copying, decode_speed_cuda.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import timing
import torch
from timing import Rows, interleaved, median_ratio
from torch import Tensor

from nacd_fast import codec, codec_cuda
from nacd_fast.store import TrajectoryStore, TrajectoryWriter

Snapshots = dict[int, dict[str, Tensor]]

TRAJECTORIES = Path("runs/trajectories")
FRAME = 10  # the snapshot of the single-frame rows; the one before it is given
GROUP = 8
EPS = (0.1, 0.01)
PEERS = ("zipnn_delta", "zstd1_planes", "safetensors", "torch_load", "zipnn_raw", "pcodec")
RATIO_PEERS = ("zipnn_delta", "pcodec")
PACKAGES = ("zipnn", "pcodec", "zstandard")  # of the peers; in the `bench` extra


def random_walk(snapshots: int, count: int) -> Snapshots:
    """A small trajectory for --quick: weights that move smoothly, as under AdamW."""
    generator = torch.Generator().manual_seed(0)
    weights = {f"layer{i}.weight": 0.02 * torch.randn(count, generator=generator) for i in range(4)}
    drift = {name: torch.zeros(count) for name in weights}
    walk: Snapshots = {}
    for step in range(snapshots):
        walk[step] = {name: tensor.clone() for name, tensor in weights.items()}
        for name in weights:
            drift[name] = 0.9 * drift[name] + 1e-4 * torch.randn(count, generator=generator)
            weights[name] = weights[name] + drift[name]
    return walk


def file_bytes(snapshots: Snapshots, folder: Path, **options: Any) -> dict[int, int]:
    """Step -> bytes of its record in a trajectory file written with `options`."""
    path = folder / "trajectory.nacd"
    with TrajectoryWriter(path, **options) as writer:
        for step, tensors in snapshots.items():
            writer.append(step, tensors)
    frames = TrajectoryStore(path).index.frames
    return {step: place.record.end - place.record.offset for step, place in frames.items()}


def ratio(snapshots: Snapshots, sizes: dict[int, int], members: slice) -> float:
    """Bytes of the snapshots over those of their records, over `members` of them."""
    steps = list(snapshots)[members]
    plain = sum(tensor.nbytes for step in steps for tensor in snapshots[step].values())
    return plain / sum(sizes[step] for step in steps)


def measure_ratios(rows: Rows, case: str, snapshots: Snapshots) -> None:
    whole = (len(snapshots) - 1) // GROUP * GROUP  # the last key is the next group's
    for metric, options in (("lossless_ratio", {}), ("lossless_ratio_fast", {"layout": "fast"})):
        with tempfile.TemporaryDirectory() as folder:
            sizes = file_bytes(snapshots, Path(folder), **options)
        rows.add(case, metric, ratio(snapshots, sizes, slice(0, whole)), "x")
    for eps in EPS:
        with tempfile.TemporaryDirectory() as folder:
            sizes = file_bytes(snapshots, Path(folder), eps=eps)
        rows.add(f"{case} eps{eps}", "bounded_ratio", ratio(snapshots, sizes, slice(1, whole + 1)), "x")
        rows.add(f"{case} eps{eps}", "bounded_ratio_with_first", ratio(snapshots, sizes, slice(0, whole)), "x")


def measure_frame(rows: Rows, case: str, snapshots: Snapshots) -> None:
    """Our frame and the peers', on the same snapshot in the same rounds."""
    from peers_store import Peer, flat_bits, measure, peers

    steps = list(snapshots)
    index = min(FRAME, len(steps) - 1)
    tensors, previous = snapshots[steps[index]], flat_bits(snapshots[steps[index - 1]])
    words, out = flat_bits(tensors), np.empty_like(previous)

    def encode() -> bytes:
        return codec.encode(words, (previous,)).data.tobytes()

    def decode(blob: bytes) -> codec.Words:
        return codec.decode(padded(blob), (previous,), out=out, verify=True)

    def decode_unverified(blob: bytes) -> codec.Words:
        return codec.decode(padded(blob), (previous,), out=out)

    room: dict[bytes, codec.Bytes] = {}

    def padded(blob: bytes) -> codec.Bytes:  # as a reader has it: with the slack that decoding asks for behind it
        if blob not in room:
            room[blob] = np.frombuffer(blob + bytes(codec.SLACK), np.uint8)
        return room[blob]

    ours = {
        "ours": Peer(encode, decode, lambda decoded: decoded),
        "ours, words unverified": Peer(encode, decode_unverified, lambda decoded: decoded),
    }
    for keep in (False, True):
        found = measure({**ours, **peers(tensors, snapshots[steps[index - 1]])}, tensors, keep=keep)
        name = f"{case}, memory kept" if keep else case
        mb = words.nbytes / 1e6
        for peer, figures in found.items():
            rows.add(name, "frame_ratio", figures.ratio, "x", peer)
            rows.add(name, "encode_speed", mb / statistics.median(figures.encode), "MB/s", peer)
            rows.add(name, "decode_speed", mb / statistics.median(figures.decode), "MB/s", peer)
        for peer in RATIO_PEERS:
            rows.add(name, f"ratio_over_{peer}", found["ours"].ratio / found[peer].ratio, "x", peer)
        for peer in PEERS:
            rows.add(name, f"decode_over_{peer}", median_ratio(found[peer].decode, found["ours"].decode), "x", peer)
            unverified = median_ratio(found[peer].decode, found["ours, words unverified"].decode)
            rows.add(name, f"decode_unverified_over_{peer}", unverified, "x", peer)
            rows.add(name, f"encode_over_{peer}", median_ratio(found[peer].encode, found["ours"].encode), "x", peer)


def measure_threads(rows: Rows, case: str, snapshots: Snapshots, rounds: int) -> None:
    """On the last snapshot, and on four of it in a row: starting a thread takes as long as decoding 100,000 weights."""
    for copies in (1, 4):
        words, previous = (
            np.tile(flat(snapshots[step]), copies) for step in (list(snapshots)[-1], list(snapshots)[-2])
        )
        frame = np.append(codec.encode(words, (previous,)).data, np.zeros(codec.SLACK, np.uint8))
        out = np.empty_like(words)

        def decode(
            threads: int, frame: codec.Bytes = frame, previous: codec.Words = previous, out: codec.Words = out
        ) -> Callable[[], object]:
            return lambda: codec.decode(frame, (previous,), out=out, threads=threads, verify=True)

        seconds = interleaved({"one": decode(1), "two": decode(2)}, rounds, torch.device("cpu"))
        speed = median_ratio(seconds["one"], seconds["two"])
        rows.add(f"{case}, {len(words) / 1e6:.1f} M weights", "decode_two_threads", speed, "x", "one thread")


def measure_device(rows: Rows, device: torch.device, rounds: int) -> None:
    """A frame of 8 M weights, from host memory to weights on the GPU: decoded there, or here and copied."""
    if reason := codec_cuda.missing(device):
        sys.exit(f"--device {device}: {reason}")
    before, now = (flat(tensors) for tensors in random_walk(2, 2_000_000).values())
    frame = np.append(codec.encode(now, (before,)).data, np.zeros(codec.SLACK, np.uint8))
    reference = torch.from_numpy(before.view(np.int32)).to(device)
    there, out = codec_cuda.upload(frame, device), torch.empty(len(now), dtype=torch.int32, pin_memory=True)

    def copied() -> Tensor:
        codec.decode(frame, (before,), out=out.numpy().view(np.uint32))
        return out.to(device, non_blocking=True)

    contestants: dict[str, Callable[[], Tensor]] = {
        "decoded there": lambda: codec_cuda.decode_cuda(codec_cuda.upload(frame, device), (reference,)),
        "decoded there, frame resident": lambda: codec_cuda.decode_cuda(there, (reference,)),
        "decoded here, copied": copied,
    }
    for name, work in contestants.items():
        if not torch.equal(work().cpu(), torch.from_numpy(now.view(np.int32))):
            sys.exit(f"{name}: the decoded weights differ; nothing is reported")
    for name, seconds in interleaved(contestants, rounds, device, warmup=3).items():
        rows.add("8 M weights", "decode_speed_cuda", now.nbytes / 1e6 / statistics.median(seconds), "MB/s", name)


def measure_store(rows: Rows, case: str, snapshots: Snapshots, rounds: int) -> None:
    """Appending, and reading pairs in a shuffled order as matching does: from frames, and from safetensors files."""
    from safetensors.torch import load_file, save_file

    steps = list(snapshots)
    pairs = [(steps[i], steps[i + 2]) for i in range(len(steps) - 2)]
    order = [pairs[i] for i in torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        appends = []
        with TrajectoryWriter(folder / "trajectory.nacd") as writer:
            for step, tensors in snapshots.items():
                start = time.perf_counter()
                writer.append(step, tensors)
                appends.append(time.perf_counter() - start)
        rows.add(case, "append", 1e3 * statistics.median(appends), "ms")
        rows.add(case, "append_slowest", 1e3 * max(appends), "ms")
        for step, tensors in snapshots.items():
            save_file(tensors, folder / f"{step}.safetensors")
        store = TrajectoryStore(folder / "trajectory.nacd")

        def cold() -> None:
            for t, t_end in order:
                TrajectoryStore(folder / "trajectory.nacd", cache_bytes=0).read_pair(t, t_end)

        def cached() -> None:
            for t, t_end in order:
                store.read_pair(t, t_end)

        def plain() -> None:
            for t, t_end in order:
                for step in (t, t_end):
                    _ = {name: tensor.clone() for name, tensor in load_file(folder / f"{step}.safetensors").items()}

        seconds = interleaved({"cold": cold, "cached": cached, "safetensors": plain}, rounds, torch.device("cpu"))
        for how, taken in seconds.items():
            rows.add(case, "read_pair", 1e3 * statistics.median(taken) / len(order), "ms", how)


def flat(tensors: dict[str, Tensor]) -> codec.Words:
    return torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)]).numpy().view(np.uint32)


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--trajectories", type=Path, default=TRAJECTORIES, help="folder of the cases' files")
    parser.add_argument("--cases", nargs="+", default=["smollm2", "opt", "sgd", "sgd_slow"], help="of trajectories.py")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    rows = Rows("bench_store", device)
    rounds = 3 if args.quick else 15
    for case, snapshots in trajectories(args):
        measure_ratios(rows, case, snapshots)
        missing = [package for package in PACKAGES if find_spec(package) is None]
        if missing and not args.quick:
            sys.exit(f"{', '.join(missing)} not installed: pip install -e '.[bench]'")
        if missing:
            print(f"no peers: {', '.join(missing)} not installed", flush=True)
        else:
            measure_frame(rows, case, snapshots)
        measure_threads(rows, case, snapshots, rounds)
        measure_store(rows, case, snapshots, rounds if args.quick else 5)
    if device.type == "cuda":
        measure_device(rows, device, rounds)
    rows.write(args.json)


def trajectories(args: argparse.Namespace) -> list[tuple[str, Snapshots]]:
    if args.quick:
        return [("random walk", random_walk(2 * GROUP + 1, 50_000))]
    from trajectories import load, make

    return [(case, load(make(case, args.trajectories))) for case in args.cases]


if __name__ == "__main__":
    main()
