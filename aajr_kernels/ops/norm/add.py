"""The public norms of a sum, as residual streams need them: checks, backend choice, coverage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ... import sharding
from ...autocast import autocasting
from ...dual import Dual, is_dual, num_tangents, stack_of
from ...recompute import is_recomputed
from ..prepare import prepare
from .api import layer_norm, rms_norm
from .checks import (
    check_dtypes,
    check_offset,
    check_shapes,
    refuse_dual_weights,
    trailing_shape,
    wide_dtype,
)
from .function import AddNormFunction

_Pair = tuple[Any, Any]


def add_rms_norm(
    x: torch.Tensor | Dual,
    residual: torch.Tensor | Dual,
    normalized_shape: int | Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    *,
    offset: float = 0.0,
    recompute: bool | None = None,
) -> _Pair:
    """``s = x + residual`` and :func:`rms_norm` of it, in one pass over memory: the step between pre-norm blocks.

    Args:
        x: ``[*batch, *normalized_shape]``, Tensor or Dual; what a block computed.
        residual: shape and dtype of `x`, Tensor or Dual; the stream that the block is added to.
        normalized_shape: as for :func:`rms_norm`, like the arguments after it.

    Returns:
        ``(normed, summed)``, both in the shape and dtype of `x`; Duals if `x` or `residual` is one (a plain one has
        tangent zero), plain tensors otherwise. Gradients of both results reach both inputs.

    Raises:
        UnsupportedOperation: `weight` is a Dual.
        ValueError: shapes do not agree, or an offset comes without a weight.
    """
    refuse_dual_weights("add_rms_norm", weight=weight)
    shape = _common_shape("add_rms_norm", x, residual, normalized_shape)
    check_offset("add_rms_norm", weight, offset)
    if not _fusible(x, residual, shape):
        summed = x + residual  # type: ignore[operator]
        return rms_norm(summed, normalized_shape, weight, eps, offset=offset, recompute=recompute), summed
    check_shapes("add_rms_norm", shape, weight=weight)
    if eps is None:
        eps = torch.finfo(wide_dtype(x.dtype)).eps
    return _add_norm("add_rms_norm", x, residual, weight, None, eps, offset, False, recompute)


def add_layer_norm(
    x: torch.Tensor | Dual,
    residual: torch.Tensor | Dual,
    normalized_shape: int | Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    recompute: bool | None = None,
) -> _Pair:
    """``s = x + residual`` and :func:`layer_norm` of it, in one pass over memory: the step between pre-norm blocks.

    Args:
        x: ``[*batch, *normalized_shape]``, Tensor or Dual; what a block computed.
        residual: shape and dtype of `x`, Tensor or Dual; the stream that the block is added to.
        normalized_shape: as for :func:`layer_norm`, like the arguments after it.

    Returns:
        ``(normed, summed)``, both in the shape and dtype of `x`; Duals if `x` or `residual` is one (a plain one has
        tangent zero), plain tensors otherwise. Gradients of both results reach both inputs.

    Raises:
        UnsupportedOperation: `weight` or `bias` is a Dual.
        ValueError: shapes do not agree.
        RuntimeError: dtypes do not agree.
    """
    refuse_dual_weights("add_layer_norm", weight=weight, bias=bias)
    shape = _common_shape("add_layer_norm", x, residual, normalized_shape)
    if not _fusible(x, residual, shape):
        summed = x + residual  # type: ignore[operator]
        return layer_norm(summed, normalized_shape, weight, bias, eps, recompute=recompute), summed
    check_shapes("add_layer_norm", shape, weight=weight, bias=bias)
    check_dtypes("add_layer_norm", x.dtype, weight=weight, bias=bias)
    return _add_norm("add_layer_norm", x, residual, weight, bias, eps, 0.0, True, recompute)


def _common_shape(
    op: str, x: torch.Tensor | Dual, residual: torch.Tensor | Dual, normalized_shape: int | Sequence[int]
) -> tuple[int, ...]:
    if x.shape != residual.shape:
        raise ValueError(
            f"{op}: residual must have the shape of x {tuple(x.shape)}, got {tuple(residual.shape)}: expand it."
        )
    return trailing_shape(op, x, normalized_shape)


def _fusible(x: Any, residual: Any, shape: tuple[int, ...]) -> bool:
    """Whether the sum and its norm are one kernel; several normalised axes and casts in between are rare."""
    if sharding.is_dtensor(*(t.stacked if is_dual(t) else t for t in (x, residual))):
        return False
    if len(shape) > 1 or not (is_dual(x) or is_dual(residual)) or x.dtype != residual.dtype:
        return False
    return not autocasting(x.device.type)


def _add_norm(
    op: str,
    x: torch.Tensor | Dual,
    residual: torch.Tensor | Dual,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
    recompute: bool | None,
) -> tuple[Dual, Dual]:
    num_tangents(x, residual)  # they must agree
    backend, operands = prepare(
        "norm",
        (stack_of(x), stack_of(residual)),
        (weight, bias),
        flops=lambda x, residual, *_: 7.0 * max(x.numel(), residual.numel()),
        name=op,
    )
    again = is_recomputed("norms", recompute)
    y, summed = AddNormFunction.apply(*operands, float(eps), float(offset), centred, backend, again)
    return Dual(y), Dual(summed)
