"""The CUDA C++ kernels compiled for the CPU: built on first use, in place of the module for devices while a test runs.

The build stays in build/cuda-host, so that the next run compiles what changed. AAJR_CUDA_MODULE names another one, with
sanitizers, say.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from aajr_kernels.backends import cpu as native
from aajr_kernels.backends import cuda

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "cuda-host"
NAME = f"_cuda_host{sysconfig.get_config_var('EXT_SUFFIX')}"


def tool(name: str) -> str | None:
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


@functools.cache
def why_not() -> str | None:
    """Why it cannot be built here, or None."""
    if os.environ.get("AAJR_CUDA_MODULE"):
        return None
    missing = [name for name in ("cmake", "ninja", "c++") if tool(name) is None]
    return (
        f"{' and '.join(missing)} not found: the kernels cannot be compiled for the CPU" if missing else None
    )


def options(**settings: str) -> list[str]:
    """Arguments of CMake that every build of these tests takes."""
    import pybind11

    return [
        *("-S", str(ROOT), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
        *(f"-D{name}={value}" for name, value in settings.items()),
    ]


def run(*command: str) -> str:
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-8000:]}"
    return done.stdout


@functools.cache
def module() -> ModuleType:
    """The module, compiled if anything changed; several processes take turns."""
    path = os.environ.get("AAJR_CUDA_MODULE")
    if not path:
        BUILD.mkdir(parents=True, exist_ok=True)
        cmake = str(tool("cmake"))
        settings = {
            "AAJR_CUDA_HOST": "ON",
            "CMAKE_BUILD_TYPE": "RelWithDebInfo",
            "CMAKE_CXX_FLAGS_RELWITHDEBINFO": "-O1 -g1",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(BUILD),
        }
        with (BUILD / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            run(cmake, "-B", str(BUILD), *options(**settings))
            run(cmake, "--build", str(BUILD), "--target", "_cuda_host", "--parallel", "2")
        path = str(BUILD / NAME)
    return native.load("aajr_kernels._cuda_host", "AAJR_CUDA_MODULE", path)


@contextlib.contextmanager
def loaded() -> Iterator[ModuleType]:
    """The package's CUDA module is the one for the CPU."""
    emulated = module()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "module", lambda: emulated)
        yield emulated
