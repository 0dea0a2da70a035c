"""The kernel of the bias; see :mod:`.triton`."""

from __future__ import annotations

import triton
import triton.language as tl

from ...backends.triton.rows import read


@triton.jit(do_not_specialize=["rows"])
def _linear_bias_kernel(y, bias, bias_step, rows, cols, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    blocks = tl.cdiv(cols, BLOCK_C)
    row = tl.program_id(0) // blocks * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    col = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = (row < rows) & (col < cols)
    at = row.to(tl.int64) * cols + col
    out = read(y, at, inside) + read(bias, col * bias_step, col < cols)
    tl.store(y + at, out.to(y.dtype.element_ty), inside)
