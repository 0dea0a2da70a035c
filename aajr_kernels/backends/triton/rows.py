"""Device functions of kernels that work on rows, and the kernel that adds rows up."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_offsets(row, sizes, strides):
    """Offsets of rows within the first of the stacked tensors; `sizes`, `strides` as :func:`row_axes` gives them."""
    offset = row.to(tl.int64) * 0
    for i in tl.static_range(len(sizes) - 1, 0, -1):
        size = sizes[i] >> 1
        offset += (row % size).to(tl.int64) * strides[i + 1]
        row = row // size
    return offset + row.to(tl.int64) * strides[1]


@triton.jit
def read(pointer, offset, mask):
    """Numbers in float32, zero where masked."""
    return tl.load(pointer + offset, mask, 0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "rows_per_part"])
def column_sum_kernel(
    x, out,
    strides, sizes, rows, cols, rows_per_part,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    col = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    first = part * rows_per_part
    last = tl.minimum(first + rows_per_part, rows)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)[:, None]
        offset = row_offsets(row, sizes, strides) + col * strides[-1]
        total += tl.load(x + offset, (row < last) & (col < cols), 0.0).to(tl.float32)
    total = tl.sum(total, 0)[None, :]
    tl.store(out + part.to(tl.int64) * cols + col, total, col < cols)
