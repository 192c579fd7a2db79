"""Subsets that were chosen elsewhere: a file with one sample id a line; blank lines and # comments are passed over."""

from collections.abc import Sequence
from pathlib import Path

from ..config import SelectConfig
from ..data import Example
from ..errors import InputError


def select(examples: Sequence[Example], config: SelectConfig, seed: int) -> tuple[list[str], list[float]]:
    """The samples listed in config.ids, with score 1, the others 0. `fraction` and `seed` have no say."""
    lines = read_lines(Path(config.ids).expanduser())
    known = {e.id for e in examples}
    listed: dict[str, int] = {}
    for number, name in lines:
        if name not in known:
            raise InputError(f"{config.ids}, line {number}: id {name!r} is not in the set of {len(examples)} samples")
        if name in listed:
            raise InputError(f"{config.ids}, line {number}: id {name!r} stands on line {listed[name]} already")
        listed[name] = number
    if not listed:
        raise InputError(f"{config.ids}: lists no id")
    return [e.id for e in examples if e.id in listed], [float(e.id in listed) for e in examples]


def read_lines(path: Path) -> list[tuple[int, str]]:
    """(line number, id) of the lines that hold one."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    return [(n, line.strip()) for n, line in enumerate(lines, 1) if line.strip() and not line.strip().startswith("#")]
