"""Rotary embedding on stacked tensors: native CPU kernels, contracts as in :mod:`.reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.cpu import MAX_AXES, call, empty_like, operator, row_dense
from . import operators


@operator(operators.ROTARY_TABLES_BWD)
def rotary_tables_bwd(
    y_bar: Tensor, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    if x.dim() > MAX_AXES:
        shape = (*x.shape[1:-1], cos.shape[-1])
        rows_cos, rows_sin = (t.expand(shape).flatten(0, -2) for t in (cos, sin))
        bars = rotary_tables_bwd(y_bar.flatten(1, -2), x.flatten(1, -2), rows_cos, rows_sin, interleaved)
        cos_bar, sin_bar = (bar.view(shape) for bar in bars)
    else:
        cos_bar, sin_bar = (torch.empty(cos.shape, dtype=torch.float32) for _ in "cs")
        call("rotary_tables", (row_dense(y_bar), row_dense(x), cos_bar, sin_bar), (interleaved,))
    return cos_bar.sum_to_size(cos.shape).to(cos.dtype), sin_bar.sum_to_size(sin.shape).to(sin.dtype)


@operator(operators.ROTATE)
def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transposed: bool) -> Tensor:
    x = row_dense(x)
    y = empty_like(x)  # x is mostly [1 + K, B, N, H, D] seen as [1 + K, B, H, N, D], and so is the result
    if y.shape[-1] > 1 and y.stride(-1) != 1:  # heads of stride 0, for instance
        y = empty_like(x, memory_format=torch.contiguous_format)
    if cos.dtype != sin.dtype:
        cos, sin = cos.float(), sin.float()
    rows = (x, y)
    if x.dim() > MAX_AXES:
        shape = (*x.shape[1:-1], cos.shape[-1])
        cos, sin = (t.expand(shape).flatten(0, -2) for t in (cos, sin))
        y = empty_like(x, memory_format=torch.contiguous_format)
        rows = (x.flatten(1, -2), y.flatten(1, -2))
    call("rotary", (*rows, row_dense(cos), row_dense(sin)), (interleaved, transposed))
    return y
