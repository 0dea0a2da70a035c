"""The one door to the native CPU module `aajr_kernels._native`, which is loaded on first use.

While torch.compile traces, the launchers in ``ops/*/cpu.py`` are operators of torch: see :data:`operator`.

The module knows no torch: tensors cross as ``(data_ptr, dtype code, shape, strides)``, every call names its thread
count, and the interpreter lock is released while a kernel runs. Entry points check shapes, dtypes and strides before
they touch memory and raise ValueError.

``AAJR_CPU_CAPABILITY`` names the instruction set to use instead of the best one, ``AAJR_NATIVE_MODULE`` the file of
another build of the module (with sanitizers, say).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import importlib.util
import json
import os
import platform
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .operator import Registry

#: dtype -> its number in csrc/view.h
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3, torch.int64: 4}
#: dtypes the kernels compute with; float64 is the reference's
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
#: axes of a tensor that crosses to the module, at most
MAX_AXES = 8


@functools.cache
def module() -> ModuleType:
    """The compiled module.

    Raises:
        ImportError: it was not built, or cannot be loaded.
        ValueError: AAJR_CPU_CAPABILITY names a capability that this build or this processor does not have, or
            AAJR_NATIVE_MODULE a file that cannot be loaded: an explicit setting never fails silently.
    """
    # torch's OpenMP library has to be in the process before ours looks for one, hence the import of torch above
    path = os.environ.get("AAJR_NATIVE_MODULE")
    loaded = (
        load("aajr_kernels._native", "AAJR_NATIVE_MODULE", path)
        if path
        else importlib.import_module("aajr_kernels._native")
    )
    requested = os.environ.get("AAJR_CPU_CAPABILITY")
    if requested:
        try:
            loaded.set_capability(requested)
        except ValueError as error:
            runnable = ", ".join(name for name, runs in loaded.capabilities() if runs)
            raise ValueError(f"AAJR_CPU_CAPABILITY={requested}: {error} Choose one of {runnable}.") from error
    return loaded


def load(name: str, variable: str, path: str) -> ModuleType:
    """The extension module `name` from the file that the environment variable names; ValueError if that fails."""
    loader = importlib.machinery.ExtensionFileLoader(name, path)
    try:
        spec = importlib.util.spec_from_file_location(loader.name, path, loader=loader)
        assert spec is not None  # the loader is given
        loaded = importlib.util.module_from_spec(spec)  # with __file__, unlike that of a bare ModuleSpec
        loader.exec_module(loaded)
    except ImportError as error:
        raise ValueError(f"{variable}={path}: {error}.") from error
    return loaded


def build_info() -> dict[str, Any]:
    """The record of the installation about the module: ``native``, ``reason``, ``compiler``, ``seconds``."""
    path = Path(__file__).parent.parent / "_build_info.json"
    try:
        build: dict[str, Any] = json.loads(path.read_text())
    except OSError:
        return {"native": False, "reason": "the package runs from a source tree that was never installed"}
    except ValueError:
        return {"native": False, "reason": f"{path.name} cannot be read: reinstall the package"}
    return build


def missing() -> str | None:
    """None where the module can be used, or one sentence saying why it cannot.

    Raises:
        ValueError: as :func:`module`.
    """
    try:
        module()
    except ImportError as error:
        return unloadable(error, "_native", "native CPU module", "native", "reason")
    return None


def unloadable(error: ImportError, name: str, title: str, built: str, reason: str, unknown: str = "") -> str:
    """One sentence on why the extension module `name` did not load; `built` and `reason`: its entries in the record."""
    if not isinstance(error, ModuleNotFoundError) or error.name != f"aajr_kernels.{name}":
        return f"the {title} cannot be loaded ({error})"
    build = build_info()
    if not build.get(built):
        return f"this installation has no {title}: {build.get(reason) or unknown}"
    return (
        f"the {title} was built for Python {build.get('python')}, and there is none for this Python "
        f"{platform.python_version()}: reinstall the package"
    )


class _State(threading.local):
    """State of `dry_run`, per thread: other threads compute while one traces."""

    dry = False


_state = _State()


def is_dry() -> bool:
    """Whether this thread only allocates results: tensors may have no memory, and numbers in them no value."""
    return _state.dry


@contextlib.contextmanager
def dry_run() -> Iterator[None]:
    """Launchers allocate their results and run nothing; tensors may have no memory (fake)."""
    before, _state.dry = _state.dry, True
    try:
        yield
    finally:
        _state.dry = before


#: decorator of the launchers, which torch.compile sees as ``torch.ops.aajr.native_...``
operator = Registry("native", ("CPU",), dry_run)


def view(t: torch.Tensor | None) -> tuple[int, int, tuple[int, ...], tuple[int, ...]] | None:
    """A tensor as the module takes it."""
    return None if t is None else (t.data_ptr(), CODES[t.dtype], tuple(t.shape), t.stride())


def resolved(tensors: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
    """Copies of negative views, which share memory with numbers of the other sign; keep them until the call ends."""
    return tuple(t.resolve_neg() if t is not None and t.is_neg() else t for t in tensors)


def call(
    name: str,
    tensors: tuple[torch.Tensor | None, ...],
    ints: tuple[int, ...] = (),
    floats: tuple[float, ...] = (),
) -> None:
    """Run an entry point of the module; its outputs are among the tensors.

    Raises:
        TypeError: a dtype that the native backend does not have.
        ValueError: shapes or strides that the entry point does not accept.
    """
    if is_dry():
        return
    for t in tensors:
        if t is not None and t.dtype not in CODES:
            raise TypeError(
                f"the native backend has no kernels for {t.dtype} ({name}): cast to float32, bfloat16 or float16, "
                "or use the reference backend."
            )
    tensors = resolved(tensors)
    entry = entry_point(module(), name, "native CPU module")
    entry(tuple(map(view, tensors)), ints, floats, torch.get_num_threads())


def entry_point(loaded: ModuleType, name: str, title: str) -> Any:
    """The function `name` of an extension module."""
    entry = getattr(loaded, name, None)
    if entry is None:
        raise ImportError(f"the {title} has no {name}, it is older than the package: run pip install again.")
    return entry


#: bytes from which a tensor asks for large pages: a few of them at least
_LARGE = 4 << 20


def _on_large_pages(t: torch.Tensor) -> torch.Tensor:
    if not is_dry() and t.nbytes >= _LARGE:
        module().prefer_large_pages(t.data_ptr(), t.nbytes)
    return t


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """``torch.empty`` for the output of an entry point. Memory fresh from the system comes in pages of 4 KB, each of
    which costs an interruption when first written, and together more than most kernels: large tensors ask for larger
    pages, as torch itself does if ``THP_MEM_ALLOC_ENABLE=1`` is set."""
    return _on_large_pages(torch.empty(shape, dtype=dtype))


def empty_like(x: torch.Tensor, **options: Any) -> torch.Tensor:
    """``torch.empty_like`` on such pages."""
    return _on_large_pages(torch.empty_like(x, **options))


def row_dense(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied only if its last axis is not dense (kernels take any strides on the other axes)."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def few_axes(x: torch.Tensor) -> torch.Tensor:
    """`x` with as few axes as the module takes; the stack and the last axis stay as they are."""
    return x if x.dim() <= MAX_AXES else x.flatten(1, -2)


def rows(x: torch.Tensor) -> torch.Tensor:
    """`x` with a dense last axis and as few axes as the module takes."""
    return row_dense(few_axes(x))


def info() -> dict[str, Any]:
    """Facts about the module: file, capability in use, capabilities built in (True: it runs here), compiler, OpenMP."""
    m = module()
    return {
        "file": m.__file__,
        "capability": m.capability(),
        "capabilities": dict(m.capabilities()),
        "compiler": m.compiler,
        "openmp": m.openmp,
        "threads": torch.get_num_threads(),
    }
