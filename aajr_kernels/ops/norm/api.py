"""The public norms: checks, backend choice, coverage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import sharding
from ...autocast import autocast_float32, autocasting
from ...dual import Dual, num_tangents, stack_of
from ...recompute import is_recomputed
from ..checks import check_dtypes, refuse_duals
from ..prepare import SHARDS, prepare
from .checks import check_offset, check_shapes, trailing_shape, wide_dtype
from .function import NormFunction

_T = TypeVar("_T", Tensor, Dual)
_INSTEAD = "call it without {name} and apply {name} with * or +"


def rms_norm(
    x: _T,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    offset: float = 0.0,
) -> _T:
    """Root-mean-square norm ``y = (offset + w) ∘ x̂`` with ``x̂ = r x``, ``r = (mean(x²) + eps)^(-1/2)``.

    The tangent is ``ẏ = (offset + w) ∘ r(ẋ − x̂ mean(x̂∘ẋ))``.

    Args:
        x: ``[*batch, *normalized_shape]``, Tensor or Dual; float64, float32, bfloat16 or float16. Low dtypes are
            computed in float32 and rounded once.
        normalized_shape: the trailing axes that are normalised together; an int means the last axis.
        weight: ``normalized_shape`` or None, any floating dtype.
        eps: added to the mean square; None means the epsilon of float32 (of float64 for float64), as in torch.
        offset: added to the weight in float32 (Gemma's norms use 1).

    Returns:
        Same shape and dtype as `x`, a Dual if `x` is one. A plain `x` gives what ``torch.nn.functional.rms_norm``
        gives.

    Raises:
        UnsupportedOperation: `weight` is a Dual.
        ValueError: shapes do not agree, or an offset comes without a weight.
    """
    refuse_duals("rms_norm", _INSTEAD, weight=weight)
    shape = trailing_shape("rms_norm", x, normalized_shape)
    check_offset("rms_norm", weight, offset)
    if isinstance(x, Dual):
        if eps is None:
            eps = torch.finfo(wide_dtype(x.stacked.dtype)).eps
        return _norm("rms_norm", x, None, shape, weight, None, eps, offset, False)[0]
    if offset == 0.0:
        return F.rms_norm(x, shape, weight, eps)
    assert weight is not None
    wide = wide_dtype(x.dtype)
    return F.rms_norm(x.to(wide), shape, weight.to(wide) + offset, eps).to(x.dtype)


def layer_norm(
    x: _T,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> _T:
    """Layer norm ``y = w ∘ x̂ + b`` with ``x̂ = r(x − mean(x))``, ``r = (var(x) + eps)^(-1/2)``.

    The tangent is ``ẏ = w ∘ r(ẋc − x̂ mean(x̂∘ẋc))`` with ``ẋc = ẋ − mean(ẋ)``. Its gradient is exact, where PyTorch's
    reverse-over-forward through ``torch.nn.functional.layer_norm`` is not.

    Args:
        x: ``[*batch, *normalized_shape]``, Tensor or Dual; float64, float32, bfloat16 or float16. Low dtypes are
            computed in float32 and rounded once.
        normalized_shape: the trailing axes that are normalised together; an int means the last axis.
        weight: ``normalized_shape`` or None; dtype of `x`, or float32 beside a low-precision `x`.
        bias: like `weight`; added only to the primal.
        eps: added to the variance.

    Returns:
        Same shape and dtype as `x`, a Dual if `x` is one. A plain `x` gives what ``torch.nn.functional.layer_norm``
        gives.

    Raises:
        UnsupportedOperation: `weight` or `bias` is a Dual.
        ValueError: shapes do not agree.
        RuntimeError: dtypes do not agree.
    """
    refuse_duals("layer_norm", _INSTEAD, weight=weight, bias=bias)
    shape = trailing_shape("layer_norm", x, normalized_shape)
    if not isinstance(x, Dual):
        return F.layer_norm(x, shape, weight, bias, eps)
    if not autocasting(x.stacked.device.type):
        check_dtypes("layer_norm", "x", (x.dtype, wide_dtype(x.dtype)), weight=weight, bias=bias)
    return _norm("layer_norm", x, None, shape, weight, bias, eps, 0.0, True)[0]


def add_rms_norm(
    x: Tensor | Dual,
    residual: Tensor | Dual | None,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    offset: float = 0.0,
) -> tuple[Any, Any]:
    """``s = x + residual`` and :func:`rms_norm` of it, in one pass over memory: the step between pre-norm blocks.

    Args:
        x: ``[*batch, *normalized_shape]``, Tensor or Dual; what a block computed.
        residual: shape and dtype of `x`, Tensor or Dual; the stream that the block is added to. None adds nothing: the
            sum is `x`, and in the backward its gradient is added to that of the norm in one pass.
        normalized_shape: as for :func:`rms_norm`, like the arguments after it.

    Returns:
        ``(normed, summed)``, both in the shape and dtype of `x`; Duals if `x` or `residual` is one (a plain one has
        tangent zero), plain tensors otherwise. Gradients of both results reach both inputs.

    Raises:
        UnsupportedOperation: `weight` is a Dual.
        ValueError: shapes do not agree, or an offset comes without a weight.
    """
    refuse_duals("add_rms_norm", _INSTEAD, weight=weight)
    shape = _common_shape("add_rms_norm", x, residual, normalized_shape)
    check_offset("add_rms_norm", weight, offset)
    if not _fusible(x, residual, shape):
        summed: Any = x if residual is None else x + residual  # type: ignore[operator]
        return rms_norm(summed, normalized_shape, weight, eps, offset=offset), summed
    if eps is None:
        eps = torch.finfo(wide_dtype(x.dtype)).eps
    return _norm(
        "add_rms_norm", x, residual, shape, weight, None, eps, offset, False, passes=residual is None
    )


def add_layer_norm(
    x: Tensor | Dual,
    residual: Tensor | Dual | None,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Any, Any]:
    """``s = x + residual`` and :func:`layer_norm` of it, in one pass over memory: the step between pre-norm blocks.

    Args:
        x: ``[*batch, *normalized_shape]``, Tensor or Dual; what a block computed.
        residual: shape and dtype of `x`, Tensor or Dual; the stream that the block is added to. None adds nothing: the
            sum is `x`, and in the backward its gradient is added to that of the norm in one pass.
        normalized_shape: as for :func:`layer_norm`, like the arguments after it.

    Returns:
        ``(normed, summed)``, both in the shape and dtype of `x`; Duals if `x` or `residual` is one (a plain one has
        tangent zero), plain tensors otherwise. Gradients of both results reach both inputs.

    Raises:
        UnsupportedOperation: `weight` or `bias` is a Dual.
        ValueError: shapes do not agree.
        RuntimeError: dtypes do not agree.
    """
    refuse_duals("add_layer_norm", _INSTEAD, weight=weight, bias=bias)
    shape = _common_shape("add_layer_norm", x, residual, normalized_shape)
    if not _fusible(x, residual, shape):
        summed: Any = x if residual is None else x + residual  # type: ignore[operator]
        return layer_norm(summed, normalized_shape, weight, bias, eps), summed
    check_dtypes("add_layer_norm", "x", (x.dtype, wide_dtype(x.dtype)), weight=weight, bias=bias)
    return _norm("add_layer_norm", x, residual, shape, weight, bias, eps, 0.0, True, passes=residual is None)


def _common_shape(
    op: str, x: Tensor | Dual, residual: Tensor | Dual | None, normalized_shape: int | Sequence[int]
) -> tuple[int, ...]:
    if residual is not None and x.shape != residual.shape:
        raise ValueError(
            f"{op}: residual must have the shape of x {tuple(x.shape)}, got {tuple(residual.shape)}: expand it."
        )
    return trailing_shape(op, x, normalized_shape)


def _fusible(x: Any, residual: Any, shape: tuple[int, ...]) -> bool:
    """Whether the sum and its norm are one kernel; several normalised axes and casts in between are rare."""
    if len(shape) > 1 or not (isinstance(x, Dual) or isinstance(residual, Dual)):
        return False
    if sharding.is_dtensor(*[t.stacked if isinstance(t, Dual) else t for t in (x, residual)]):
        return False
    if residual is not None and x.dtype != residual.dtype:
        return False
    return not autocasting(x.device.type)


def _norm(
    op: str,
    x: Tensor | Dual,
    residual: Tensor | Dual | None,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
    passes: bool = False,
) -> tuple[Dual, Any]:
    """The norm of x, or of ``x + residual`` and the sum; x itself for the sum where it `passes`."""
    check_shapes(op, shape, weight=weight, bias=bias)

    def on_shards(weight: Any, bias: Any) -> Any:
        def local(x: Dual, weight: Tensor | None, bias: Tensor | None) -> Dual:
            return _norm(op, x, None, shape, weight, bias, eps, offset, centred)[0]

        return sharding.OPS["rowwise"](op, local, x, len(shape), weight=weight, bias=bias)

    if residual is not None:
        num_tangents(x, residual)  # they must agree
    backend, operands = prepare(
        "norm",
        (stack_of(x), None if residual is None else stack_of(residual)),
        (weight, bias),
        flops=lambda x, residual, *_: (
            6.0 * x.numel() if residual is None else 7.0 * max(x.numel(), residual.numel())
        ),
        shards=on_shards if residual is None else None,
        cast=autocast_float32,
        name=op,
        kind=lambda x, residual, *_: (
            tuple([t.shape[0] for t in (x, residual) if t is not None]) + (math.prod(shape),),
            (centred, offset != 0.0, passes),
        ),
    )
    if backend == SHARDS:
        return operands, None
    stacked = operands[0]
    if len(shape) > 1:  # of x only: a sum of several normalised axes is not fused
        rows = stacked.reshape(*stacked.shape[: stacked.dim() - len(shape)], math.prod(shape))
        operands = (rows, *(None if t is None else t.reshape(-1) for t in operands[1:]))
    again = is_recomputed("norms")
    y, summed = NormFunction.apply(*operands, float(eps), float(offset), centred, backend, again, passes)
    if len(shape) > 1:
        y = y.reshape(stacked.shape)
    return Dual(y), None if summed is None else Dual(summed)
