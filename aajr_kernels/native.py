"""The one door to the native CPU module `aajr_kernels._native`, which is loaded on first use.

The module knows no torch: tensors cross as ``(data_ptr, dtype code, shape, strides)``, every call names its thread
count, and the interpreter lock is released while a kernel runs. Entry points check shapes, dtypes and strides before
they touch memory and raise ValueError.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3, torch.int64: 4}
#: dtypes the kernels compute with; float64 is the reference's
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def module() -> ModuleType:
    """The compiled module.

    Raises:
        ImportError: it was not built, or cannot be loaded.
    """
    # torch's OpenMP library has to be in the process before ours looks for one, hence the import of torch above
    from . import _native

    return _native


def _view(t: torch.Tensor | None) -> tuple[int, int, tuple[int, ...], tuple[int, ...]] | None:
    return None if t is None else (t.data_ptr(), _CODES[t.dtype], tuple(t.shape), t.stride())


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
    for t in tensors:
        if t is not None and t.dtype not in _CODES:
            raise TypeError(
                f"the native backend has no kernels for {t.dtype} ({name}): cast to float32, bfloat16 or float16, "
                "or use the reference backend."
            )
    # a negative view shares memory with numbers of the other sign
    tensors = tuple(t.resolve_neg() if t is not None and t.is_neg() else t for t in tensors)
    getattr(module(), name)(tuple(map(_view, tensors)), ints, floats, torch.get_num_threads())


def row_dense(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied only if its last axis is not dense (kernels take any strides on the other axes)."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def info() -> dict[str, Any]:
    """What the module is: capability in use, capabilities built and runnable, compiler, OpenMP."""
    m = module()
    return {
        "capability": m.capability(),
        "capabilities": dict(m.capabilities()),
        "openmp": m.openmp,
        "compiler": m.compiler,
    }
