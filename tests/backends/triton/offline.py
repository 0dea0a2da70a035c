"""Compile what a launcher would launch for a processor that need not be there.

Inside :func:`offline` the ops take tensors on torch's ``meta`` device; every launch goes through Triton's own
specialisation (divisibility of pointers and sizes, constants) and stops after the compiler. What is compiled here is
therefore what a device would run.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from aajr_kernels.backends.triton import launch as gpu

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


def target(architecture: str) -> GPUTarget:
    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return GPUTarget("hip", architecture, 64)


class _NoDevice:
    """A driver of a device that is not there: enough for the compiler."""

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return target(self.architecture)

    def get_current_device(self) -> str:
        return self.architecture  # the key of Triton's cache of kernels: one per processor

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextlib.contextmanager
def no_device(architecture: str) -> Iterator[None]:
    """Triton takes a processor that is not there for the current device."""
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(_NoDevice(architecture))
    try:
        yield
    finally:
        triton.runtime.driver._active = before


@contextlib.contextmanager
def offline(architecture: str) -> Iterator[list[Any]]:
    """Launches inside the block compile for `architecture` and run nothing.

    Yields:
        The compiled kernels in the order of their launches (``triton.compiler.CompiledKernel``); those that were not
        in Triton's cache with what the assembler said, as ``assembler_log``.

    Raises:
        RuntimeError: Triton's interpreter is on, whose kernels cannot be compiled.
    """
    if gpu.interpreted():
        raise RuntimeError(
            "offline: kernels of Triton's interpreter cannot be compiled: unset TRITON_INTERPRET."
        )
    compiled: list[Any] = []

    def record(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        log = io.StringIO()
        with knobs.nvidia.scope(), contextlib.redirect_stdout(log):
            knobs.nvidia.dump_ptxas_log = True
            binary = kernel.warmup(*args, grid=grid, **options)
        if log.getvalue():
            binary.assembler_log = log.getvalue()
        compiled.append(binary)

    with no_device(architecture), gpu.recording(record, architecture):
        yield compiled
