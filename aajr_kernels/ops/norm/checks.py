"""Checks of the norms' arguments; every error is one sentence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...dual import Dual


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def trailing_shape(op: str, x: Tensor | Dual, normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    sizes = x.shape
    if not shape or len(shape) > len(sizes) or tuple(sizes[len(sizes) - len(shape) :]) != shape:
        raise ValueError(
            f"{op}: normalized_shape must be the trailing axes of x, whose shape is {tuple(x.shape)}, got {shape}."
        )
    return shape


def check_shapes(op: str, shape: tuple[int, ...], **weights: Tensor | None) -> None:
    for name, value in weights.items():
        if value is not None and value.shape != shape:
            raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(value.shape)}.")


def check_offset(op: str, weight: Tensor | None, offset: float) -> None:
    if weight is None and offset != 0.0:
        raise ValueError(f"{op}: offset is {offset} but weight is None: an offset is added to a weight.")
