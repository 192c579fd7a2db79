"""Which snapshot is coded against which: the plans of a group, as numbers alone.

A group is a key snapshot, which needs no other, and the snapshots after it up to the next key, K on; the right key is
the left one of the next group. Members are numbered 0 (left key) .. K (right key). While the group is open each member
is coded against earlier ones (`open_references`); when it is sealed, against its neighbours on both sides (`sealed`),
which predict it better. The price is depth: how many frames a reader must decode for one snapshot.

    hierarchical   at most 5 frames: 0, 8, 4 = (0, 8), 2 = (0, 4), 1 = (0, 2)
    fast           at most 3: the two keys, and everything between them from both
"""

from collections.abc import Mapping

GROUP = 8  # K
MAX_GROUP = 8  # more halvings would need more frames
DEPTH = {"hierarchical": 5, "fast": 3}

References = tuple[int, ...]


def open_references(member: int, layout: str) -> References:
    """The members that one of the open group, not its right key, is coded against: previous, or the line through two.

    Member m is m + 1 frames deep, until the chain is as deep as allowed; the rest hang on its last two.
    """
    nearest = min(member - 1, DEPTH[layout] - 2)
    return tuple(range(nearest, -1, -1))[:2] if member else ()


def sealed(last: int, layout: str, *, right_key: bool) -> list[tuple[int, References]]:
    """The members 0 .. last and their references, in an order in which they can be decoded.

    right_key: `last` is a key; without one, in the group that the trajectory ends with, it is coded against member 0.
    """
    plan: list[tuple[int, References]] = [(0, ())]
    if last:
        plan.append((last, () if right_key else (0,)))
    return plan + _between(0, last, layout)


def _between(left: int, right: int, layout: str) -> list[tuple[int, References]]:
    if right - left < 2:
        return []
    if layout == "fast":
        return [(member, (left, right)) for member in range(left + 1, right)]
    middle = (left + right) // 2
    return [(middle, (left, right)), *_between(left, middle, layout), *_between(middle, right, layout)]


def frames_to(step: int, references: Mapping[int, References]) -> set[int]:
    """The steps whose frames a reader decodes for `step`, given every step's references."""
    needed, waiting = set(), [step]
    while waiting:
        at = waiting.pop()
        if at not in needed:
            needed.add(at)
            waiting += references[at]
    return needed
