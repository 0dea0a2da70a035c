"""RMS norm and layer norm on stacked rows: CUDA C++ kernels, contracts as in :mod:`.reference`."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ...backends import cuda
from ...backends.cpu import is_dry
from . import operators
from .cpu import forward, optional_rows

#: blocks on each multiprocessor that share the rows of a backward with parameter gradients
_BLOCKS = 4


@cuda.operator(operators.NORM_FWD)
def norm_fwd(x: Tensor, *operands: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    return forward(cuda.call, functools.partial(torch.empty, device=x.device), x, *operands)


@cuda.operator(operators.NORM_BWD)
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
    x_bar = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else None
    rows, size = math.prod(x.shape[1:-1]), x.shape[-1]
    # while torch.compile traces, rows are a symbol, and a look at its value would compile for that value
    dry = is_dry()
    blocks = 1 if dry else max(1, min(rows, _BLOCKS * cuda.multiprocessors(x.device)))
    # nothing is launched without rows
    new = functools.partial(torch.empty if dry or rows else torch.zeros, dtype=torch.float32, device=x.device)
    w_bar, w_parts = (new((size,)), new((blocks, size))) if need_weight else (None, None)
    b_bar, b_parts = (new((size,)), new((blocks, size))) if need_bias else (None, None)
    tensors = (y_bar, x, weight, stats, x_bar, w_bar, b_bar, sum_bar, w_parts, b_parts)
    cuda.call("norm_bwd", tuple(map(optional_rows, tensors)), (centred,), (offset,))
    return x_bar, w_bar, b_bar
