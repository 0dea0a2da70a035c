"""Rules of the normalisation layers: layer, RMS, group, instance and batch norm.

All statistics go through the fused layer and RMS norm of :mod:`aajr_kernels.ops.norm`, whose backward is derived by
hand: PyTorch's own reverse-over-forward through layer and batch norm is wrong. Group, instance and batch norm are a
layer norm over other axes followed by an affine map per channel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from ..backends.errors import UnsupportedOperation
from ..ops import norm
from ..torch_private import BATCH_NORM_WITH_UPDATE
from .common import is_dual, primal_of
from .registry import rule


@rule("layer_norm", kind="op")
def _layer_norm(
    x: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    if is_dual(weight) or is_dual(bias):
        y = norm.layer_norm(x, normalized_shape, None, None, eps)
        return _affine(y, weight, bias)
    return norm.layer_norm(x, normalized_shape, weight, bias, eps)


@rule("rms_norm", kind="op")
def _rms_norm(x: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    if is_dual(weight):
        return _affine(norm.rms_norm(x, normalized_shape, None, eps), weight, None)
    return norm.rms_norm(x, normalized_shape, weight, eps)


def _affine(y: Any, weight: Any, bias: Any) -> Any:
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _per_channel(y: Any, weight: Any, bias: Any) -> Any:
    """weight and bias ``[C]`` along axis 1 of `y`."""
    trailing = (1,) * (y.dim() - 2)
    weight = None if weight is None else weight.reshape(-1, *trailing)
    bias = None if bias is None else bias.reshape(-1, *trailing)
    return _affine(y, weight, bias)


@rule("group_norm", kind="op")
def _group_norm(
    x: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    if x.dim() < 2 or x.shape[1] % num_groups:
        raise ValueError(
            f"input of group_norm must be [B, C, ...] with C divisible by num_groups ({num_groups}), got "
            f"{tuple(x.shape)}."
        )
    if is_dual(x):
        size = math.prod(x.shape[1:]) // num_groups
        rows = x.reshape(x.shape[0], num_groups, size)
        y = norm.layer_norm(rows, (size,), None, None, eps).reshape(x.shape)
    else:
        y = F.group_norm(x, num_groups, None, None, eps)
    return _per_channel(y, weight, bias)


def _channel_norm(x: Any, eps: float) -> Any:
    """Batch norm without its affine map: every channel (axis 1) normalised over all other axes."""
    channels_first = x.transpose(0, 1)
    shape = channels_first.shape
    count = math.prod(shape[1:])
    if count <= 1:
        raise ValueError(
            f"batch_norm needs more than one value per channel in training, got {tuple(x.shape)}."
        )
    rows = channels_first.reshape(shape[0], count)
    return norm.layer_norm(rows, (count,), None, None, eps).reshape(shape).transpose(0, 1)


def _with_statistics(
    x: Any, mean: torch.Tensor | None, var: torch.Tensor | None, eps: float, condition: str
) -> Any:
    """Normalised by given statistics ``[C]``, constants of the derivative: affine in `x`."""
    if mean is None or var is None:
        raise ValueError(f"running_mean and running_var must be given when {condition}.")
    trailing = (1,) * (x.dim() - 2)
    scale = (var + eps).rsqrt().to(x.dtype).reshape(-1, *trailing)
    return (x - mean.to(x.dtype).reshape(-1, *trailing)) * scale


def _refuse_dual_statistics(*statistics: Any) -> None:
    if any(is_dual(s) for s in statistics):
        raise UnsupportedOperation("running_mean and running_var must be plain tensors, got a Dual.")


@rule(F.batch_norm, kind="op")
def _batch_norm(
    x: Any,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    _refuse_dual_statistics(running_mean, running_var)
    if not is_dual(x):
        return _per_channel(
            F.batch_norm(x, running_mean, running_var, None, None, training, momentum, eps), weight, bias
        )
    if not training:
        y = _with_statistics(x, running_mean, running_var, eps, "training=False")
        return _per_channel(y, weight, bias)
    y = _channel_norm(x, eps)
    if running_mean is not None or running_var is not None:
        with torch.no_grad():  # torch itself updates the statistics, once, from the primal
            torch.batch_norm(x.primal, None, None, running_mean, running_var, True, momentum, eps, False)
    return _per_channel(y, weight, bias)


rule(torch.batch_norm, kind="op")(
    lambda x, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled: _batch_norm(
        x, running_mean, running_var, weight, bias, training, momentum, eps
    )
)


@rule(F.instance_norm, kind="op")
def _instance_norm(
    x: Any,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    _refuse_dual_statistics(running_mean, running_var)
    if not use_input_stats:
        y = _with_statistics(x, running_mean, running_var, eps, "use_input_stats=False")
        return _per_channel(y, weight, bias)
    size = math.prod(x.shape[2:])
    if size <= 1:
        raise ValueError(
            f"instance_norm needs more than one value per channel and row, got {tuple(x.shape)}."
        )
    if running_mean is not None or running_var is not None:
        with torch.no_grad():
            torch.instance_norm(
                primal_of(x).detach(), None, None, running_mean, running_var, True, momentum, eps, False
            )
    return _group_norm(x, x.shape[1], weight, bias, eps)


rule(torch.instance_norm, kind="op")(
    lambda x, weight, bias, running_mean, running_var, use_input_stats, momentum, eps, cudnn_enabled: (
        _instance_norm(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    )
)

# -- the operators behind the layers, which return their statistics too --------------------------------------------


def _statistics(x: Any, dims: Any, keepdim: bool, eps: float) -> tuple[Any, Any]:
    """Mean and reciprocal deviation."""
    return x.mean(dims, keepdim), (x.var(dims, correction=0, keepdim=keepdim) + eps).rsqrt()


@rule("native_layer_norm", kind="op")
def _native_layer_norm(
    x: Any, normalized_shape: Any, weight: Any, bias: Any, eps: float
) -> tuple[Any, Any, Any]:
    axes = tuple(range(-len(normalized_shape), 0))
    return (_layer_norm(x, normalized_shape, weight, bias, eps), *_statistics(x, axes, True, eps))


@rule("native_group_norm", kind="op")
def _native_group_norm(
    x: Any, weight: Any, bias: Any, N: int, C: int, HxW: int, group: int, eps: float
) -> tuple[Any, Any, Any]:
    out = _group_norm(x, group, weight, bias, eps)
    return (out, *_statistics(x.reshape(N, group, C // group * HxW), -1, False, eps))


@rule("native_batch_norm", "_native_batch_norm_legit", kind="op")
def _native_batch_norm(x: Any, weight: Any, bias: Any, *rest: Any) -> tuple[Any, Any, Any]:
    running_mean, running_var, training, momentum, eps = (None, None, *rest) if len(rest) == 3 else rest
    out = _batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if not training:
        empty = x.new_empty(0)
        return (out, *((empty.primal if is_dual(empty) else empty,) * 2))
    return (out, *_statistics(x, (0, *range(2, x.dim())), False, eps))


@rule(BATCH_NORM_WITH_UPDATE, BATCH_NORM_WITH_UPDATE.default, kind="op")
def _batch_norm_with_update(
    x: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, momentum: float, eps: float
) -> tuple[Any, Any, Any, torch.Tensor]:
    result = _native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
    return (*result, torch.empty(0, dtype=torch.uint8, device=x.device))
