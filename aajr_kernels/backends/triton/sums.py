"""Sums over rows in a fixed order: of few rows at once, else of parts of the rows, and then of the parts."""

from __future__ import annotations

import torch
import triton

from . import launch as gpu
from .layout import row_axes
from .replay import replayed
from .rows import column_sum_kernel

# constants, so that the order depends on nothing but the sizes: parts of the rows, at most, and the rows of one pass
_PARTS, _ROWS = 256, 1024


@replayed
def column_sums(x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``[C]`` sums of the rows of ``[*batch, C]``, added in float32 in an order that depends only on the sizes.

    Args:
        x: float32, bfloat16 or float16, any strides.
        dtype: of the result.
    """
    cols = x.shape[-1]
    rows, sizes, (strides,) = row_axes((x.unsqueeze(0),), 0)
    if rows == 0 or cols == 0:
        return torch.zeros(cols, dtype=dtype, device=x.device)
    few = rows <= _ROWS
    # in one pass narrow blocks, for enough programs
    block_c = min(32 if few else 128, max(16, triton.next_power_of_2(cols)))
    block_r = 2048 // block_c
    parts = 1 if few else min(_PARTS, triton.cdiv(rows, 4 * block_r))
    out = torch.empty((parts, cols), dtype=torch.float32 if parts > 1 else dtype, device=x.device)
    gpu.launch(
        column_sum_kernel,
        (triton.cdiv(cols, block_c), parts),
        x.device,
        x,
        out,
        strides,
        sizes,
        rows,
        cols,
        triton.cdiv(rows, parts),
        BLOCK_R=block_r,
        BLOCK_C=block_c,
    )
    return out[0] if parts == 1 else column_sums(out, dtype)
