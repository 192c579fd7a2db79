"""Raw rows of a set: files, folders of them, hub sets.

    .jsonl, .jsonl.gz, .json (a list, or one row a line), .parquet, .csv (its first line names the columns)
    .tsv of FLAN's chains of thought: question, answer and rationale, without quotes, \\n for a line's end

UTF-8 with or without a BOM, lines that end in LF or CRLF; blank lines are passed over.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from .artifacts import NOT_RESULTS
from .errors import InputError

SPLITS = ("train", "validation", "test")
SUFFIXES = (".jsonl.gz", ".jsonl", ".json", ".parquet", ".tsv", ".csv")
TASKS = {"arc_easy": "allenai/ai2_arc:ARC-Easy", "mmlu": "cais/mmlu:all"}  # benchmarks by name: their hub sets
COT = ("question", "answer", "rationale")  # columns of a .tsv
NOT_DATA = {"config.json", *NOT_RESULTS}  # a stage's own files, in a folder that is read as a set
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")
DEMO = Path(__file__).parent / "demo" / "data"


@dataclass(frozen=True)
class Row:
    """A raw row: where it stands, for messages and made ids."""

    stem: str
    number: int
    place: str
    value: Any


def read_rows(source: str, split: str) -> Iterator[Row]:
    """The rows of `forms.read_set`'s sources."""
    if "," in source and not Path(source).expanduser().exists():
        return chain.from_iterable(read_rows(part.strip(), split) for part in source.split(","))
    path = DEMO / f"{split}.jsonl" if source == "demo" else Path(source).expanduser()
    if path.is_dir():
        return chain.from_iterable(map(file_rows, folder_files(path, split)))
    if path.is_file():
        return file_rows(path)
    source = TASKS.get(source, source)
    if HUB_NAME.fullmatch(source) and not source.endswith(SUFFIXES):
        return hub_rows(source, split)
    raise InputError(f"{source}: no such file or folder")


def folder_files(folder: Path, split: str) -> list[Path]:
    files = sorted(p for p in folder.iterdir() if p.name.endswith(SUFFIXES) and p.name not in NOT_DATA)
    if not files:
        raise InputError(f"{folder}: holds no {', '.join(SUFFIXES)} file")
    named = {name: [p for p in files if is_named(p, name)] for name in SPLITS}
    if any(named.values()) and not named[split]:  # the other splits' files must not leak into this one
        raise InputError(f"{folder}: holds no file that is named {split!r}, but has those of other splits")
    return named[split] or files


def is_named(path: Path, split: str) -> bool:
    """The split begins the file's name, or is a word in it: train-00000-of-00002, ARC-Easy-train, gsm8k_train."""
    return path.name.startswith(split) or split in re.split(r"[-_.]", path.name)


def file_rows(path: Path) -> Iterator[Row]:
    suffix = next((s for s in SUFFIXES if path.name.endswith(s)), None)
    if suffix is None:
        raise InputError(f"{path}: must end in {', '.join(SUFFIXES)}")
    stem = path.name.removesuffix(suffix)
    if suffix == ".parquet":
        values, unit = parquet_values(path), "row"
    elif suffix in (".tsv", ".csv"):
        values, unit = (cot_values if suffix == ".tsv" else csv_values)(path), "line"
    else:
        data = read_bytes(path).removeprefix(b"\xef\xbb\xbf")
        is_list = suffix == ".json" and data.lstrip()[:1] == b"["
        values, unit = (list_values(path, data), "row") if is_list else (line_values(path, data), "line")
    for number, value in values:
        yield Row(stem, number, f"{path}, {unit} {number}", value)


def read_bytes(path: Path) -> bytes:
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as f:
            return f.read()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def parse_json(data: bytes, path: Path, line: int) -> Any:
    """The value in `data`, which begins at `line` of the file."""
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise InputError(f"{path}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x})") from None
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise InputError(f"{path}, line {line}: malformed JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nesting
        raise InputError(f"{path}, line {line}: malformed JSON ({error})") from None


def list_values(path: Path, data: bytes) -> Iterator[tuple[int, Any]]:
    return enumerate(parse_json(data, path, 1), 1)


def line_values(path: Path, data: bytes) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            yield number, parse_json(line, path, number)


def parquet_values(path: Path) -> Iterator[tuple[int, Any]]:
    from pyarrow import ArrowException, parquet  # slow to import, and needed only from here

    try:
        return enumerate(parquet.read_table(path).to_pylist(), 1)
    except (ArrowException, OSError) as error:
        raise InputError(f"{path}: not a Parquet file ({first_line(error)})") from None


def read_text(path: Path) -> str:
    data = read_bytes(path).removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise InputError(f"{path}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x})") from None


def cot_values(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        cells = line.rstrip("\r").split("\t")
        if len(cells) != len(COT) and line.strip():
            raise InputError(f"{path}, line {number}: {len(cells)} columns: must be {len(COT)}, {', '.join(COT)}")
        if line.strip():
            yield number, {name: cell.replace("\\n", "\n") for name, cell in zip(COT, cells)}


def csv_values(path: Path) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise InputError(f"{path}, line {reader.line_num}: must have {len(reader.fieldnames or ())} columns")
            yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num + 1}: malformed CSV ({error})") from None


def hub_rows(source: str, split: str) -> Iterator[Row]:
    import datasets  # slow to import, and needed only from here

    name, _, config = source.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split)
    # no such set, configuration or split; no network; a file in it that cannot be read
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"{source}: no such file or folder, and its split {split!r} cannot be loaded from the hub "
            f"({first_line(error)})"
        ) from None
    for number, value in enumerate(rows, 1):
        yield Row(name.split("/")[1], number, f"{source} ({split}), row {number}", value)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
