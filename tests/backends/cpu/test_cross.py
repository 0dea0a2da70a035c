"""The kernel sources compile without a warning for processors and compilers that are not the ones at hand."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[3] / "csrc"
SOURCES = sorted(p for p in CSRC.rglob("*.cpp") if p.name != "bindings.cpp" and not p.stem.endswith("_amx"))
BASELINE = ["-DAAJR_ARCH=baseline", "-DAAJR_VECTOR_BYTES=16"]
#: what CMakeLists.txt passes to GCC; clang has no such note about vector types in registers
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
COMPILERS = {
    "aarch64": ("aarch64-linux-gnu-g++", ["-fopenmp"]),
    "aarch64 without OpenMP": ("aarch64-linux-gnu-g++", []),
    "clang": ("clang++", []),
}


@pytest.mark.slow
@pytest.mark.parametrize("target", list(COMPILERS))
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(CSRC).as_posix())
def test_compiles_without_warnings(source, target, tmp_path):
    compiler, options = COMPILERS[target]
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed (Debian: g++-aarch64-linux-gnu, clang)")
    flags = ["-std=c++17", "-O2", "-fPIC", "-ffp-contract=fast", *WARNINGS, *options, f"-I{CSRC}"]
    command = [compiler, *flags, *(BASELINE if source.parent.name == "cpu" else []), "-c", str(source)]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "object.o")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[:5000]
