"""Compiled objects of the kernels: no function is shared between capabilities, none uses what it may not.

Every kernel file is compiled once per capability. A function that two of them emit under one name (an instance of a
standard container, an inline function outside the capability's namespace) is merged by the linker, which may keep
the AVX-512 version for everybody.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ALLOWED = re.compile(r"^(DW\.ref\.|__clang_call_terminate)")  # data and functions that hold no vector code


def builds() -> list[Path]:
    """Build folders under build/, the newest first."""
    folders_of_builds = (path.parent.parent for path in ROOT.glob("build/*/CMakeFiles/kernels_baseline.dir"))
    folders = [path for path in folders_of_builds if path.name.startswith("native")]
    return sorted(folders, key=lambda path: (path / "build.ninja").stat().st_mtime, reverse=True)


def objects(target: str) -> list[Path]:
    built = builds()
    if not built:
        pytest.skip("no build folder under build/: the package was not built from this tree")
    folder = f"CMakeFiles/{target}.dir/"
    # ninja's file, since objects of deleted sources stay in the folder
    names = re.findall(rf"^build ({re.escape(folder)}\S+\.o):", (built[0] / "build.ninja").read_text(), re.M)
    paths = [built[0] / name for name in names]
    if not paths or not all(path.exists() for path in paths):
        pytest.skip(f"{target} is not part of the build in {built[0].name}, or unfinished")
    return paths


def output(*command: str | Path) -> str:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


KERNELS = ["baseline", "avx2", "avx512", "amx", "avx512_emulated", "amx_emulated"]


def shared_functions(path: Path, capability: str) -> list[str]:
    """Functions of an object file that the linker may merge with their namesakes of another capability."""
    symbols = [line.split(maxsplit=2)[1:] for line in output("nm", "-C", "--defined-only", path).splitlines()]
    return [
        name
        for kind, name in symbols
        if kind in "WVu" and f"aajr::{capability}::" not in name and not ALLOWED.match(name)
    ]


@pytest.mark.parametrize("capability", KERNELS)
def test_no_function_is_shared_between_capabilities(capability):
    for path in objects(f"kernels_{capability}"):
        assert shared_functions(path, capability) == [], path.name


@functools.cache
def instructions(path: Path) -> tuple[set[str], str]:
    """Mnemonics in an object file, and the registers in it as one string."""
    text = output("objdump", "-d", "--no-show-raw-insn", path)
    parsed = re.findall(r"^\s+[0-9a-f]+:\t(\S+)(.*)$", text, re.M)
    return {name for name, _ in parsed}, " ".join(sorted(set(re.findall(r"%([xyz]mm|k[1-7]|tmm)", text))))


def is_x86() -> bool:
    built = builds()
    return bool(built) and "AAJR_X86" in (built[0] / "build.ninja").read_text()


@pytest.mark.parametrize("target", ["_native", "ops", "kernels_baseline"])
def test_what_runs_everywhere_uses_no_avx(target):
    for path in objects(target):
        if not is_x86():
            pytest.skip("the build is not for x86-64")
        names, registers = instructions(path)
        assert not re.search("ymm|zmm|tmm|k[1-7]", registers), f"{path.name} uses {registers}"
        assert not {n for n in names if n.startswith("v") and n not in ("verr", "verw")}, path.name


@pytest.mark.parametrize("capability", ["avx2", "avx512_emulated", "amx_emulated"])
def test_avx2_kernels_use_no_wider_registers(capability):
    for path in objects(f"kernels_{capability}"):
        _, registers = instructions(path)
        assert "zmm" not in registers and not re.search("k[1-7]|tmm", registers), f"{path.name}: {registers}"


def test_wide_kernels_use_the_wide_registers():
    if not is_x86():
        pytest.skip("the build is not for x86-64")
    assert any("ymm" in instructions(path)[1] for path in objects("kernels_avx2"))
    assert any("zmm" in instructions(path)[1] for path in objects("kernels_avx512"))
