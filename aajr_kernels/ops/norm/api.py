"""The public norms: checks, backend choice, coverage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import overload

import torch
import torch.nn.functional as F

from ... import runtime
from ...dual import Dual, is_dual
from .function import NormFunction


@overload
def rms_norm(
    x: torch.Tensor,
    normalized_shape: int | Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    *,
    offset: float = 0.0,
) -> torch.Tensor: ...
@overload
def rms_norm(
    x: Dual,
    normalized_shape: int | Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    *,
    offset: float = 0.0,
) -> Dual: ...


def rms_norm(
    x: torch.Tensor | Dual,
    normalized_shape: int | Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    *,
    offset: float = 0.0,
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

    Returns:
        Same shape and dtype as `x`, a Dual if `x` is one. A plain `x` gives what ``torch.nn.functional.rms_norm``
        gives.

    Raises:
        UnsupportedOperation: `weight` is a Dual.
        ValueError: shapes do not agree, or an offset comes without a weight.
    """
    _refuse_dual_weights("rms_norm", weight=weight)
    shape = _shape("rms_norm", x, normalized_shape)
    if weight is None and offset != 0.0:
        raise ValueError(f"rms_norm: offset is {offset} but weight is None: an offset is added to a weight.")
    if not isinstance(x, Dual):
        if offset == 0.0:
            return F.rms_norm(x, shape, weight, eps)
        assert weight is not None
        wide = _wide(x.dtype)
        return F.rms_norm(x.to(wide), shape, weight.to(wide) + offset, eps).to(x.dtype)
    if eps is None:
        eps = torch.finfo(_wide(x.stacked.dtype)).eps
    return _norm("rms_norm", x, shape, weight, None, eps, offset, False)


@overload
def layer_norm(
    x: torch.Tensor,
    normalized_shape: int | Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor: ...
@overload
def layer_norm(
    x: Dual,
    normalized_shape: int | Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> Dual: ...


def layer_norm(
    x: torch.Tensor | Dual,
    normalized_shape: int | Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor | Dual:
    """Layer norm ``y = w ∘ x̂ + b`` with ``x̂ = r(x − mean(x))``, ``r = (var(x) + eps)^(-1/2)``.

    The tangent is ``ẏ = w ∘ r(ẋc − x̂ mean(x̂∘ẋc))`` with ``ẋc = ẋ − mean(ẋ)``. Its gradient is exact, where PyTorch's
    reverse-over-forward through ``torch.nn.functional.layer_norm`` is not.

    Args:
        x: ``[*batch, *normalized_shape]``, Tensor or Dual; float64, float32, bfloat16 or float16. Low dtypes are
            computed in float32 and rounded once.
        normalized_shape: the trailing axes that are normalised together; an int means the last axis.
        weight: ``normalized_shape`` or None; dtype of `x`, or float32 beside a low-precision `x`.
        bias: like `weight`; joins the primal alone.
        eps: added to the variance.

    Returns:
        Same shape and dtype as `x`, a Dual if `x` is one. A plain `x` gives what ``torch.nn.functional.layer_norm``
        gives.

    Raises:
        UnsupportedOperation: `weight` or `bias` is a Dual.
        ValueError: shapes do not agree.
        RuntimeError: dtypes do not agree.
    """
    _refuse_dual_weights("layer_norm", weight=weight, bias=bias)
    shape = _shape("layer_norm", x, normalized_shape)
    if not isinstance(x, Dual):
        return F.layer_norm(x, shape, weight, bias, eps)
    dtype, autocast = x.stacked.dtype, torch.is_autocast_enabled(x.stacked.device.type)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and not autocast and value.dtype not in (dtype, _wide(dtype)):
            raise RuntimeError(
                f"layer_norm: {name} must have the dtype of x ({dtype}), got {value.dtype}: cast one of them."
            )
    return _norm("layer_norm", x, shape, weight, bias, eps, 0.0, True)


def _norm(
    op: str,
    x: Dual,
    shape: tuple[int, ...],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
) -> Dual:
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.shape != shape:
            raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(value.shape)}.")
    stacked, weight, bias = runtime.autocast_float32(x.stacked, weight, bias)
    backend = runtime.select_backend("norm", stacked, weight, bias)
    if runtime.recording():
        runtime.record(op, backend, 6.0 * stacked.numel())
    if len(shape) == 1:
        return Dual(NormFunction.apply(stacked, weight, bias, float(eps), float(offset), centred, backend))
    rows = stacked.reshape(*stacked.shape[: stacked.dim() - len(shape)], math.prod(shape))
    flat = [None if value is None else value.reshape(-1) for value in (weight, bias)]
    y = NormFunction.apply(rows, *flat, float(eps), float(offset), centred, backend)
    return Dual(y.reshape(stacked.shape))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _shape(op: str, x: torch.Tensor | Dual, normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape or len(shape) > x.dim() or tuple(x.shape[x.dim() - len(shape) :]) != shape:
        raise ValueError(
            f"{op}: normalized_shape must be the trailing axes of x, whose shape is {tuple(x.shape)}, got {shape}."
        )
    return shape


def _refuse_dual_weights(op: str, **weights: object) -> None:
    for name, value in weights.items():
        if is_dual(value):
            raise runtime.UnsupportedOperation(
                f"{op}: {name} is a Dual, and this op takes plain weights: call it without {name} and apply {name} "
                f"with * or +, or pass {name}.primal where no tangent is wanted."
            )
