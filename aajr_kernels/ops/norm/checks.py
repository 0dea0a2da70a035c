"""Checks of the norms' arguments; every error is one sentence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...backends.errors import UnsupportedOperation
from ...dual import Dual, is_dual


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def trailing_shape(op: str, x: Tensor | Dual, normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape or len(shape) > x.dim() or tuple(x.shape[x.dim() - len(shape) :]) != shape:
        raise ValueError(
            f"{op}: normalized_shape must be the trailing axes of x, whose shape is {tuple(x.shape)}, got {shape}."
        )
    return shape


def refuse_dual_weights(op: str, **weights: object) -> None:
    for name, value in weights.items():
        if is_dual(value):
            raise UnsupportedOperation(
                f"{op}: {name} is a Dual, and this op takes plain weights: call it without {name} and apply {name} "
                f"with * or +, or pass {name}.primal where no tangent is wanted."
            )


def check_shapes(op: str, shape: tuple[int, ...], **weights: Tensor | None) -> None:
    for name, value in weights.items():
        if value is not None and value.shape != shape:
            raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(value.shape)}.")


def check_dtypes(op: str, dtype: torch.dtype, **weights: Tensor | None) -> None:
    for name, value in weights.items():
        if value is not None and value.dtype not in (dtype, wide_dtype(dtype)):
            raise RuntimeError(
                f"{op}: {name} must have the dtype of x ({dtype}), got {value.dtype}: cast one of them."
            )


def check_offset(op: str, weight: Tensor | None, offset: float) -> None:
    if weight is None and offset != 0.0:
        raise ValueError(f"{op}: offset is {offset} but weight is None: an offset is added to a weight.")
