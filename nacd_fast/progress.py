"""Progress of a long stage: a bar on a terminal, else a line now and then; loss, alpha, s/it, peak memory, ETA."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .artifacts import peak_bytes

LOG_SECONDS = 15.0  # between two lines where there is no terminal


class Bar:
    """One stage's progress; `advance(loss=..., alpha=...)` after every step."""

    def __init__(self, label: str, total: int, done: int, progress: Progress):
        self.label, self.total, self.done, self.progress = label, total, done, progress
        self.first, self.start = done, time.monotonic()
        self.next_line = self.start + LOG_SECONDS
        self.task = progress.add_task(label, total=total, completed=done, shown="")

    def advance(self, steps: int = 1, **numbers: float) -> None:
        self.done += steps
        now = time.monotonic()
        pace = (now - self.start) / max(self.done - self.first, 1)
        shown = "  ".join(
            [
                *(f"{name} {value:.4g}" for name, value in numbers.items()),
                f"{pace:.3g} s/it",
                f"peak {peak_bytes() / 2**20:,.0f} MiB",
            ]
        )
        self.progress.update(self.task, completed=self.done, shown=shown)
        if not self.progress.console.is_terminal and (now >= self.next_line or self.done >= self.total):
            self.next_line = now + LOG_SECONDS
            eta = pace * (self.total - self.done)
            print(f"{self.label}  {self.done}/{self.total}  {shown}  ETA {eta:.0f} s", file=sys.stderr, flush=True)


@contextmanager
def progress_bar(label: str, total: int, done: int = 0) -> Iterator[Bar]:
    """A bar from `done` to `total` steps; lines instead of a bar where stderr is no terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Bar(label, total, done, progress)


@contextmanager
def byte_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over `total` pieces of data; what it gives is called with the bytes of each when that is done."""
    done, start = 0, time.monotonic()
    with progress_bar(label, total) as bar:

        def advance(size: int) -> None:
            nonlocal done
            done += size
            bar.advance(1, **{"MB/s": done / 1e6 / max(time.monotonic() - start, 1e-9)})

        yield advance
