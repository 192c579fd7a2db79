"""What the native module's AVX2 objects export.

They are linked beside portable code. An inline function that both use and that no compiler inlined is a weak symbol, of
which the linker keeps one: it could be the AVX2 one, and a machine without AVX2 would run it.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OBJECTS = sorted(ROOT.glob("build/temp.*/_codec/CMakeFiles/nacd_kernels_avx2.dir/csrc/*.o"))
EXPORTED = "TDBRCVWui"  # nm's letters for what other objects see


@pytest.mark.skipif(not OBJECTS, reason="no AVX2 objects: not built in place, or not for x86-64")
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm to list symbols with")
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name)
def test_nothing_but_the_kernels_can_be_linked(path: Path) -> None:
    listed = subprocess.run(["nm", "-C", str(path)], check=True, capture_output=True, text=True).stdout
    symbols = [line[17:].split(" ", 1) for line in listed.splitlines()]
    seen = [name for kind, name in symbols if kind in EXPORTED]
    assert seen, listed
    assert [
        name for name in seen if "nacd::avx2::" not in name.split("(", 1)[0]
    ] == []  # a template has its type before
