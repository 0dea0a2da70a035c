"""The public linear layer: checks, backend choice, coverage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
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
    return projections(x, [(weight, bias)])[0]


def projections(x: Any, layers: Sequence[tuple[Tensor, Tensor | None]]) -> list[Any]:
    """Several linear layers of one input, such as queries, keys and values, whose gradient gathers in one buffer.

    Args:
        x: as for :func:`linear`.
        layers: the weight and the bias, or None, of each, as for :func:`linear`.

    Returns:
        What :func:`linear` gives for each. Its errors are the same.
    """
    for weight, bias in layers:
        if isinstance(weight, Dual) or isinstance(bias, Dual):
            refuse_duals("linear", "write it as torch.matmul and +", weight=weight, bias=bias)
    if not isinstance(x, Dual):
        return [F.linear(x, weight, bias) for weight, bias in layers]
    shape = x.shape
    for weight, bias in layers:
        _check_shapes(shape, weight, bias)
    backend, operands = prepare(
        "linear",
        (x.stacked,),
        tuple([parameter for layer in layers for parameter in layer]),
        flops=lambda x, *p: 2.0 * x.numel() * sum(w.shape[0] if w.dim() == 2 else 1 for w in p[::2]),
        shards=lambda *p: [sharding.OPS["linear"](linear, x, w, b) for w, b in zip(p[::2], p[1::2])],
        cast=autocast_low,
        kind=lambda x, *p: ((x.shape[0], p[0].shape[0]), (any(bias is not None for bias in p[1::2]),)),
    )
    if backend == SHARDS:
        return operands
    stacked, *parameters = operands
    dtype, vectors = stacked.dtype, []
    for i in range(0, len(parameters), 2):
        weight, bias = parameters[i : i + 2]
        if weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
            check_dtypes("linear", "x", (dtype,), weight=weight, bias=bias)
        if weight.dim() == 1:  # a matrix of one row, whose axis the result does not have
            vectors.append(i // 2)
            parameters[i : i + 2] = weight.unsqueeze(0), None if bias is None else bias.unsqueeze(0)
    made = LinearFunction.apply(stacked, backend, *parameters)
    results = list(made) if len(layers) > 1 else [made]
    for i in vectors:
        results[i] = results[i].squeeze(-1)
    return [Dual(y) for y in results]


def _check_shapes(shape: torch.Size, weight: Tensor, bias: Tensor | None) -> None:
    if not shape or weight.dim() not in (1, 2) or weight.shape[-1] != shape[-1]:
        raise ValueError(
            f"linear: weight must be [out, {shape[-1] if shape else 'in'}] for x of shape {tuple(shape)}, got "
            f"{tuple(weight.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:-1]:
        raise ValueError(
            f"linear: bias must have shape {tuple(weight.shape[:-1])} for weight {tuple(weight.shape)}, got "
            f"{tuple(bias.shape)}."
        )
