"""What every bench shares: interleaved timing, one JSON row a figure, where and with what it was measured.

A machine's speed drifts, so the contestants take turns in one process: round after round, each once. A ratio is the
median over the rounds of the ratio within a round.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    *("torch", "triton", "transformers", "peft", "bitsandbytes", "numpy", "safetensors"),
    *("zipnn", "pcodec", "zstandard", "torchopt", "higher", "liger-kernel", "unsloth", "jvp-flash-attention"),
    *("faiss-cpu", "pykeops"),
)
FLUSH_BYTES = 2**28  # written between two timings on a GPU, so that none finds its inputs in the L2 cache
FIELDS = ("bench", "case", "metric", "value", "unit", "peer", "threads", "device", "versions", "commit")


def device_name(device: torch.device) -> str:
    """The processor's or the GPU's name, as it gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    return f"CPU {names[0] if names else platform.processor()}"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit measured, with `+` where the working tree differs from it."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


class Rows:
    """The figures of one bench; each is printed as it is found, `write` leaves them as a JSON list."""

    def __init__(self, bench: str, device: torch.device):
        self.bench = bench
        self.rows: list[dict[str, Any]] = []
        self.where = {
            "threads": torch.get_num_threads(),
            "device": device_name(device),
            "versions": versions(),
            "commit": commit(),
        }

    def add(self, case: str, metric: str, value: float, unit: str, peer: str = "") -> None:
        row = {
            "bench": self.bench,
            "case": case,
            "metric": metric,
            "value": value,
            "unit": unit,
            "peer": peer,
            **self.where,
        }
        self.rows.append({field: row[field] for field in FIELDS})
        print(f"{case:44} {metric:28} {value:14.5g} {unit:8} {peer}", flush=True)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.rows, indent=1) + "\n")


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    warmup: int = 1,
    twice: bool = False,
) -> dict[str, list[float]]:
    """Seconds of every contestant in every round, after `warmup` rounds that are not counted.

    On a GPU they are the device's own, between two events, with the L2 cache overwritten before. `twice`: each time
    counted follows an untimed call of the same contestant, for those whose rounds are minutes apart: a system may take
    back memory that was not touched for so long.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    time_one = cuda_seconds if device.type == "cuda" else cpu_seconds
    for round_ in range(warmup + rounds):
        for name, work in contestants.items():
            if twice:
                work()
            taken = time_one(work)
            if round_ >= warmup:
                seconds[name].append(taken)
    return seconds


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cuda_seconds(work: Callable[[], object]) -> float:
    torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda").zero_()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


@cache
def ceilings(device: torch.device) -> tuple[float, float]:
    """What the device reaches: bytes/s (read plus written) of a large copy, flop/s of a large product.

    The product is bfloat16 on a GPU, float32 on a CPU (where both are of one core, if torch has one thread).
    """
    gpu = device.type == "cuda"
    source = torch.randn(2**28 if gpu else 2**24, device=device)
    target = torch.empty_like(source)
    n = 8192 if gpu else 1024
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16 if gpu else torch.float32) for _ in range(2))
    work = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    seconds = {name: statistics.median(times) for name, times in interleaved(work, 9, device, warmup=2).items()}
    return 2 * source.numel() * source.element_size() / seconds["copy"], 2 * n**3 / seconds["product"]


def quantiles(seconds: list[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    ordered = sorted(seconds)
    return (
        ordered[round(0.2 * (len(ordered) - 1))],
        statistics.median(ordered),
        ordered[round(0.8 * (len(ordered) - 1))],
    )


def median_ratio(over: list[float], under: list[float]) -> float:
    """Median over the rounds of over / under."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def parser(description: str | None) -> argparse.ArgumentParser:
    """--json FILE, --quick, --device: the same for every bench, which may add its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for the rows")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: does it run")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    return parser
