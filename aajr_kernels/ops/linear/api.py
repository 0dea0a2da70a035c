"""The public linear layer: checks, backend choice, coverage."""

from __future__ import annotations

from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor

from ... import sharding
from ...autocast import autocast_low
from ...dual import Dual
from ..checks import check_dtypes, refuse_duals
from ..prepare import SHARDS, prepare
from .function import LinearFunction

_T = TypeVar("_T", Tensor, Dual)


def linear(x: _T, weight: Tensor, bias: Tensor | None = None) -> _T:
    """Affine map ``y = x Wᵀ + b`` with tangent ``ẏ = ẋ Wᵀ``, as one matrix product over the stacked rows.

    Args:
        x: ``[*batch, in]``, Tensor or Dual, any number of leading axes; float64, float32, bfloat16 or float16.
        weight: ``[out, in]`` (or ``[in]``, which drops the last axis of the result), dtype of `x`.
        bias: ``[out]`` or None, dtype of `x`.

    Returns:
        ``[*batch, out]``, a Dual if `x` is one. The weight gradient is ``ȳᵀx + Σ_k ẏ̄_kᵀẋ_k``, the bias gradient sums
        the primal's cotangent only. A plain `x` gives what ``torch.nn.functional.linear`` gives.

    Raises:
        UnsupportedOperation: `weight` or `bias` is a Dual.
        ValueError: shapes do not agree.
        RuntimeError: dtypes do not agree (under autocast all are cast to its low dtype first).
    """
    refuse_duals("linear", "write it as torch.matmul and +", weight=weight, bias=bias)
    if not isinstance(x, Dual):
        return F.linear(x, weight, bias)
    if x.dim() < 1 or weight.dim() not in (1, 2) or weight.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"linear: weight must be [out, {x.shape[-1] if x.dim() else 'in'}] for x of shape {tuple(x.shape)}, got "
            f"{tuple(weight.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:-1]:
        raise ValueError(
            f"linear: bias must have shape {tuple(weight.shape[:-1])} for weight {tuple(weight.shape)}, got "
            f"{tuple(bias.shape)}."
        )
    backend, operands = prepare(
        "linear",
        (x.stacked,),
        (weight, bias),
        flops=lambda x, w, _: 2.0 * x.numel() * (w.shape[0] if w.dim() == 2 else 1),
        shards=lambda w, b: sharding.OPS["linear"](linear, x, w, b),
        cast=autocast_low,
        kind=lambda x, weight, bias: ((x.shape[0], weight.shape[0]), (bias is not None,)),
    )
    if backend == SHARDS:
        return operands
    stacked, weight, bias = operands
    check_dtypes("linear", "x", (stacked.dtype,), weight=weight, bias=bias)
    if weight.dim() == 1:
        rows = None if bias is None else bias.unsqueeze(0)
        return Dual(LinearFunction.apply(stacked, weight.unsqueeze(0), rows, backend).squeeze(-1))
    return Dual(LinearFunction.apply(stacked, weight, bias, backend))
