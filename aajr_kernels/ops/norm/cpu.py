"""RMS norm and layer norm on stacked rows: native CPU kernels, contracts as in :mod:`.reference`."""

from __future__ import annotations

import math

import torch

from ...backends.cpu import call, empty, operator, rows
from . import operators


@operator(operators.NORM_FWD)
def norm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = empty(x.shape, dtype=x.dtype)
    shape = (2 * x.shape[0] if centred else x.shape[0], math.prod(x.shape[1:-1]))
    stats = torch.empty(shape, dtype=torch.float32)
    tensors = (
        optional_rows(x),
        optional_rows(y),
        stats,
        optional_rows(weight),
        optional_rows(bias),
        None,
        None,
    )
    call("norm_fwd", tensors, (centred,), (eps, offset))
    return y, stats


@operator(operators.ADD_NORM_FWD)
def add_norm_fwd(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    stacks = max(x.shape[0], residual.shape[0])
    y, summed = (empty((stacks, *x.shape[1:]), dtype=x.dtype) for _ in range(2))
    shape = (2 * stacks if centred else stacks, math.prod(x.shape[1:-1]))
    stats = torch.empty(shape, dtype=torch.float32)
    tensors = (
        optional_rows(x),
        optional_rows(y),
        stats,
        optional_rows(weight),
        optional_rows(bias),
        optional_rows(residual),
        optional_rows(summed),
    )
    call("norm_fwd", tensors, (centred,), (eps, offset))
    return y, summed, stats


@operator(operators.NORM_BWD)
def norm_bwd(
    y_bar: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    stats: torch.Tensor,
    offset: float,
    centred: bool,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    sum_bar: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    x_bar = empty(x.shape, dtype=x.dtype) if need_x else None
    w_bar = torch.empty(x.shape[-1], dtype=torch.float32) if need_weight else None
    b_bar = torch.empty(x.shape[-1], dtype=torch.float32) if need_bias else None
    tensors = (
        optional_rows(y_bar),
        optional_rows(x),
        optional_rows(weight),
        stats,
        optional_rows(x_bar),
        w_bar,
        b_bar,
        optional_rows(sum_bar),
    )
    call("norm_bwd", tensors, (centred,), (offset,))
    return x_bar, w_bar, b_bar


def optional_rows(x: torch.Tensor | None) -> torch.Tensor | None:
    """:func:`..native.rows` of what may be missing."""
    return None if x is None else rows(x)
