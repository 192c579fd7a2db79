"""Subsets that were chosen elsewhere: a file with one sample id a line; blank lines and # comments are passed over."""

from collections.abc import Sequence
from pathlib import Path

from ..config import SelectConfig
from ..errors import InputError
from ..examples import Example
from .method import Context, Selected


def select(pool: Sequence[Example], config: SelectConfig, seed: int, context: Context) -> Selected:
    """The samples listed in config.ids, with score 1, the others 0. `fraction` and `seed` have no say."""
    names = listed(pool, config.ids)
    return Selected([e.id for e in pool if e.id in names], [float(e.id in names) for e in pool])


def listed(pool: Sequence[Example], path: str) -> set[str]:
    """The ids in the file. Raises InputError where one is unknown or stands there twice."""
    known = {e.id for e in pool}
    found: dict[str, int] = {}
    for number, name in read_lines(Path(path).expanduser()):
        if name not in known:
            raise InputError(f"{path}, line {number}: id {name!r} is not in the set of {len(pool)} samples")
        if name in found:
            raise InputError(f"{path}, line {number}: id {name!r} stands on line {found[name]} already")
        found[name] = number
    if not found:
        raise InputError(f"{path}: lists no id")
    return set(found)


def read_lines(path: Path) -> list[tuple[int, str]]:
    """(line number, id) of the lines that hold one."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    return [(n, line.strip()) for n, line in enumerate(lines, 1) if line.strip() and not line.strip().startswith("#")]
