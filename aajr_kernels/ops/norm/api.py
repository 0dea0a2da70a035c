"""The public norms: checks, backend choice, coverage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import overload

import torch
import torch.nn.functional as F

from ... import sharding
from ...autocast import autocast_float32, autocasting
from ...dual import Dual
from ...recompute import is_recomputed
from ..prepare import SHARDS, prepare
from .checks import check_dtypes, check_offset, check_shapes, refuse_dual_weights, trailing_shape, wide_dtype
from .function import NormFunction


@overload
def rms_norm(
    x: torch.Tensor,
    normalized_shape: int | Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    *,
    offset: float = 0.0,
    recompute: bool | None = None,
) -> torch.Tensor: ...
@overload
def rms_norm(
    x: Dual,
    normalized_shape: int | Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    *,
    offset: float = 0.0,
    recompute: bool | None = None,
) -> Dual: ...


def rms_norm(
    x: torch.Tensor | Dual,
    normalized_shape: int | Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    *,
    offset: float = 0.0,
    recompute: bool | None = None,
) -> torch.Tensor | Dual:
    """Root-mean-square norm ``y = (offset + w) ∘ x̂`` with ``x̂ = r x``, ``r = (mean(x²) + eps)^(-1/2)``.

    The tangent is ``ẏ = (offset + w) ∘ r(ẋ − x̂ mean(x̂∘ẋ))``.

    Args:
        x: ``[*batch, *normalized_shape]``, Tensor or Dual; float64, float32, bfloat16 or float16. Low dtypes are
            computed in float32 and rounded once.
        normalized_shape: the trailing axes that are normalised together; an int means the last axis.
        weight: ``normalized_shape`` or None, any floating dtype.
        eps: added to the mean square; None means the epsilon of float32 (of float64 for float64), as in torch.
        offset: added to the weight in float32 (Gemma's norms use 1).
        recompute: whether a linear layer that takes the result computes it again in its backward instead of keeping
            it; None: as the context :class:`aajr_kernels.recompute` says, else not.

    Returns:
        Same shape and dtype as `x`, a Dual if `x` is one. A plain `x` gives what ``torch.nn.functional.rms_norm``
        gives.

    Raises:
        UnsupportedOperation: `weight` is a Dual.
        ValueError: shapes do not agree, or an offset comes without a weight.
    """
    refuse_dual_weights("rms_norm", weight=weight)
    shape = trailing_shape("rms_norm", x, normalized_shape)
    check_offset("rms_norm", weight, offset)
    if not isinstance(x, Dual):
        if offset == 0.0:
            return F.rms_norm(x, shape, weight, eps)
        assert weight is not None
        wide = wide_dtype(x.dtype)
        return F.rms_norm(x.to(wide), shape, weight.to(wide) + offset, eps).to(x.dtype)
    if eps is None:
        eps = torch.finfo(wide_dtype(x.stacked.dtype)).eps
    return _norm("rms_norm", x, shape, weight, None, eps, offset, False, recompute)


@overload
def layer_norm(
    x: torch.Tensor,
    normalized_shape: int | Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    recompute: bool | None = None,
) -> torch.Tensor: ...
@overload
def layer_norm(
    x: Dual,
    normalized_shape: int | Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    recompute: bool | None = None,
) -> Dual: ...


def layer_norm(
    x: torch.Tensor | Dual,
    normalized_shape: int | Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    recompute: bool | None = None,
) -> torch.Tensor | Dual:
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
        recompute: as in :func:`rms_norm`.

    Returns:
        Same shape and dtype as `x`, a Dual if `x` is one. A plain `x` gives what ``torch.nn.functional.layer_norm``
        gives.

    Raises:
        UnsupportedOperation: `weight` or `bias` is a Dual.
        ValueError: shapes do not agree.
        RuntimeError: dtypes do not agree.
    """
    refuse_dual_weights("layer_norm", weight=weight, bias=bias)
    shape = trailing_shape("layer_norm", x, normalized_shape)
    if not isinstance(x, Dual):
        return F.layer_norm(x, shape, weight, bias, eps)
    if not autocasting(x.stacked.device.type):
        check_dtypes("layer_norm", x.stacked.dtype, weight=weight, bias=bias)
    return _norm("layer_norm", x, shape, weight, bias, eps, 0.0, True, recompute)


def _norm(
    op: str,
    x: Dual,
    shape: tuple[int, ...],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
    recompute: bool | None,
) -> Dual:
    check_shapes(op, shape, weight=weight, bias=bias)
    backend, operands = prepare(
        "norm",
        (x.stacked,),
        (weight, bias),
        flops=lambda x, *_: 6.0 * x.numel(),
        shards=lambda w, b: sharding.OPS["rowwise"](
            op,
            lambda x, weight, bias: _norm(op, x, shape, weight, bias, eps, offset, centred, recompute),
            x,
            len(shape),
            weight=w,
            bias=b,
        ),
        cast=autocast_float32,
        name=op,
    )
    if backend == SHARDS:
        return operands
    options = float(eps), float(offset), centred, backend, is_recomputed("norms", recompute)
    if len(shape) == 1:
        return Dual(NormFunction.apply(*operands, *options))
    stacked = operands[0]
    rows = stacked.reshape(*stacked.shape[: stacked.dim() - len(shape)], math.prod(shape))
    flat = [None if value is None else value.reshape(-1) for value in operands[1:]]
    y = NormFunction.apply(rows, *flat, *options)
    return Dual(y.reshape(stacked.shape))
