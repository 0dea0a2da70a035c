"""RMS norm and layer norm on stacked rows: CUDA C++ kernels, contracts as in :mod:`.reference`."""

from __future__ import annotations

import functools
import math

import torch

from ...backends import cuda
from ...backends.cpu import is_dry
from . import operators
from .cpu import optional_rows

#: blocks on each multiprocessor that share the rows of a backward with parameter gradients
_BLOCKS = 4


@cuda.operator(operators.NORM_FWD)
def norm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    y, _, stats = _forward(x, None, weight, bias, eps, offset, centred)
    return y, stats


@cuda.operator(operators.ADD_NORM_FWD)
def add_norm_fwd(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, summed, stats = _forward(x, residual, weight, bias, eps, offset, centred)
    assert summed is not None  # there is a residual
    return y, summed, stats


def _forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    stacks = max(x.shape[0], 0 if residual is None else residual.shape[0])
    y = torch.empty((stacks, *x.shape[1:]), dtype=x.dtype, device=x.device)
    summed = None if residual is None else torch.empty_like(y)
    shape = (2 * stacks if centred else stacks, math.prod(x.shape[1:-1]))
    stats = torch.empty(shape, dtype=torch.float32, device=x.device)
    tensors = (
        *map(optional_rows, (x, y)),
        stats,
        _dense(weight),
        _dense(bias),
        optional_rows(residual),
        optional_rows(summed),
    )
    cuda.call("norm_fwd", tensors, (centred,), (eps, offset))
    return y, summed, stats


@cuda.operator(operators.NORM_BWD)
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
    x_bar = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else None
    rows, size = math.prod(x.shape[1:-1]), x.shape[-1]
    # while torch.compile traces, rows are a symbol, and a look at its value would compile for that value
    dry = is_dry()
    blocks = 1 if dry else max(1, min(rows, _BLOCKS * cuda.multiprocessors(x.device)))
    # nothing is launched without rows
    new = functools.partial(torch.empty if dry or rows else torch.zeros, dtype=torch.float32, device=x.device)
    w_bar, w_parts = (new((size,)), new((blocks, size))) if need_weight else (None, None)
    b_bar, b_parts = (new((size,)), new((blocks, size))) if need_bias else (None, None)
    tensors = (
        optional_rows(y_bar),
        optional_rows(x),
        _dense(weight),
        stats,
        optional_rows(x_bar),
        w_bar,
        b_bar,
        optional_rows(sum_bar),
    )
    cuda.call("norm_bwd", (*tensors, w_parts, b_parts), (centred,), (offset,))
    return x_bar, w_bar, b_bar


def _dense(parameter: torch.Tensor | None) -> torch.Tensor | None:
    return None if parameter is None else parameter.contiguous()
