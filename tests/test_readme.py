"""The READMEs' Python runs as it stands, and no figure is left to fill in."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "kernels/README.md")


@pytest.mark.parametrize("page", PAGES)
def test_code_runs(page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), {})


@pytest.mark.parametrize("page", PAGES)
def test_nothing_is_left_to_fill_in(page: str) -> None:
    assert not re.findall(r"@[A-Z]+@|TODO|TBD", (ROOT / page).read_text())


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text())
    assert all(((ROOT / page).parent / target).exists() for target in targets)
