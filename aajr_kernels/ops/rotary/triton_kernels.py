"""Kernels of the rotary embedding; see :mod:`.triton`."""

from __future__ import annotations

import triton
import triton.language as tl

from ...backends.triton.rows import read, row_offsets


@triton.jit
def _read_pair(pointer, row_at, half, turned, mask, step, INTERLEAVED: tl.constexpr, BLOCK_D: tl.constexpr):
    """First and second members of the pairs of a tile of rows, in float32."""
    if INTERLEAVED:
        both = tl.arange(0, 2 * BLOCK_D)[None, :]
        pairs = read(pointer, row_at + both * step, mask & (both < turned))
        return tl.split(tl.reshape(pairs, (mask.shape[0], BLOCK_D, 2)))
    else:
        d = tl.arange(0, BLOCK_D)[None, :]
        inside = mask & (d < half)
        return read(pointer, row_at + d * step, inside), read(pointer, row_at + (d + half) * step, inside)


@triton.jit
def _write_pair(
    pointer, row_at, first, second, half, turned, mask, step, INTERLEAVED: tl.constexpr, BLOCK_D: tl.constexpr
):
    if INTERLEAVED:
        both = tl.arange(0, 2 * BLOCK_D)[None, :]
        pairs = tl.reshape(tl.join(first, second), (mask.shape[0], 2 * BLOCK_D))
        tl.store(pointer + row_at + both * step, pairs.to(pointer.dtype.element_ty), mask & (both < turned))
    else:
        d = tl.arange(0, BLOCK_D)[None, :]
        inside = mask & (d < half)
        tl.store(pointer + row_at + d * step, first.to(pointer.dtype.element_ty), inside)
        tl.store(pointer + row_at + (d + half) * step, second.to(pointer.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows"])
def _rotary_kernel(
    x, y, cos, sin,
    x_strides, y_strides, cos_strides, sin_strides, sizes, rows, size, half,
    S: tl.constexpr, INTERLEAVED: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """`size` features, the first ``2 half`` of them turned; BLOCK_REST is 0 where these are all."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    known, turned = row < rows, 2 * half
    x_at, y_at = row_offsets(row, sizes, x_strides), row_offsets(row, sizes, y_strides)
    cos_at, sin_at = row_offsets(row, sizes, cos_strides), row_offsets(row, sizes, sin_strides)
    c1, c2 = _read_pair(cos, cos_at, half, turned, known, cos_strides[-1], INTERLEAVED, BLOCK_D)
    s1, s2 = _read_pair(sin, sin_at, half, turned, known, sin_strides[-1], INTERLEAVED, BLOCK_D)
    if TRANSPOSED:
        s1, s2 = -s2, -s1
    for s in tl.static_range(S):
        if s > 0:
            x_at += x_strides[0]
            y_at += y_strides[0]
        x1, x2 = _read_pair(x, x_at, half, turned, known, x_strides[-1], INTERLEAVED, BLOCK_D)
        y1, y2 = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
        _write_pair(y, y_at, y1, y2, half, turned, known, y_strides[-1], INTERLEAVED, BLOCK_D)
        if BLOCK_REST > 0:
            d = turned + tl.arange(0, BLOCK_REST)[None, :]
            inside = known & (d < size)
            tl.store(y + y_at + d * y_strides[-1], tl.load(x + x_at + d * x_strides[-1], inside), inside)


@triton.jit(do_not_specialize=["kept", "summed", "per_part"])
def _rotary_tables_bwd_kernel(
    y_bar, x, cos_parts, sin_parts,
    y_bar_strides, x_strides, kept_sizes, summed_sizes, kept, summed, per_part, half,
    S: tl.constexpr, KEPT: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums over one part of the rows that a tile of table rows served; strides: stack, KEPT axes, summed axes, last."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    known, turned = row < kept, 2 * half
    part = tl.program_id(1)
    y_bar_row = row_offsets(row, kept_sizes, y_bar_strides[: KEPT + 1])
    x_row = row_offsets(row, kept_sizes, x_strides[: KEPT + 1])
    c1 = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    c2 = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    s1 = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    s2 = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    first = part * per_part
    for i in range(tl.minimum(per_part, summed - first)):
        other = first + i
        y_bar_at = y_bar_row + row_offsets(other, summed_sizes, y_bar_strides[KEPT:])
        x_at = x_row + row_offsets(other, summed_sizes, x_strides[KEPT:])
        for s in tl.static_range(S):
            if s > 0:
                x_at += x_strides[0]
                y_bar_at += y_bar_strides[0]
            g1, g2 = _read_pair(y_bar, y_bar_at, half, turned, known, y_bar_strides[-1], INTERLEAVED, BLOCK_D)
            x1, x2 = _read_pair(x, x_at, half, turned, known, x_strides[-1], INTERLEAVED, BLOCK_D)
            c1 += g1 * x1
            c2 += g2 * x2
            s1 -= g1 * x2
            s2 += g2 * x1
    at = (part.to(tl.int64) * kept + row) * turned
    _write_pair(cos_parts, at, c1, c2, half, turned, known, 1, INTERLEAVED, BLOCK_D)
    _write_pair(sin_parts, at, s1, s2, half, turned, known, 1, INTERLEAVED, BLOCK_D)
