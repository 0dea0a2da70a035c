"""The program aajr_selftest (csrc/tests): every kernel on every capability that runs here, without Python."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_every_kernel_on_every_capability():
    for tool in ("cmake", "ninja", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    pybind11 = pytest.importorskip("pybind11")
    # kept, so that a second run compiles what changed
    build = ROOT / "build" / "selftest"
    options = ("-DAAJR_SELFTEST=ON", "-DAAJR_EMULATED=ON")
    python = (f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
    run("cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *options, *python)
    run("cmake", "--build", build, "--target", "aajr_selftest", "--parallel", "2")
    text = run(build / "aajr_selftest")
    capability, names = re.match(r"chosen: (\w+); runs here: (.*)\n", text).groups()
    assert capability in names.split() and "emulated" not in capability
    assert "avx512_emulated" in names or platform.machine() not in ("x86_64", "AMD64")
    for name in names.split():
        assert name == "default" or re.search(rf"^pass {name} ", text, re.M), f"nothing ran on {name}"
    # several callers at once, as under ThreadSanitizer (scripts/sanitize.py --races)
    assert run(build / "aajr_selftest", "--callers", "3", names.split()[-1]).endswith("all passed\n")
    # kernels that are wrong must not pass unseen: an unknown capability is a failure
    done = subprocess.run([str(build / "aajr_selftest"), "none"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "FAIL" in done.stdout
