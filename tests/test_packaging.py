"""What is installed, that importing is cheap and silent, and that the build gets by without a compiler."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import pytest

import nacd_fast
from nacd_fast import codec, native

ROOT = Path(__file__).resolve().parents[1]
SETUP = runpy.run_path(str(ROOT / "setup.py"))


def python(code: str, *args: str, cwd: Path = ROOT) -> str:
    """Standard output of `code` in a fresh interpreter that sees this checkout; fails on a non-zero status."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def data_patterns(path: PurePosixPath) -> list[str]:
    """The package-data patterns of nacd_fast that hold the file; `**` stands for any folders."""
    return [p for p in SETUP["PACKAGE_DATA"]["nacd_fast"] if fnmatchcase(str(path), p.replace("**/", ""))]


# Names


def test_kernels_is_a_plain_folder() -> None:
    # As a package it would be taken for the hub's `kernels` by transformers.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_nothing_else_is_installed() -> None:
    assert {name.split(".")[0] for name in SETUP["PACKAGES"]} == {"nacd_fast", "nacd_kernels"}


# Packages and data


@pytest.mark.parametrize(("top", "folder"), [("nacd_fast", "nacd_fast"), ("nacd_kernels", "kernels/nacd_kernels")])
def test_every_folder_with_python_files_is_a_named_package(top: str, folder: str) -> None:
    found = {".".join([top, *path.parent.relative_to(ROOT / folder).parts]) for path in (ROOT / folder).rglob("*.py")}
    named = {name for name in SETUP["PACKAGES"] if name.split(".")[0] == top}
    assert found == named
    for name in found:
        assert (ROOT / folder / Path(*name.split(".")[1:]) / "__init__.py").exists(), f"{name} has no __init__.py"


def test_every_other_file_of_the_package_is_package_data() -> None:
    built = {".py", ".pyc", ".so"}
    files = [p.relative_to(ROOT / "nacd_fast") for p in (ROOT / "nacd_fast").rglob("*") if p.is_file()]
    missing = [str(p) for p in files if p.suffix not in built and not data_patterns(PurePosixPath(p.as_posix()))]
    assert not missing, f"not in setup.py's PACKAGE_DATA: {missing}"


def test_every_package_data_pattern_holds_a_file() -> None:
    for pattern in SETUP["PACKAGE_DATA"]["nacd_fast"]:
        assert any((ROOT / "nacd_fast").glob(pattern)), f"{pattern} holds no file"


@pytest.mark.parametrize("file", ["LICENSE", "NOTICE", "nacd_fast/demo/NOTICE", "CHANGELOG.md", "README.md"])
def test_licences_and_notices_are_there(file: str) -> None:
    assert (ROOT / file).stat().st_size > 200


# Importing


def test_import_is_cheap_and_silent(tmp_path: Path) -> None:
    code = "import nacd_fast, sys; heavy = {'torch', 'transformers', 'numpy', 'datasets', 'nacd_fast.distill'}"
    assert python(code + "; assert not heavy & set(sys.modules), heavy & set(sys.modules)", cwd=tmp_path) == ""


def test_public_names_load_on_use_and_leave_distill_alone() -> None:
    code = "import nacd_fast, sys; [getattr(nacd_fast, name) for name in nacd_fast.__all__]"
    assert python(code + "; print('nacd_fast.distill' in sys.modules)") == "False\n"


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'nacd_fast' has no attribute 'nonsense'"):
        nacd_fast.nonsense  # noqa: B018
    assert set(nacd_fast.__all__) <= set(dir(nacd_fast))


def test_importing_every_module_parses_no_flags_and_prints_nothing() -> None:
    names = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for p in sorted((ROOT / "nacd_fast").rglob("*.py"))
        if p.name not in {"__init__.py", "__main__.py"}
    ]
    code = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1].split(',')]"
    assert python(code, ",".join(names), "--nonsense") == ""


# The native module


def test_version_stands_in_one_place() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", nacd_fast.__version__)
    assert nacd_fast.__version__ not in (ROOT / "pyproject.toml").read_text().split("dependencies")[0]


def test_native_module_has_the_packages_version() -> None:
    module = native.load()
    if module is None and shutil.which("c++") is None:
        pytest.skip("no compiler, so no native module")
    assert module is not None, "there is a compiler, but no native module: run `make build`"
    assert module.version() == nacd_fast.__version__


def test_without_native_module_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "find_spec", lambda name: None)
    assert native.load() is None
    assert codec.backend() == "reference (the native module was not built)"


def test_native_module_of_another_version_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "find_spec", lambda name: object())
    monkeypatch.setattr(native, "import_module", lambda name: SimpleNamespace(version=lambda: "0.0.1"))
    with pytest.raises(ImportError, match=r"version 0\.0\.1, must be .*; run `make build`"):
        native.load()


@pytest.mark.parametrize("asked", ["1", "require"])
def test_build_goes_on_without_a_compiler_unless_told(tmp_path: Path, asked: str) -> None:
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tmp_path / name)
    for folder in ("csrc", "kernels", "nacd_fast"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "*.safetensors"))
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tmp_path,
        env={**os.environ, "CXX": "/nonexistent/c++", "NACD_NATIVE": asked},
        capture_output=True,
        text=True,
    )
    assert not list((tmp_path / "nacd_fast").glob("_codec*.so"))
    if asked == "require":
        assert done.returncode != 0
        return
    assert done.returncode == 0, done.stderr
    assert "WARNING: nacd_fast._codec is not built" in done.stderr
    assert "Python reference" in done.stderr


def test_the_cpu_module_is_configured_without_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An nvcc that is too old for our architectures would end the configuration."""
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **kwargs: "--build" in command or run(command, **kwargs))
    runpy.run_path(str(ROOT / "setup.py"))["build_native"](tmp_path, tmp_path, "_codec")
    assert re.search(r"^NACD_CUDA:\w+=OFF$", (tmp_path / "_codec/CMakeCache.txt").read_text(), re.MULTILINE)
