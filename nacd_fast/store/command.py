"""`nacd store inspect | verify | convert`: its flags, and what it prints.

    nacd store inspect trajectory.nacd                    # a table, one row a snapshot; --json for programs
    nacd store verify runs/*/experts/*/trajectory.nacd    # decode every frame, compare every checksum
    nacd store convert trajectory.nacd snapshots          # a folder of safetensors; --step for one file
    nacd store convert snapshots trajectory.nacd          # and back

Errors are cli.main's affair.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..arguments import Parser
from ..errors import InputError
from ..progress import byte_bar
from .convert import convert
from .layout import DEPTH
from .reader import TrajectoryStore
from .table import number, read_contents, render, to_json, unfinished, unfinished_bytes, weight_bytes


def make_parser() -> Parser:
    parser = Parser(prog="nacd store", description="Trajectory files (.nacd).", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        found.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return found

    inspect = add("inspect", "show what a trajectory holds: how each snapshot is coded, its size, ratio and bound")
    inspect.add_argument("file", metavar="FILE", type=Path)
    inspect.add_argument("--json", action="store_true", help="the same as JSON")
    verify = add("verify", "decode every frame and compare every checksum")
    verify.add_argument("files", metavar="FILE", type=Path, nargs="+")
    made = add("convert", "turn a trajectory into safetensors files, or a folder of those into a trajectory")
    made.add_argument("source", metavar="SOURCE", type=Path, help="a trajectory, or a folder of *<step>.safetensors")
    made.add_argument("target", metavar="TARGET", type=Path, help="a folder or, with --step, one file; or a trajectory")
    made.add_argument("--step", type=int, help="of a trajectory: this snapshot alone, as one file")
    made.add_argument("--layout", choices=list(DEPTH), help="of a new trajectory")
    made.add_argument("--eps", type=float, help="of a new trajectory: bounded error, see the README; else lossless")
    return parser


def run(arguments: Sequence[str]) -> None:
    found = make_parser().parse_args(arguments)
    if found.command == "inspect":
        check_file(found.file)
        contents = read_contents(found.file)
        print(to_json(contents) if found.json else render(contents, Console()))
    elif found.command == "verify":
        verify_all(found.files)
    else:
        print(convert(found.source, found.target, step=found.step, layout=found.layout, eps=found.eps))


def check_file(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"{path}: a folder, must be a trajectory file")


def verify_all(paths: Sequence[Path]) -> None:
    """A line for each file. Raises the first InputError, when all have been seen."""
    errors = []
    for path in paths:
        try:
            check_file(path)
            print(verify(path), flush=True)
        except InputError as error:
            print(f"{path}: FAILED", flush=True)
            errors.append(error)
    if errors:
        raise errors[0]


def verify(path: Path) -> str:
    with TrajectoryStore(path) as store, byte_bar(f"verify {path.name}", len(store)) as advance:
        store.verify(lambda step: advance(weight_bytes(store.schema)))
        rest = unfinished_bytes(store)
        return (
            f"{path}: {number(len(store), 'snapshot')}, every checksum right{'; ' + unfinished(rest) if rest else ''}"
        )
