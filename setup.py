"""What is installed, and the native module.

Packages are named one by one: only nacd_fast and nacd_kernels are installed, never `kernels`, `tests` or `bench`.
CMake builds nacd_fast/_codec and, where there is an nvcc, nacd_fast/_codec_cuda; where that fails, the build says so
and goes on without it. NACD_NATIVE=0 leaves both out, NACD_CUDA=0 the second; NACD_NATIVE=require makes a failure an
error.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
WITHOUT = {
    "nacd_fast._codec": "nacd_fast works without it, on its Python reference",
    "nacd_fast._codec_cuda": "nacd_fast works without it, frames are decoded on the CPU",
}
PACKAGES = ["nacd_fast", "nacd_fast.selection", "nacd_fast.store", "nacd_kernels"]
PACKAGE_DIR = {"nacd_kernels": "kernels/nacd_kernels"}
PACKAGE_DATA = {"nacd_fast": ["py.typed", "*.pyi", "demo/**/*", "recipes/*.yaml", "templates/*"]}


class CMakeExtension(Extension):
    """Built by CMakeLists.txt; `optional` makes build_ext warn and go on where the build fails."""

    def __init__(self, name: str):
        super().__init__(name, sources=[], optional=True)


class CMakeBuild(build_ext):
    """Configures and builds into the folder where setuptools expects the module."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        try:
            build_native(Path(self.build_temp).resolve(), target, ext.name.rpartition(".")[2])
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            if os.environ.get("NACD_NATIVE") == "require":
                raise
            print(
                f"WARNING: {ext.name} is not built ({error}); {WITHOUT[ext.name]}",
                file=sys.stderr,
                flush=True,
            )


def build_native(build: Path, target: Path, module: str) -> None:
    """Run CMake in a folder of the module's own in `build`; the module lands in `target`. Raises where a tool fails."""
    import nanobind

    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])
    if module == "_codec_cuda" and shutil.which(os.environ.get("CUDACXX", "nvcc"), path=path) is None:
        print(f"{module} is left out: there is no nvcc", file=sys.stderr, flush=True)
        return
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        raise FileNotFoundError("cmake: command not found")
    ninja = shutil.which("ninja", path=path)
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    build = build / module
    build.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            *generator,
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dnanobind_ROOT={nanobind.cmake_dir()}",
            f"-DNACD_MODULE_DIR={target}",
            f"-DNACD_CUDA={'ON' if module == '_codec_cuda' else 'OFF'}",  # an nvcc that fails costs nothing else
        ],
        check=True,
        env={**os.environ, "PATH": path},
    )
    jobs = str(os.cpu_count() or 1)
    subprocess.run([cmake, "--build", str(build), "--target", module, "--parallel", jobs], check=True)


if __name__ == "__main__":
    modules = list(WITHOUT) if os.environ.get("NACD_NATIVE", "1") != "0" else []
    if os.environ.get("NACD_CUDA", "1") == "0":
        modules = modules[:1]
    setup(
        packages=PACKAGES,
        package_dir=PACKAGE_DIR,
        package_data=PACKAGE_DATA,
        include_package_data=False,
        ext_modules=[CMakeExtension(name) for name in modules],
        cmdclass={"build_ext": CMakeBuild},
    )
