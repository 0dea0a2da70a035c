"""Rotary embedding on stacked tensors: Triton kernels, contracts as in :mod:`.reference`.

A program turns a tile of rows of the primal and of every tangent with one look at the tables. All tensors are read in
place whatever their strides; tables that broadcast have strides of zero. Neighbouring pairs are taken apart and put
together in registers.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from ...backends.triton import launch as gpu
from ...backends.triton.layout import Strides, row_axes
from ...backends.triton.replay import operator
from ...backends.triton.sums import column_sums
from . import operators
from .triton_kernels import _rotary_kernel, _rotary_tables_bwd_kernel

_PARTS = 64  # of the rows that share one row of a table, for the table's gradient


def _tile(half: int, rows: int, architecture: str) -> dict[str, int]:
    """Rows and pairs of a program's tile, and its warps."""
    block_d = max(1, triton.next_power_of_2(half))
    block_r = max(1, min(64, 1024 // block_d, triton.next_power_of_2(rows)))
    warps = 2 if architecture.startswith("gfx") else 4
    return {"BLOCK_R": block_r, "BLOCK_D": block_d, "num_warps": warps}


@operator(operators.ROTATE)
def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transposed: bool) -> Tensor:
    y = torch.empty_like(
        x
    )  # x is mostly [1 + K, B, N, H, D] seen as [1 + K, B, H, N, D], and so is the result
    half = cos.shape[-1] // 2
    if half == 0:
        return y.copy_(x)
    tables = (t.expand(*x.shape[1:-1], t.shape[-1]).unsqueeze(0) for t in (cos, sin))
    tensors = (x, y, *tables)
    rows, sizes, strides = row_axes(tensors, 1)
    if rows == 0:
        return y
    rest = x.shape[-1] - 2 * half
    tile = _tile(half, rows, gpu.architecture(x.device))
    gpu.launch(
        _rotary_kernel,
        (triton.cdiv(rows, tile["BLOCK_R"]),),
        x.device,
        *tensors,
        *strides,
        sizes,
        rows,
        x.shape[-1],
        half,
        S=x.shape[0],
        INTERLEAVED=interleaved,
        TRANSPOSED=transposed,
        BLOCK_REST=triton.next_power_of_2(rest) if rest else 0,
        **tile,
    )
    return y


@operator(operators.ROTARY_TABLES_BWD)
def rotary_tables_bwd(
    y_bar: Tensor, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    batch, turned = x.shape[1:-1], cos.shape[-1]
    shapes = [(1,) * (len(batch) + 1 - t.dim()) + tuple(t.shape[:-1]) for t in (cos, sin)]
    # axes along which one of the tables varies are kept, the kernel sums over the others
    kept = [axis for axis, sizes in enumerate(zip(*shapes)) if max(sizes) > 1]
    summed = [axis for axis in range(len(batch)) if axis not in kept]
    rows, others = (math.prod(batch[axis] for axis in axes) for axes in (kept, summed))
    shape = tuple(size if axis in kept else 1 for axis, size in enumerate(batch))
    if x.numel() == 0 or turned == 0:
        return torch.zeros_like(cos), torch.zeros_like(sin)
    tile = _tile(turned // 2, rows, gpu.architecture(x.device))
    parts = min(others, _PARTS, max(1, 1024 * tile["BLOCK_R"] // rows))
    partial = [torch.empty((parts, rows * turned), dtype=torch.float32, device=x.device) for _ in "cs"]
    kept_sizes, kept_strides = _axes((y_bar, x), summed)
    summed_sizes, summed_strides = _axes((y_bar, x), kept)
    strides = [
        (t.stride(0), *a, *b, t.stride(-1)) for t, a, b in zip((y_bar, x), kept_strides, summed_strides)
    ]
    gpu.launch(
        _rotary_tables_bwd_kernel,
        (triton.cdiv(rows, tile["BLOCK_R"]), parts),
        x.device,
        y_bar,
        x,
        *partial,
        *strides,
        kept_sizes,
        summed_sizes,
        rows,
        others,
        triton.cdiv(others, parts),
        turned // 2,
        S=x.shape[0],
        KEPT=len(kept_sizes),
        INTERLEAVED=interleaved,
        **tile,
    )
    bars = [(t[0] if parts == 1 else column_sums(t)).view(*shape, turned) for t in partial]
    return _shaped(bars[0], cos), _shaped(bars[1], sin)


def _axes(tensors: tuple[Tensor, ...], left_out: list[int]) -> tuple[Strides, list[Strides]]:
    """Sizes and strides of the batch axes but some, merged where they follow each other in memory."""
    for axis in reversed(left_out):
        tensors = tuple(t.select(1 + axis, 0) for t in tensors)
    _, sizes, strides = row_axes(tensors)
    return sizes, [s[1:-1] for s in strides]


def _shaped(bar: Tensor, table: Tensor) -> Tensor:
    return bar.sum_to_size(table.shape).to(table.dtype)
