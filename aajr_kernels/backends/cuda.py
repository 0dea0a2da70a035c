"""The one door to the CUDA C++ module `aajr_kernels._cuda`, which is loaded on first use.

The module knows no torch: tensors cross as ``(data_ptr, dtype code, shape, strides)``, and every call names the device
and the stream that it is to run on. Entry points check shapes, dtypes and strides before they launch anything and raise
ValueError; what the CUDA runtime reports raises RuntimeError.

``AAJR_CUDA_MODULE`` names the file of another build. One whose ``host`` is true holds the same kernels compiled for the
CPU, for tests: it takes tensors on the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import cpu as native
from .operator import Registry, constant

__all__ = ["call", "covers", "info", "missing", "module", "multiprocessors", "operator", "why_not"]

#: decorator of the launchers, which torch.compile sees as ``torch.ops.aajr.cuda_...``; CPU: the build for the host
operator = Registry("cuda", ("CUDA", "CPU"), native.dry_run)

#: where the installation recorded no reason
UNBUILT = "it was not built (docs/cuda.md)"


@functools.cache
def module() -> ModuleType:
    """The compiled module.

    Raises:
        ImportError: it was not built, or cannot be loaded.
        ValueError: AAJR_CUDA_MODULE names a file that cannot be loaded.
    """
    path = os.environ.get("AAJR_CUDA_MODULE")
    if path:
        name = "_cuda_host" if Path(path).name.startswith("_cuda_host") else "_cuda"
        return native.load(f"aajr_kernels.{name}", "AAJR_CUDA_MODULE", path)
    return importlib.import_module("aajr_kernels._cuda")


def missing() -> str | None:
    """None where the kernels can run, or one sentence saying why they cannot."""
    try:
        loaded = module()
    except ValueError as error:  # it names the variable and the file
        return str(error)
    except ImportError as error:
        return native.unloadable(error, "_cuda", "CUDA module", "cuda", "cuda_reason", UNBUILT)
    if loaded.host:
        return None
    if torch.version.hip is not None:
        return "the CUDA module runs on NVIDIA devices, and torch is built for ROCm"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    if not covers(loaded.architectures, capability):
        return (
            f"the CUDA module was built for {', '.join(loaded.architectures)}, and the device is an "
            f"sm_{capability[0]}{capability[1]}: reinstall with AAJR_CUDA_ARCHITECTURES"
        )
    return None


def covers(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code for these processors, in CMake's words, runs on a device of that capability."""
    for name in architectures:
        number, _, kind = name.partition("-")
        major, minor = divmod(int(number), 10)
        # machine code runs on later processors of its generation, PTX on all later ones
        if kind != "virtual" and major == capability[0] and minor <= capability[1]:
            return True
        if kind != "real" and (major, minor) <= capability:
            return True
    return False


@constant  # torch.compile cannot trace an import
def _on_host() -> bool:
    return bool(module().host)


def why_not(t: torch.Tensor) -> str | None:
    """None where the kernels take the tensor, or what it is and what it should be."""
    device = "cpu" if _on_host() else "cuda"
    if t.device.type != device:
        return f"a tensor on {t.device}: move it to a {device.replace('cuda', 'CUDA')} device"
    if t.dtype not in native.FLOATS:
        return f"a tensor of {t.dtype}: cast it to float32, bfloat16 or float16"
    return None


def call(
    name: str,
    tensors: tuple[torch.Tensor | None, ...],
    ints: tuple[int, ...] = (),
    floats: tuple[float, ...] = (),
) -> None:
    """Run an entry point of the module on the current stream of its first tensor's device.

    Raises:
        ValueError: tensors on several devices or on the wrong one; shapes or strides that the entry point does not
            accept.
        RuntimeError: the CUDA runtime reported an error.
    """
    if native.is_dry():
        return
    first = tensors[0]
    assert first is not None  # the caller's first tensor is its input
    # an address of the host would end the device's context for good
    where = "cpu" if module().host else "cuda"
    if first.device.type != where or any(t is not None and t.device != first.device for t in tensors):
        devices = ", ".join(dict.fromkeys(str(t.device) for t in tensors if t is not None))
        raise ValueError(f"{name}: all tensors must be on one {where} device, got {devices}.")
    tensors = native.resolved(tensors)
    device, stream = 0, 0
    if first.device.type == "cuda":
        device = torch.cuda.current_device() if first.device.index is None else first.device.index
        stream = torch.cuda.current_stream(first.device).cuda_stream
    entry = native.entry_point(module(), name, "CUDA module")
    # torch and the module have a runtime each: both have to know the device
    other = first.device.type == "cuda" and device != torch.cuda.current_device()
    with torch.cuda.device(device) if other else contextlib.nullcontext():
        entry(tuple(map(native.view, tensors)), (*ints, device, stream), floats, 1)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a device; a handful on the host, so that tests have blocks with several rows."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def info() -> dict[str, Any]:
    """Facts about the module: file, toolkit, architectures (``-virtual``: code that the driver compiles)."""
    m = module()
    return {
        "file": m.__file__,
        "toolkit": m.toolkit,
        "architectures": list(m.architectures),
        "host": bool(m.host),
    }
