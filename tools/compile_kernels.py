"""Compile every Triton kernel and tuning configuration for sm_80 and sm_90, on a machine without a GPU.

    python tools/compile_kernels.py                # all; writes kernels/RESOURCES.md
    python tools/compile_kernels.py --check        # all; exits 1 where the committed table differs or a limit is broken
    python tools/compile_kernels.py --only norms   # one file of tools/kernel_cases/; prints, writes nothing

`tools/kernel_cases/<name>.py` names calls; what they launch (nacd_kernels/launch.py) is recorded, not run, and compiled
with the very arguments, constants and specialisation of the launch. Limits: no spills (nothing in local memory), and
shared memory within what the chip gives one block.
"""

import argparse
import difflib
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT)]
os.environ.pop("TRITON_INTERPRET", None)  # it is read when a kernel is defined

import triton  # noqa: E402  (after the variable that it reads)
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from nacd_kernels.launch import Launch, recording  # noqa: E402

TABLE = ROOT / "kernels" / "RESOURCES.md"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TARGETS = ((8, 0), (9, 0))
SHARED_LIMIT = {(8, 0): 163 * 1024, (9, 0): 227 * 1024}  # bytes a block; CUDA C++ Programming Guide, table 21
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
HEAD = f"""# Resources of every kernel

Made by `python tools/compile_kernels.py` with Triton {triton.__version__}; `make test` makes it again and compares.
Nothing spills, and shared memory is within a block's limit: {SHARED_LIMIT[8, 0]:,} bytes on sm_80,
{SHARED_LIMIT[9, 0]:,} on sm_90. Registers are a thread's, shared memory a block's in bytes. A kernel's pointers are
written by their element types.

"""


class Variant(NamedTuple):
    """What one binary is compiled from: picklable, so that it can be compiled in another process."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    num_warps: int
    num_stages: int
    target: tuple[int, int]

    def row_key(self) -> tuple[str, str]:
        pointers = ",".join(kind[1:] for _, kind in self.signature if kind.startswith("*"))
        names = [f"{name}={value}" for name, value in self.constants]
        return self.kernel, f"{pointers} {' '.join(names)} w{self.num_warps} s{self.num_stages}"


class Resources(NamedTuple):
    registers: int
    shared: int
    local: int


def variant(launch: Launch, target: tuple[int, int]) -> Variant:
    """Arguments as triton.jit specialises them: None and 1 are constants, multiples of 16 are known to be."""
    function = launch.kernel
    signature, constants, divisible = {}, {}, []
    for i, (name, value) in enumerate(zip(function.arg_names, launch.args)):
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            divisible += [i] if value.data_ptr() % 16 == 0 else []
        elif value is None or (isinstance(value, int) and value == 1) or isinstance(value, bool):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible += [i] if value % 16 == 0 else []
        else:
            signature[name] = "fp32"
    constants |= launch.constants
    for name in launch.constants:
        signature[name] = "constexpr"
    missing = set(function.arg_names) - set(signature)
    assert not missing, f"{function.__name__}: launched without {missing}"
    return Variant(
        function.fn.__module__,
        function.__name__,
        tuple((name, signature[name]) for name in function.arg_names),
        tuple((name, constants[name]) for name in function.arg_names if name in constants),
        tuple(divisible),
        launch.num_warps,
        launch.num_stages,
        target,
    )


def compile_variant(v: Variant) -> Resources:
    """Compile for the target and ask cuobjdump what the binary needs."""
    kernel = getattr(importlib.import_module(v.module), v.kernel)
    index = {name: i for i, (name, _) in enumerate(v.signature)}
    source = ASTSource(
        fn=kernel,
        signature=dict(v.signature),
        constexprs={(index[name],): value for name, value in v.constants},
        attrs={(i,): [["tt.divisibility", 16]] for i in v.divisible},
    )
    target = GPUTarget("cuda", 10 * v.target[0] + v.target[1], 32)
    options = {"num_warps": v.num_warps, "num_stages": v.num_stages}
    compiled: Any = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, static, local = map(int, found.groups())
    return Resources(registers, compiled.metadata.shared + static, stack + local)


def recorded(only: str | None) -> Iterator[tuple[str, Variant]]:
    """(case file, variant) of every launch of every case, each variant once, in a fixed order."""
    package = importlib.import_module("tools.kernel_cases")
    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__))
    seen: set[Variant] = set()
    for name in names if only is None else [only]:
        cases = importlib.import_module(f"tools.kernel_cases.{name}").cases
        for target in TARGETS:
            launches: list[Launch] = []
            with recording(target, launches.append):
                for call in cases():
                    call()
            for v in (variant(launch, target) for launch in launches):
                if v not in seen:
                    seen.add(v)
                    yield name, v


def broken_limits(v: Variant, found: Resources) -> list[str]:
    chip = f"{v.kernel} {v.row_key()[1]} on sm_{v.target[0]}{v.target[1]}"
    out = [f"{chip} spills: {found.local} bytes of local memory"] if found.local else []
    limit = SHARED_LIMIT[v.target]
    if found.shared > limit:
        out.append(f"{chip} takes {found.shared} bytes of shared memory, limit {limit}")
    return out


def table(rows: list[tuple[str, Variant, Resources]]) -> str:
    """A section a case file, a row a kernel and configuration, both chips beside each other."""
    sections: dict[str, dict[tuple[str, str], dict[tuple[int, int], Resources]]] = {}
    for name, v, found in rows:
        row = sections.setdefault(name, {}).setdefault(v.row_key(), {})
        worst = max(found, row.get(v.target, found))  # specialisations of one row: the one with most registers
        row[v.target] = worst
    text = HEAD
    for name, lines in sections.items():
        text += f"## {name}\n\n| kernel | types, constants, warps, stages | sm_80 registers | shared |"
        text += " sm_90 registers | shared |\n|---|---|--:|--:|--:|--:|\n"
        for (kernel, key), chips in sorted(lines.items()):
            cells = [f"{c.registers} | {c.shared}" if (c := chips.get(t)) else "- | -" for t in TARGETS]
            text += f"| {kernel} | {key} | {' | '.join(cells)} |\n"
        text += "\n"
    return text.rstrip("\n") + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed table, write nothing")
    parser.add_argument("--only", help="one file of tools/kernel_cases/, printed")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    args = parser.parse_args()
    found = list(recorded(args.only))
    with ProcessPoolExecutor(args.jobs) as pool:
        results = list(pool.map(compile_variant, [v for _, v in found], chunksize=4))
    rows = [(name, v, resources) for (name, v), resources in zip(found, results, strict=True)]
    broken = [line for _, v, resources in rows for line in broken_limits(v, resources)]
    made = table(rows)
    if args.only:
        print(made)
    elif args.check:
        committed = TABLE.read_text() if TABLE.exists() else ""
        broken += difflib.unified_diff(committed.splitlines(), made.splitlines(), "committed", "compiled", lineterm="")
    else:
        TABLE.write_text(made)
    print("\n".join(broken) or f"{len(rows)} binaries: no spills, shared memory within the limits")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
