"""The kernels package stands alone: without transformers, without Triton, and as a copy under another name."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
PACKAGE = KERNELS / "nacd_kernels"
BLOCK = "sys.modules |= dict.fromkeys({blocked!r})  # as good as absent\n"
USE = """
import torch

def second_derivatives(kernels):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 4, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3))
    w, a, b = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((6, 4), (2, 4), (6, 2)))
    y = kernels.lora_linear(kernels.flash_attention(q, k, v), w, None, a, b, 0.5)
    loss = kernels.linear_cross_entropy(kernels.rms_norm(y, None).flatten(0, 2), w.new_ones(7, 6), torch.arange(10) % 7)
    loss = loss + kernels.silu_mul(y, y).square().mean()
    grads = torch.autograd.grad(loss, (q, k, v), create_graph=True)
    return [*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), (q, k, v))]
"""


def run(script: str, *folders: Path) -> None:
    paths = f"import sys\nsys.path[:0] = {[str(folder) for folder in folders]!r}\n"
    done = subprocess.run([sys.executable, "-c", paths + script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("blocked", [("transformers", "peft", "datasets", "nacd_fast"), ("triton",), ("bitsandbytes",)])
def test_runs_without(blocked: tuple[str, ...]) -> None:
    run(BLOCK.format(blocked=blocked) + USE + "import nacd_kernels\nsecond_derivatives(nacd_kernels)", KERNELS)


def test_a_blocked_import_is_an_error() -> None:
    """The blocker above does block."""
    with pytest.raises(AssertionError, match="import of transformers halted"):
        run(BLOCK.format(blocked=("transformers",)) + "import transformers", KERNELS)


def test_a_vendored_copy_runs_beside_the_original(tmp_path: Path) -> None:
    """Same results from both at once, and none reaches into the other."""
    shutil.copytree(PACKAGE, tmp_path / "my_project" / "_vendored", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "my_project" / "__init__.py").touch()
    script = """
import nacd_kernels
from my_project import _vendored

for first, second in ((nacd_kernels, _vendored), (_vendored, nacd_kernels)):
    for a, b in zip(second_derivatives(first), second_derivatives(second)):
        assert torch.equal(a, b)
with nacd_kernels.bare_tangents():
    assert nacd_kernels.twice.in_dual_pass() and not _vendored.twice.in_dual_pass()
names = {name for name, module in sys.modules.items() if "nacd_kernels" in (getattr(module, "__file__", None) or "")}
assert all(name.split(".")[0] == "nacd_kernels" for name in names), names
"""
    run("import sys\n" + USE + script, KERNELS, tmp_path)


def test_a_vendored_copy_needs_no_original(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "ops", ignore=shutil.ignore_patterns("__pycache__"))
    run(BLOCK.format(blocked=("nacd_kernels", "nacd_fast")) + USE + "import ops\nsecond_derivatives(ops)", tmp_path)


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_imports_are_relative_and_few(path: Path) -> None:
    """torch, the standard library, the package itself; Triton in the kernels' files, bitsandbytes inside functions."""
    tree = ast.parse(path.read_text())
    allowed = {"torch", *sys.stdlib_module_names} | (
        {"triton"} if "triton" in path.stem or "kernels" in path.stem else set()
    )
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        lazy = {"bitsandbytes"} if node not in tree.body else set()
        assert {name.split(".")[0] for name in names} <= allowed | lazy
