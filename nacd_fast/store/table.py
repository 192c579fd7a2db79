"""`nacd store inspect`: what a trajectory file holds, as numbers, and those as a table or as JSON.

A terminal gets a table of as many columns as it has room for; a pipe gets all of them as plain text.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from .. import codec
from .layout import frames_to
from .reader import TrajectoryStore
from .schema import Schema

CODED = ("key", "previous", "linear")  # by number of references
ANY_WIDTH = 10_000  # characters of a line that ends nowhere
BAR, BAR_WIDTH = "", 12  # the column of bars has no name; characters of the largest ratio
HEADS = ("step", "coded", "references", "frames", "bytes", "ratio", "bound", "group")
WORDS = ("coded", "group", BAR)  # columns of words; the others hold figures
FIRST_TO_GO = (BAR, "group", "references", "bound", "coded", "frames")  # where the terminal is too narrow


@dataclass(frozen=True)
class Snapshot:
    step: int
    coded: str
    references: tuple[int, ...]  # steps
    frames: int  # to decode for it when nothing is in the cache
    bytes: int  # of its record
    ratio: float  # bytes of its weights over those
    bound: float  # the most that any weight is off; 0: exact
    group: int  # from 1
    sealed: bool


@dataclass(frozen=True)
class Summary:
    snapshots: int
    weights: int  # of one snapshot
    tensors: int
    dtype: str
    layout: str
    group_size: int  # K
    eps: float
    bytes: int  # of both files
    unfinished_bytes: int  # of those
    ratio: float  # bytes of all weights over all bytes
    backend: str  # of the codec here


@dataclass(frozen=True)
class Contents:
    file: str
    summary: Summary
    snapshots: list[Snapshot]


def read_contents(path: Path) -> Contents:
    """What is in the file. Frames are not decoded, so damage in them is not noticed."""
    with TrajectoryStore(path) as store:
        index, schema, references = store.index, store.schema, store.index.references
        number = {step: i for i, group in enumerate(index.groups, 1) for step in group.steps}
        snapshots = []
        for step, place in index.frames.items():
            record = place.record
            size, has_bounds = record.end - record.offset, record.payload_bytes > record.frame_bytes
            snapshots.append(
                Snapshot(
                    step=step,
                    coded=CODED[len(record.references)],
                    references=record.references,
                    frames=len(frames_to(step, references)),
                    bytes=size,
                    ratio=weight_bytes(schema) / size,
                    bound=max(store.bounds(step).values()) if has_bounds else 0.0,
                    group=number.get(step, len(index.groups) + 1),
                    sealed=step in number,
                )
            )
        total = file_bytes(store)
        summary = Summary(
            snapshots=len(snapshots),
            weights=schema.count,
            tensors=len(schema.tensors),
            dtype=schema.dtype,
            layout=schema.layout,
            group_size=schema.group,
            eps=schema.eps,
            bytes=total,
            unfinished_bytes=unfinished_bytes(store),
            ratio=len(snapshots) * weight_bytes(schema) / max(total, 1),
            backend=codec.backend(),
        )
    return Contents(str(path), summary, snapshots)


def file_bytes(store: TrajectoryStore) -> int:
    return sum(os.fstat(file.fileno()).st_size for file in store.files)


def unfinished_bytes(store: TrajectoryStore) -> int:
    """At the files' ends, of no snapshot: a write under way, one that was killed, or a file that was cut."""
    return file_bytes(store) - store.index.main_end - store.index.open_end


def weight_bytes(schema: Schema) -> int:
    """Of one snapshot, as it would lie in memory."""
    return schema.count * (2 if schema.zero_bits else 4)


def to_json(contents: Contents) -> str:
    return json.dumps(asdict(contents), indent=1)


def render(contents: Contents, console: Console) -> str:
    """The table and its summary, for that console."""
    if not console.is_terminal:
        console.width = ANY_WIDTH
    with console.capture() as captured:
        if contents.snapshots:
            console.print(make_table(contents.snapshots, console))
        for line in summary_lines(contents.file, contents.summary):
            console.print(line, markup=False, highlight=False)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def cells(row: Snapshot) -> tuple[str, ...]:
    """In the order of HEADS."""
    return (
        str(row.step),
        row.coded,
        ", ".join(map(str, row.references)),
        str(row.frames),
        f"{row.bytes:,}",
        f"{row.ratio:.2f}",
        f"{row.bound:.2g}" if row.bound else "exact",
        f"{row.group}" if row.sealed else f"{row.group}, open",
    )


def make_table(snapshots: Sequence[Snapshot], console: Console) -> Table:
    """All columns in a pipe; on a terminal, those that fit, and a bar of the ratio."""
    columns = dict(zip(HEADS, zip(*map(cells, snapshots))))
    if not console.is_terminal:
        return table_of(columns, None)
    most, mark = max(row.ratio for row in snapshots), "█" if console.encoding.startswith("utf") else "#"
    columns[BAR] = tuple(mark * round(BAR_WIDTH * row.ratio / (most or 1)) for row in snapshots)
    for name in FIRST_TO_GO:
        table = table_of(columns, box.SIMPLE_HEAD)
        if Measurement.get(console, console.options.update(width=ANY_WIDTH), table).maximum <= console.width:
            break
        del columns[name]
    return table_of(columns, box.SIMPLE_HEAD)


def table_of(columns: Mapping[str, Sequence[str]], lines: box.Box | None) -> Table:
    table = Table(box=lines, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in WORDS else "right", no_wrap=True)
    for row in zip(*columns.values()):
        table.add_row(*row)
    return table


def summary_lines(file: str, found: Summary) -> list[str]:
    lines = [
        f"{file}: {number(found.snapshots, 'snapshot')} of {number(found.weights, 'weight')} "
        f"in {number(found.tensors, 'tensor')}, {found.dtype}, layout {found.layout}, groups of {found.group_size}, "
        f"{f'eps {found.eps:g}' if found.eps else 'lossless'}, {found.bytes:,} bytes, ratio {found.ratio:.2f}, "
        f"codec {found.backend}"
    ]
    if found.unfinished_bytes:
        lines.append(unfinished(found.unfinished_bytes))
    return lines


def unfinished(count: int) -> str:
    return f"{number(count, 'byte')} at the end of no snapshot: a write that was not finished, or a file that was cut"


def number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
