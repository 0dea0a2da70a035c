"""A driver of an NVIDIA processor that is not there: kernels are compiled and launched, and nothing runs.

It is Triton's own driver on a ``libcuda.so.1`` whose functions succeed and do nothing. All that the host does for a
launch is done, so that it can be timed on any machine with a C compiler; tensors stay on the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from aajr_kernels.backends.triton import launch as gpu

ARCHITECTURE = "sm_90"
_SOURCE = Path(__file__).with_name("stub.c")


@functools.cache
def _library() -> str:
    """Build and load the library; returns its folder. Loaded first, it is what ``dlopen("libcuda.so.1")`` finds."""
    folder = tempfile.mkdtemp(prefix="aajr-stub-")
    path = os.path.join(folder, "libcuda.so.1")
    compiler = os.environ.get("CC", "cc")
    options = ["-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([compiler, *options, str(_SOURCE), "-o", path], check=True)
    ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
    return folder


@functools.cache
def _driver() -> Any:
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver

    knobs.nvidia.libcuda_path = _library()

    class Stub(driver.CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = driver.CudaUtils(), driver.CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device=0: (9, 0)

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    return Stub()


@contextlib.contextmanager
def stub() -> Iterator[None]:
    """Inside, Triton kernels take tensors on the CPU and are launched on the stub; their results are not written.

    Raises:
        RuntimeError: a driver is there, which would be called in place of the stub.
    """
    if torch.cuda.is_available():
        raise RuntimeError(
            "stub: torch sees a CUDA device, whose driver would be called: measure on the device."
        )
    from triton.runtime import driver

    before = driver._active
    driver.set_active(_driver())
    try:
        with gpu.recording(None, ARCHITECTURE):
            yield
    finally:
        driver._active = before
