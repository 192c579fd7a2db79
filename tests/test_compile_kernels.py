"""The ahead-of-time check sees what it is there to see: spills, too much shared memory, a case without its rows.

In a process of its own: here kernels are interpreted, there they are compiled.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = """
import triton
import triton.language as tl


@triton.jit
def product(x, y, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i, j, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, 16)
    a, b = tl.load(x + i[:, None] * 16 + k[None, :]), tl.load(y + k[:, None] * COLUMNS + j[None, :])
    tl.store(y + i[:, None] * COLUMNS + j[None, :], tl.dot(a, b, input_precision="tf32") * n)
"""
SCRIPT = """
import json
from tools import compile_kernels as tool
import torch
from nacd_kernels.launch import launch, recording
from toy_kernels import product

x, out = torch.zeros(4096), []
for n, rows, columns, warps in {cases}:
    launches = []
    with recording((8, 0), launches.append):
        launch(product, (1,), x, x, n, ROWS=rows, COLUMNS=columns, num_warps=warps)
    v = tool.variant(launches[0], (8, 0))
    found = tool.compile_variant(v)
    row = tool.table([("toy", v, found)]).splitlines()[-1]
    full = tool.broken_limits(v, found._replace(shared=tool.SHARED_LIMIT[8, 0] + 1))
    out.append([dict(v.signature), dict(v.constants), v.divisible, found, tool.broken_limits(v, found), full, row])
print(json.dumps(out))
"""
CASES = {
    "odd": (5, 16, 16, 4),
    "multiple of 16": (32, 16, 16, 4),
    "one": (1, 16, 16, 4),
    "long": (2**40, 16, 16, 4),
    "real": (0.5, 16, 16, 4),
    "spilling": (5, 128, 64, 1),  # a thread of one warp would need 256 registers for the result; there are 255
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy_kernels.py").write_text(KERNELS)
    script = f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(folder)!r}]\n" + SCRIPT.format(cases=[*CASES.values()])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize(
    ("case", "kind", "divisible"),
    [
        ("odd", "i32", [0, 1]),
        ("multiple of 16", "i32", [0, 1, 2]),
        ("one", "constexpr", [0, 1]),
        ("long", "i64", [0, 1, 2]),
        ("real", "fp32", [0, 1]),
    ],
)
def test_arguments_are_specialised_as_a_launch_does(
    case: str, kind: str, divisible: list[int], compiled: dict[str, Any]
) -> None:
    signature, constants, found_divisible, resources, broken, _, row = compiled[case]
    assert signature == {"x": "*fp32", "y": "*fp32", "n": kind, "ROWS": "constexpr", "COLUMNS": "constexpr"}
    assert constants == {"ROWS": 16, "COLUMNS": 16} | ({"n": 1} if case == "one" else {})
    assert found_divisible == divisible and broken == []
    registers, shared, local = resources
    assert 0 < registers <= 255 and shared == 2 * 16 * 16 * 4 and local == 0
    assert row.startswith("| product | fp32,fp32 ") and row.endswith(f"w4 s2 | {registers} | {shared} | - | - |")


def test_spills_are_found(compiled: dict[str, Any]) -> None:
    *_, broken, _, _ = compiled["spilling"]
    assert len(broken) == 1 and "w1 s2 on sm_80 spills" in broken[0]


def test_too_much_shared_memory_is_found(compiled: dict[str, Any]) -> None:
    (line,) = compiled["odd"][5]
    assert line.endswith("takes 166913 bytes of shared memory, limit 166912")


def test_the_committed_table_names_every_case_file() -> None:
    table = (ROOT / "kernels" / "RESOURCES.md").read_text()
    names = {path.stem for path in (ROOT / "tools" / "kernel_cases").glob("*.py")} - {"__init__"}
    assert names and all(f"## {name}\n" in table for name in names)
