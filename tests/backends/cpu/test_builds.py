"""Another build of the module than the installed one: without OpenMP."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from backends.cpu.test_objects import shared_functions

ROOT = Path(__file__).parents[3]

SMOKE = """
import torch, aajr_kernels as a
from aajr_kernels.backends import cpu as native
from pathlib import Path
assert native.info()["openmp"] is False, native.info()
torch.manual_seed(0)
def dual(*shape):
    return a.Dual(torch.randn(2, *shape).requires_grad_())
OPS = {
    "norm": lambda: a.rms_norm(dual(300, 33), 33, torch.randn(33, requires_grad=True)),
    "activation": lambda: a.swiglu(dual(300, 33), dual(300, 33)),
    "attention": lambda: a.attention(dual(2, 4, 50, 16), dual(2, 2, 50, 16), dual(2, 2, 50, 16), causal=True),
    "head": lambda: a.lm_head_sensitivity(dual(90, 16), torch.randn(301, 16, requires_grad=True)),
}
for op, call in OPS.items():
    if not (Path(a.__file__).parent / "ops" / op / "cpu.py").exists():
        continue
    runs = []
    for backend, threads in (("reference", 1), ("native", 1), ("native", 2), ("native", 3), ("native", 3)):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        with a.use_backend(backend):
            y = call()
            y = y.stacked if isinstance(y, a.Dual) else y
            y.square().sum().backward()
        runs.append(y.detach())
    for y in runs[1:]:
        torch.testing.assert_close(y, runs[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(runs[3], runs[4])
    print(op)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_without_openmp_the_kernels_start_their_own_threads(tmp_path):
    for tool in ("cmake", "ninja", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    pybind11 = pytest.importorskip("pybind11")
    # kept, so that a second run compiles what changed
    build = ROOT / "build" / "no-openmp"
    configure = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DAAJR_OPENMP=OFF"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    for command in (configure, ["cmake", "--build", build, "--parallel", "2"]):
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning:" not in done.stdout + done.stderr, done.stdout + done.stderr
    for path in build.glob("CMakeFiles/kernels_*.dir/**/*.o"):
        (capability,) = (part[8:-4] for part in path.parts if part.startswith("kernels_"))
        assert shared_functions(path, capability) == [], path.name
    (module,) = build.glob("_native*.so")
    environment = {**os.environ, "AAJR_NATIVE_MODULE": str(module)}
    done = subprocess.run(
        [sys.executable, "-c", SMOKE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "no op has native kernels"
