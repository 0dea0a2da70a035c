"""Casts under ``torch.autocast``, as its lists have them: products in the low dtype, norms and metrics in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["autocast_float32", "autocast_low", "autocasting", "no_autocast", "outside_autocast"]


def autocasting(device_type: str) -> bool:
    """Whether autocast is active; torch raises for the devices that have none, such as ``meta``."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _autocast(dtype: torch.dtype | None, tensors: tuple[torch.Tensor | None, ...]) -> tuple[Any, ...]:
    device = "cpu"
    for t in tensors:
        if t is not None:
            device = t.device.type
            break
    if not autocasting(device):
        return tensors
    target = torch.get_autocast_dtype(device) if dtype is None else dtype

    def cast(t: torch.Tensor | None) -> torch.Tensor | None:
        # float64 stays, as under torch's own autocast
        return t.to(target) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t

    return tuple(cast(t) for t in tensors)


def autocast_low(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """Under an active autocast, the tensors in its low dtype (differentiable casts); otherwise unchanged."""
    return _autocast(None, tensors)


def autocast_float32(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """Under an active autocast, the tensors in float32 (differentiable casts); otherwise unchanged."""
    return _autocast(torch.float32, tensors)


_NO_CONTEXT = contextlib.nullcontext()


def no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Switch autocast off inside a Function, whose inputs were cast by its caller."""
    if not autocasting(device_type):
        return _NO_CONTEXT
    return torch.autocast(device_type, enabled=False)


def outside_autocast(device_type: str, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` inside :func:`no_autocast`, in less time where there is no autocast."""
    if not autocasting(device_type):
        return function(*args)
    with no_autocast(device_type):
        return function(*args)
