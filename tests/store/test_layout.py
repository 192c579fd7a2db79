"""Which snapshot is coded against which: every group can be decoded, and no deeper than promised."""

import pytest

from nacd_fast.store.layout import DEPTH, GROUP, MAX_GROUP, frames_to, open_references, sealed

LAYOUTS = list(DEPTH)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("group", range(1, MAX_GROUP + 1))
def test_open_groups_are_as_deep_as_allowed(layout: str, group: int) -> None:
    references = {member: open_references(member, layout) for member in range(group)}
    for member, needed in references.items():
        assert all(other < member for other in needed) and len(needed) == min(member, 2)
        assert len(frames_to(member, references)) == min(member + 1, DEPTH[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("right_key", [True, False])
@pytest.mark.parametrize("last", range(MAX_GROUP + 1))
def test_sealed_groups_hold_every_member_once_after_its_references(layout: str, right_key: bool, last: int) -> None:
    plan = sealed(last, layout, right_key=right_key)
    assert sorted(member for member, _ in plan) == list(range(last + 1))
    seen: set[int] = set()
    for member, needed in plan:
        assert seen.issuperset(needed)
        seen.add(member)
    references = dict(plan)
    assert all(len(frames_to(member, references)) <= DEPTH[layout] for member in references)


def test_the_hierarchical_order_halves() -> None:
    assert dict(sealed(GROUP, "hierarchical", right_key=True)) == {
        0: (),
        8: (),
        4: (0, 8),
        2: (0, 4),
        6: (4, 8),
        1: (0, 2),
        3: (2, 4),
        5: (4, 6),
        7: (6, 8),
    }


def test_the_fast_order_takes_the_keys() -> None:
    plan = dict(sealed(GROUP, "fast", right_key=True))
    assert all(plan[member] == (0, GROUP) for member in range(1, GROUP))
