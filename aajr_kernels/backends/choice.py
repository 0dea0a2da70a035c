"""Which backend an op runs on: chosen by name, or by the device and dtype of its tensors."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from .. import sharding
from ..torch_private import has_memory, separate_outputs
from . import cpu as native
from . import cuda
from .errors import BackendUnavailable, UnsupportedOperation
from .operator import constant
from .triton import launch as gpu

__all__ = [
    "BACKENDS",
    "backends",
    "check_backend",
    "current_backend",
    "implementation",
    "select_backend",
    "use_backend",
]

BACKENDS = ("reference", "native", "triton", "cuda")
_current = os.environ.get("AAJR_BACKEND", "auto")
_OPS = os.path.join(os.path.dirname(os.path.dirname(__file__)), "ops")


def backends() -> dict[str, str | None]:
    """Every backend by name, with None where it can run and a one-sentence reason where it cannot."""
    return {name: _missing(name) for name in BACKENDS}


def _missing(name: str) -> str | None:
    """Why one backend cannot run here; asked at every operation while it is chosen by name."""
    if name == "native":
        try:
            return native.missing()
        except ValueError as error:
            return str(error)
    if name == "triton":
        return gpu.missing()
    return cuda.missing() if name == "cuda" else None


class use_backend:
    """Choose the backend of every operation: ``"auto"``, ``"reference"``, ``"native"``, ``"triton"`` or ``"cuda"``.

    Takes effect when called; used as a context manager it restores the previous choice on exit. The environment
    variable ``AAJR_BACKEND`` sets the initial choice. A backend chosen by name never falls back to another one, with
    one exception: ``"cuda"`` (experimental) has kernels only for norms and sensitivities, and leaves other operations
    to the backend of ``"auto"``. :func:`coverage` shows the backend of each operation.

    Raises:
        ValueError: the name is unknown.
        BackendUnavailable: the named backend cannot run here.
    """

    def __init__(self, name: str) -> None:
        global _current
        check_backend(name)
        self._previous, _current = _current, name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc: object) -> None:
        global _current
        _current = self._previous


def check_backend(name: str) -> None:
    """Raise unless `name` is "auto" or the name of a backend that can run here."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend {name!r} is unknown: choose one of auto, {', '.join(BACKENDS)}.")
    if name in BACKENDS[1:] and (reason := _missing(name)) is not None:
        raise BackendUnavailable(f"backend {name!r} cannot run here: {reason.rstrip('.')}.")


def current_backend() -> str:
    """The backend that :class:`use_backend` or AAJR_BACKEND names, or ``"auto"``."""
    return _current


_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.int64)


def _module(op: str, backend: str) -> str:
    return f"aajr_kernels.ops.{op}.{'cpu' if backend == 'native' else backend}"


@functools.cache
def _has_module(op: str, backend: str) -> bool:
    return importlib.util.find_spec(_module(op, backend)) is not None


@constant  # torch.compile looks through a cache, and cannot trace the search behind it
def _has(op: str, backend: str) -> bool:
    return _has_module(op, backend)


@constant
def _named(op: str, backend: str) -> str:
    """The backend that was chosen by name, checked and loaded."""
    check_backend(backend)
    implementation(op, backend)
    return backend


@constant
def _on_device(op: str) -> str:
    """The backend of ``auto`` on CUDA and ROCm devices, loaded."""
    if gpu.missing() is not None or not _has(op, "triton"):
        return "reference"
    implementation(op, "triton")
    return "triton"


@functools.cache
def _has_native(op: str) -> bool:
    """Whether the native module was built and has kernels for the op; raises where a variable asks in vain."""
    try:
        reason = native.missing()
    except ValueError as error:
        raise BackendUnavailable(str(error)) from error
    return reason is None and _has(op, "native")


@constant
def _on_cpu(op: str) -> str:
    """The backend of ``auto`` on a CPU, loaded."""
    if not _has_native(op):
        return "reference"
    implementation(op, "native")
    return "native"


@constant
def _load_all(backend: str) -> None:
    """Have every op's module of a backend: torch.compile sees only those loaded before it looks at one."""
    for op in pkgutil.iter_modules([_OPS]):
        if op.ispkg and _has(op.name, backend):
            implementation(op.name, backend)


@constant
def _ready_to_trace() -> None:
    """Mend what torch.compile does to our autograd Functions: compiled code may be the first to use them."""
    separate_outputs()


def _fits_native(t: torch.Tensor) -> bool:
    """A CPU tensor with memory of its own, now or when compiled code runs, and a dtype that has kernels."""
    return t.is_cpu and t.dtype in _NATIVE_DTYPES and (torch.compiler.is_compiling() or has_memory(t))


#: kinds of calls, all that :func:`select_backend` looks at -> the backend that it found
_found: dict[tuple[Any, ...] | None, str] = {}
#: kinds that are kept; after as many all are looked at again
LIMIT = 4096
#: backends of devices -> why their kernels do not take a tensor
_WHY_NOT = {"triton": gpu.why_not, "cuda": cuda.why_not}


