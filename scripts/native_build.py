"""Builds of csrc/ by CMake and Ninja into a folder of their own, beside the installed modules."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def find(name: str) -> str | None:
    """Path of a program, of this environment first."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def run(*command: str, input: str | None = None) -> str:
    """The output of a command, errors included.

    Raises:
        SystemExit: it failed.
    """
    stdout, stderr = subprocess.PIPE, subprocess.STDOUT
    done = subprocess.run(command, text=True, input=input, stdout=stdout, stderr=stderr, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-6000:]}")
    return done.stdout


def build(folder: Path, *targets: str, **definitions: str) -> None:
    """Compile what changed; every module is ``folder / (its name + SUFFIX)``.

    Args:
        folder: of the build.
        targets: of CMake; none: all.
        definitions: of CMake's cache.
    """
    import pybind11

    cmake, ninja = (find(name) for name in ("cmake", "ninja"))
    if cmake is None or ninja is None:
        raise SystemExit("error: cmake or ninja was not found: run `make setup`.")
    known = {
        "CMAKE_MAKE_PROGRAM": ninja,
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(folder),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    } | definitions
    run(cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *(f"-D{k}={v}" for k, v in known.items()))
    command = [cmake, "--build", str(folder), *(["--target", *targets] if targets else [])]
    environment = {"CMAKE_BUILD_PARALLEL_LEVEL": "2", **os.environ}
    if subprocess.run(command, env=environment, check=False).returncode:
        raise SystemExit("error: the build failed; its output is above.")
