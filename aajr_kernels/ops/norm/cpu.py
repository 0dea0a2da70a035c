"""RMS norm and layer norm on stacked rows: native CPU kernels, contracts as in :mod:`.reference`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...backends.cpu import call, empty, operator, rows
from . import operators


@operator(operators.NORM_FWD)
def norm_fwd(x: Tensor, *operands: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    return forward(call, empty, x, *operands)


def forward(
    call: Callable[..., None],
    empty: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The forward by the entry point ``norm_fwd``, which both compiled modules have; `empty` allocates its results."""
    stacks = x.shape[0] if residual is None else max(x.shape[0], residual.shape[0])
    y = empty((stacks, *x.shape[1:]), dtype=x.dtype)
    stats = empty((2 * stacks if centred else stacks, math.prod(x.shape[1:-1])), dtype=torch.float32)
    summed = None if residual is None else empty(y.shape, dtype=x.dtype)
    tensors = (x, y, stats, weight, bias, residual, summed)
    call("norm_fwd", tuple(map(optional_rows, tensors)), (centred,), (eps, offset))
    return y, stats, summed


@operator(operators.NORM_BWD)
def norm_bwd(
    y_bar: Tensor,
    x: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    offset: float,
    centred: bool,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    sum_bar: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x_bar = empty(x.shape, dtype=x.dtype) if need_x else None
    w_bar, b_bar = (
        torch.empty(x.shape[-1], dtype=torch.float32) if need else None for need in (need_weight, need_bias)
    )
    tensors = (y_bar, x, weight, stats, x_bar, w_bar, b_bar, sum_bar)
    call("norm_bwd", tuple(map(optional_rows, tensors)), (centred,), (offset,))
    return x_bar, w_bar, b_bar


def optional_rows(x: Tensor | None) -> Tensor | None:
    """:func:`.cpu.rows` of what may be missing."""
    return None if x is None else rows(x)
