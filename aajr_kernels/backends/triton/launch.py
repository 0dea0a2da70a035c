"""Shared by all Triton kernels: where they can run, and the only way to launch them.

Triton is imported on first use. A launcher calls :func:`launch`, which runs the kernel on the device of its tensors, in
Triton's interpreter (``TRITON_INTERPRET=1``, set before the first kernel is used; tensors on the CPU, for tests), or,
inside ``tests/backends/triton/offline.py``, compiles it for a processor that need not be there.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...torch_private import matmul_precision
from ..operator import constant

#: dtypes the kernels compute with; float64 is the reference's
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


#: of the processors that kernels are compiled for without a device
_MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304}


class _State(threading.local):
    """State of `recording` and `traced`, per thread: other threads launch while one compiles."""

    #: takes (kernel, grid, arguments, options) instead of the device
    recorder: Callable[..., None] | None = None
    architecture = ""
    #: takes (kernel, compiled kernel, grid, arguments, options) after a launch
    trace: Callable[..., None] | None = None


_state = _State()


@constant  # torch.compile cannot trace a look into the state of a thread
def is_recorded() -> bool:
    """Whether launches of this thread go to a recorder."""
    return _state.recorder is not None


@functools.cache
def _not_installed() -> str | None:
    """Looked up, not imported: what only lists the backends need not wait for it."""
    try:
        if importlib.util.find_spec("triton") is not None:
            return None
        why = ""
    except ImportError as error:
        why = f" ({error})"
    return f"triton is not installed{why}: pip install triton"


@functools.cache
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@constant  # torch.compile does not see changes of the environment
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU; the environment is read once."""
    return _interpreted()


_forgotten = 0


def forget() -> None:
    """Read the environment again, and record calls anew (:mod:`.replay`): tables of tiles may have changed."""
    global _forgotten
    _interpreted.cache_clear()
    _forgotten += 1


def missing() -> str | None:
    """None where Triton kernels can run, or one sentence saying why they cannot."""
    reason = _not_installed()
    if reason is None and not (
        _state.architecture or interpreted() or is_recorded() or torch.cuda.is_available()
    ):
        reason = (
            f"torch {torch.__version__} sees no CUDA or ROCm device (TRITON_INTERPRET=1 runs the kernels on a CPU, "
            "for tests)"
        )
    return reason


def why_not(t: torch.Tensor) -> str | None:
    """None where the kernels take the tensor, or what it is and what it should be."""
    device = "meta" if is_recorded() else "cpu" if _state.architecture or interpreted() else "cuda"
    if t.device.type != device:
        return f"a tensor on {t.device}: move it to a {'CUDA or ROCm' if device == 'cuda' else device} device"
    if t.is_floating_point() and t.dtype not in FLOATS:
        return f"a tensor of {t.dtype}: cast it to float32, bfloat16 or float16"
    return None


@contextlib.contextmanager
def dry_run(architecture: str = "") -> Iterator[list[Any]]:
    """Launchers allocate their outputs and launch nothing; tensors may have no memory (meta, fake).

    Yields:
        The kernels that would have been launched.
    """
    launched: list[Any] = []
    with recording(lambda kernel, grid, args, options: launched.append(kernel), architecture):
        yield launched


@contextlib.contextmanager
def recording(recorder: Callable[..., None] | None, architecture: str) -> Iterator[None]:
    """Every launch inside the block goes to `recorder` instead of a device; None: to a driver that emulates one.

    With an emulated device tensors are on the CPU.
    """
    before = _state.recorder, _state.architecture
    _state.recorder, _state.architecture = recorder, architecture
    try:
        yield
    finally:
        _state.recorder, _state.architecture = before


#: processors whose matrix units are to form three products of tf32 in less time than other units one of float32. Tf32
#: is no faster than float32 on NVIDIA's consumer processors, and AMD's matrix units take float32. The interpreter, for
#: tests, does as these do
_TF32X3 = ("sm_80", "sm_90", "sm_100", "sm_103", "interpreter")


def float32_products(x: torch.Tensor) -> str:
    """How kernels form products of float32 rows; ``"ieee"`` for other dtypes.

    ``"tf32"`` where torch's setting says so, except on AMD. Otherwise every product is one of float32 (``"ieee"``), or
    three of tf32 that stand for it within the error budget of float32 (``"tf32x3"``).
    """
    return _float32_products(x.device) if x.dtype == torch.float32 else "ieee"


@constant  # torch.compile cannot trace a look at a device
def _float32_products(device: torch.device) -> str:
    if torch.version.hip is not None:
        return "ieee"
    if matmul_precision() == "tf32":
        return "tf32"
    return "tf32x3" if architecture(device) in _TF32X3 else "ieee"


@contextlib.contextmanager
def traced(trace: Callable[..., None]) -> Iterator[None]:
    """Every launch inside the block is made, and then given to `trace` with the compiled kernel."""
    before, _state.trace = _state.trace, trace
    try:
        yield
    finally:
        _state.trace = before


def settings() -> tuple[str, str, int] | None:
    """State that a call depends on beside its arguments; None where launches go to no device, or are traced.

    An emulated architecture, how float32 is multiplied, the number of `forget`.
    """
    if _state.recorder is not None or _state.trace is not None or _interpreted():
        return None
    return _state.architecture, matmul_precision(), _forgotten


def state() -> tuple[Any, ...]:
    """All that a choice of backend and kernels depends on here, beside tensors and devices."""
    return _state.architecture, _state.recorder is not None, _interpreted(), matmul_precision(), _forgotten


@functools.cache
def _architecture(index: int) -> str:
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(index).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def architecture(device: torch.device) -> str:
    """``"sm_90"``, ``"gfx942"``...; ``"interpreter"`` where there is no device."""
    if _state.architecture or is_recorded():
        return _state.architecture
    if interpreted():
        return "interpreter"
    return _architecture(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a device, or of the usual one of its architecture where it is not there."""
    if _state.architecture or device.type != "cuda":
        return _MULTIPROCESSORS.get(_state.architecture, _MULTIPROCESSORS["sm_90"])
    return _multiprocessors(torch.cuda.current_device() if device.index is None else device.index)


_NO_CONTEXT = contextlib.nullcontext()


def guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return _NO_CONTEXT
    return torch.cuda.device(device)


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, num_warps: int = 4, **options: Any
) -> None:
    """Run a kernel; nothing is launched where the grid is empty.

    Args:
        kernel: decorated with ``triton.jit``.
        grid: programs along up to three axes.
        device: that of the tensors.
        args: the kernel's arguments in order, tensors and descriptors among them.
        num_warps: of a program.
        options: constants of the kernel and ``num_stages``, by name.
    """
    if 0 in grid:
        return
    # contraction to multiply-add is the default of some versions and backends only
    options = {"enable_fp_fusion": True, **options, "num_warps": num_warps}
    if _state.recorder is not None:
        _state.recorder(kernel, grid, args, options)
        return
    with guard(device):
        compiled = kernel[grid](*args, **options)
    if _state.trace is not None:
        _state.trace(kernel, compiled, grid, args, options)