def _why_not(backend: str, *tensors: torch.Tensor) -> str | None:
    for t in tensors:
        if (reason := _WHY_NOT[backend](t)) is not None:
            return reason
        # DTensor, for one, has a pointer of zero
        if not torch.compiler.is_compiling() and not has_memory(t):
            return f"a {type(t).__name__}, which has no memory of its own: pass the local tensor"
        if t.device != tensors[0].device:
            return f"tensors on {tensors[0].device} and on {t.device}: move them to one device"
    return None


def _kind(op: str, tensors: list[torch.Tensor], sized: bool, in_cuda: bool) -> tuple[Any, ...] | None:
    """All that the choice depends on, with the last axes where `sized`; None where it has to be made every time."""
    if torch.compiler.is_compiling() or (settings := gpu.settings()) is None:
        return None
    kind: list[Any] = [op, _current, in_cuda, settings]
    for t in tensors:
        kind += type(t), t.dtype, t.device
    if sized:
        kind += [t.shape[-1] for t in tensors]
    return tuple(kind)


def select_backend(
    op: str,
    *tensors: torch.Tensor | None,
    triton_lacks: Callable[..., str | None] | None = None,
    triton_spills: Callable[..., bool] | None = None,
    in_cuda: bool = True,
) -> str:
    """The backend that `op` runs on for these inputs.

    A name chosen by the user is final (``cuda``: for what it has kernels for). ``auto`` takes the native kernels for
    float32, bfloat16 and float16 on a CPU, the Triton kernels for the same on CUDA and ROCm devices unless they spill,
    and the reference for everything else: float64 and other devices. Compiled code runs the same kernels, as operators
    of torch.

    Args:
        op: package under ``ops``.
        tensors: its inputs.
        triton_lacks: from the tensors to what the Triton kernels lack for this call, or None; a matter of dtypes,
            devices and last axes.
        triton_spills: likewise to whether ``auto`` avoids the Triton kernels, which run where they are named.
        in_cuda: whether the op's CUDA C++ kernels, if there are any, have this part of it.

    Raises:
        BackendUnavailable: the backend chosen by name cannot run here, or not on these tensors.
        UnsupportedOperation: a tensor is a DTensor, or complex.
    """
    present = [t for t in tensors if t is not None]
    kind = _kind(op, present, triton_lacks is not None or triton_spills is not None, in_cuda)
    backend = _found.get(kind)
    if backend is not None:
        return backend
    for t in present:
        if t.is_complex():
            raise UnsupportedOperation(
                f"{op} got complex numbers and takes real ones: pass real and imaginary parts, torch.view_as_real(x)."
            )
    if sharding.is_dtensor(*present):
        raise UnsupportedOperation(f"{op} got a DTensor and has no rule for shards: pass x.to_local().")
    lacks = None if triton_lacks is None else functools.partial(triton_lacks, *tensors)
    spills = None if triton_spills is None else functools.partial(triton_spills, *tensors)
    backend = _select(op, present, lacks, spills, in_cuda)
    if kind is not None:
        if len(_found) >= LIMIT:
            _found.clear()
        _found[kind] = backend
    if torch.compiler.is_compiling():
        _ready_to_trace()
        _load_all(backend)
    return backend


def _select(
    op: str,
    tensors: list[torch.Tensor],
    triton_lacks: Callable[[], str | None] | None,
    triton_spills: Callable[[], bool] | None,
    in_cuda: bool,
) -> str:
    named = _current != "auto"
    if _current == "cuda":
        named = in_cuda and _has(op, "cuda")
    if named:
        _named(op, _current)
        if _current == "triton" and triton_lacks is not None and (reason := triton_lacks()) is not None:
            raise BackendUnavailable(f"{op}: backend 'triton' {reason}: use backend 'auto'.")
        if _current in _WHY_NOT and (reason := _why_not(_current, *tensors)) is not None:
            raise BackendUnavailable(f"{op}: backend {_current!r} got {reason}, or use backend 'auto'.")
        return _current
    if True in [t.is_cuda for t in tensors]:
        if triton_lacks is not None and triton_lacks() is not None:
            return "reference"
        if _why_not("triton", *tensors) is not None or (triton_spills is not None and triton_spills()):
            return "reference"
        return _on_device(op)
    for t in tensors:
        if not _fits_native(t):
            return "reference"
    return _on_cpu(op)


def implementation(op: str, backend: str) -> ModuleType:
    """The module of ``aajr_kernels.ops.<op>`` with the kernels of one op on one backend, imported lazily.

    Raises:
        BackendUnavailable: there is no such module, or it cannot be imported.
    """
    name = _module(op, backend)
    module = sys.modules.get(name)  # torch.compile traces the look-up, it could not trace an import
    if module is None:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise BackendUnavailable(f"op {op!r} has no {backend!r} backend: {error}.") from error
    return module
