"""Kernels of RMS norm and layer norm that hold whole rows in registers; see :mod:`.triton`."""

from __future__ import annotations

import triton
import triton.language as tl

from ...backends.triton.rows import read, row_offsets
from .triton_long import read_sum


@triton.jit(do_not_specialize=["rows"])
def _norm_fwd_kernel(
    x, residual, weight, bias, y, summed, stats,
    x_strides, residual_strides, sizes, rows, size, eps, offset,
    K: tl.constexpr, CENTRED: tl.constexpr, X_TAN: tl.constexpr, RESIDUAL_TAN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    HAS_RESIDUAL: tl.constexpr = residual is not None
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    col = tl.arange(0, BLOCK_C)[None, :]
    known, inside = row < rows, (row < rows) & (col < size)
    x_at = row_offsets(row, sizes, x_strides) + col * x_strides[-1]
    residual_at = row_offsets(row, sizes, residual_strides) + col * residual_strides[-1]
    at = row.to(tl.int64) * size + col
    stack = rows.to(tl.int64) * size

    primal = read_sum(x, residual, x_at, residual_at, inside, True, HAS_RESIDUAL)
    if K > 0:
        x += x_strides[0]
        if HAS_RESIDUAL:
            residual += residual_strides[0]
        coming = read_sum(x, residual, x_at, residual_at, inside, X_TAN, RESIDUAL_TAN)
    if weight is not None:
        scale = read(weight, col, col < size) + offset
    if HAS_RESIDUAL:
        tl.store(summed + at, primal.to(summed.dtype.element_ty), inside)
    if CENTRED:
        mean = tl.sum(primal, 1, keep_dims=True) / size
        tl.store(stats + (1 + K) * rows.to(tl.int64) + row, mean, known)
        primal = tl.where(inside, primal - mean, 0.0)
    r = tl.rsqrt(tl.sum(primal * primal, 1, keep_dims=True) / size + eps)
    tl.store(stats + row, r, known)
    out = primal * r
    if weight is not None:
        out *= scale
    if bias is not None:
        out += read(bias, col, col < size)
    tl.store(y + at, out.to(y.dtype.element_ty), inside)

    for k in tl.static_range(K):
        y += stack
        stats += rows
        tangent = coming
        if k + 1 < K:
            x += x_strides[0]
            if HAS_RESIDUAL:
                residual += residual_strides[0]
            coming = read_sum(x, residual, x_at, residual_at, inside, X_TAN, RESIDUAL_TAN)
        if HAS_RESIDUAL:
            summed += stack
            tl.store(summed + at, tangent.to(summed.dtype.element_ty), inside)
        if CENTRED:
            mean = tl.sum(tangent, 1, keep_dims=True) / size
            tl.store(stats + (1 + K) * rows.to(tl.int64) + row, mean, known)
            tangent = tl.where(inside, tangent - mean, 0.0)
        c = tl.sum(primal * tangent, 1, keep_dims=True) / size * r
        tl.store(stats + row, c, known)
        out = tangent * r - primal * r * (r * c)
        if weight is not None:
            out *= scale
        tl.store(y + at, out.to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows"])
def _norm_bwd_kernel(
    y_bar, x, weight, stats, sum_bar, x_bar, w_parts, b_parts,
    y_bar_strides, x_strides, sum_bar_strides, sizes, rows, size, offset,
    K: tl.constexpr, CENTRED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK_C)[None, :]
    rows_of_stats, stack = rows.to(tl.int64), rows.to(tl.int64) * size
    if x_bar is not None and weight is not None:
        scale = read(weight, col, col < size) + offset
    if w_parts is not None:
        w_sum = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    if b_parts is not None:
        b_sum = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for tile in range(program, tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
        row = tile * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        known, inside = row < rows, (row < rows) & (col < size)
        x_at = row_offsets(row, sizes, x_strides) + col * x_strides[-1]
        y_bar_at = row_offsets(row, sizes, y_bar_strides) + col * y_bar_strides[-1]
        at = row.to(tl.int64) * size + col
        primal = read(x, x_at, inside)
        a = read(y_bar, y_bar_at, inside)
        if K > 0:
            next_y_bar, next_x = y_bar + y_bar_strides[0], x + x_strides[0]
            next_b, next_tangent = read(next_y_bar, y_bar_at, inside), read(next_x, x_at, inside)
        r = read(stats, row, known)
        if CENTRED:
            primal = tl.where(inside, primal - read(stats + (1 + K) * rows_of_stats, row, known), 0.0)
        if b_parts is not None:
            b_sum += a
        if w_parts is not None:
            w_sum += a * (primal * r)
        if sum_bar is not None:
            sum_bar_at = row_offsets(row, sizes, sum_bar_strides) + col * sum_bar_strides[-1]
        if x_bar is not None:
            if weight is not None:
                a *= scale
            total = tl.sum(a * primal, 1, keep_dims=True) / size
            out = a * r
        for k in tl.static_range(K):
            b, tangent = next_b, next_tangent
            if k + 1 < K:
                next_y_bar, next_x = next_y_bar + y_bar_strides[0], next_x + x_strides[0]
                next_b, next_tangent = read(next_y_bar, y_bar_at, inside), read(next_x, x_at, inside)
            c = read(stats + (k + 1) * rows_of_stats, row, known)
            if CENTRED:
                mean = read(stats + (2 + K + k) * rows_of_stats, row, known)
                tangent = tl.where(inside, tangent - mean, 0.0)
            if w_parts is not None:
                w_sum += (b * r) * (tangent - primal * (r * c))
            if x_bar is not None:
                if weight is not None:
                    b *= scale
                beta = tl.sum(b * primal, 1, keep_dims=True) / size * r
                total += tl.sum(b * tangent, 1, keep_dims=True) / size - 3.0 * c * beta
                out -= (r * r) * (c * b + beta * tangent)
                tangent_out = b * r - primal * (r * r * beta)
                if CENTRED:
                    tangent_out -= tl.sum(tangent_out, 1, keep_dims=True) / size
                if sum_bar is not None:
                    sum_bar_at += sum_bar_strides[0]
                    tangent_out += read(sum_bar, sum_bar_at, inside)
                tl.store(x_bar + (k + 1) * stack + at, tangent_out.to(x_bar.dtype.element_ty), inside)
        if x_bar is not None:
            out -= primal * (r * r * r * total)
            if CENTRED:
                out -= tl.sum(out, 1, keep_dims=True) / size
            if sum_bar is not None:
                sum_bar_at = row_offsets(row, sizes, sum_bar_strides) + col * sum_bar_strides[-1]
                out += read(sum_bar, sum_bar_at, inside)
            tl.store(x_bar + at, out.to(x_bar.dtype.element_ty), inside)
    part = program.to(tl.int64) * size + col
    if w_parts is not None:
        tl.store(w_parts + part, tl.sum(w_sum, 0)[None, :], col < size)
    if b_parts is not None:
        tl.store(b_parts + part, tl.sum(b_sum, 0)[None, :], col < size)
