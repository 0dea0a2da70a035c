"""Kernels of RMS norm and layer norm of rows too long for registers: several passes, all but the first from cache."""

from __future__ import annotations

import triton
import triton.language as tl

from ...backends.triton.rows import read, row_offsets


@triton.jit
def read_sum(x, residual, x_offset, residual_offset, mask, HAS_X: tl.constexpr, HAS_RESIDUAL: tl.constexpr):
    """x, residual or their sum rounded to their dtype, as float32."""
    if HAS_X and HAS_RESIDUAL:
        value = read(x, x_offset, mask) + read(residual, residual_offset, mask)
        return value.to(x.dtype.element_ty).to(tl.float32)
    elif HAS_X:
        return read(x, x_offset, mask)
    else:
        return read(residual, residual_offset, mask)


@triton.jit
def _row_mean(
    x, residual, x_step, residual_step, size,
    HAS_X: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        col = start + tl.arange(0, BLOCK)
        total += read_sum(x, residual, col * x_step, col * residual_step, col < size, HAS_X, HAS_RESIDUAL)
    return tl.sum(total, 0) / size


@triton.jit(do_not_specialize=["rows"])
def _norm_fwd_long_kernel(
    x, residual, weight, bias, y, summed, stats,
    x_strides, residual_strides, sizes, rows, size, eps, offset,
    K: tl.constexpr, CENTRED: tl.constexpr, X_TAN: tl.constexpr, RESIDUAL_TAN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    HAS_RESIDUAL: tl.constexpr = residual is not None
    row = tl.program_id(0)
    per_stack = rows.to(tl.int64)
    stack = per_stack * size
    stats += row
    y += row.to(tl.int64) * size
    x += row_offsets(row, sizes, x_strides)
    if HAS_RESIDUAL:
        residual += row_offsets(row, sizes, residual_strides)
        summed += row.to(tl.int64) * size
    x_step, residual_step = x_strides[-1], residual_strides[-1]
    mean = 0.0
    if CENTRED:
        mean = _row_mean(x, residual, x_step, residual_step, size, True, HAS_RESIDUAL, BLOCK)
        tl.store(stats + (1 + K) * per_stack, mean)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        col = start + tl.arange(0, BLOCK)
        value = read_sum(x, residual, col * x_step, col * residual_step, col < size, True, HAS_RESIDUAL)
        value = tl.where(col < size, value - mean, 0.0)
        total += value * value
    r = tl.rsqrt(tl.sum(total, 0) / size + eps)
    tl.store(stats, r)
    for start in range(0, size, BLOCK):
        col = start + tl.arange(0, BLOCK)
        value = read_sum(x, residual, col * x_step, col * residual_step, col < size, True, HAS_RESIDUAL)
        if HAS_RESIDUAL:
            tl.store(summed + col, value.to(summed.dtype.element_ty), col < size)
        out = (value - mean) * r
        if weight is not None:
            out *= read(weight, col, col < size) + offset
        if bias is not None:
            out += read(bias, col, col < size)
        tl.store(y + col, out.to(y.dtype.element_ty), col < size)
    x_tan, residual_tan = x, residual
    for k in tl.static_range(K):
        y += stack
        x_tan += x_strides[0]
        if HAS_RESIDUAL:
            residual_tan += residual_strides[0]
            summed += stack
        mean_tan = 0.0
        if CENTRED:
            mean_tan = _row_mean(x_tan, residual_tan, x_step, residual_step, size, X_TAN, RESIDUAL_TAN, BLOCK)
            tl.store(stats + (2 + K + k) * per_stack, mean_tan)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, size, BLOCK):
            col = start + tl.arange(0, BLOCK)
            mask, x_at, residual_at = col < size, col * x_step, col * residual_step
            value = read_sum(x, residual, x_at, residual_at, mask, True, HAS_RESIDUAL) - mean
            tangent = read_sum(x_tan, residual_tan, x_at, residual_at, mask, X_TAN, RESIDUAL_TAN) - mean_tan
            total += tl.where(mask, value * tangent, 0.0)
        c = tl.sum(total, 0) / size * r
        tl.store(stats + (k + 1) * per_stack, c)
        for start in range(0, size, BLOCK):
            col = start + tl.arange(0, BLOCK)
            mask, x_at, residual_at = col < size, col * x_step, col * residual_step
            value = read_sum(x, residual, x_at, residual_at, mask, True, HAS_RESIDUAL) - mean
            tangent = read_sum(x_tan, residual_tan, x_at, residual_at, mask, X_TAN, RESIDUAL_TAN)
            if HAS_RESIDUAL:
                tl.store(summed + col, tangent.to(summed.dtype.element_ty), mask)
            out = (tangent - mean_tan) * r - value * r * (r * c)
            if weight is not None:
                out *= read(weight, col, mask) + offset
            tl.store(y + col, out.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows"])
def _norm_bwd_long_kernel(
    y_bar, x, weight, stats, sum_bar, x_bar, w_parts,
    y_bar_strides, x_strides, sum_bar_strides, sizes, rows, size, offset,
    K: tl.constexpr, CENTRED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With w_parts a row must be one block."""
    program = tl.program_id(0)
    per_stack = rows.to(tl.int64)
    stack = per_stack * size
    w_sum = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.cdiv(rows - program, tl.num_programs(0))):
        row = program + i * tl.num_programs(0)
        stats_at = stats + row
        a_at = y_bar + row_offsets(row, sizes, y_bar_strides)
        x_at = x + row_offsets(row, sizes, x_strides)
        r = tl.load(stats_at)
        mean = 0.0
        if CENTRED:
            mean = tl.load(stats_at + (1 + K) * per_stack)
        dot, a_sum, rest = 0.0, 0.0, 0.0  # the saved mean is rounded: rest is the one that remains
        for start in range(0, size, BLOCK):
            col = start + tl.arange(0, BLOCK)
            a = read(a_at, col * y_bar_strides[-1], col < size)
            if weight is not None:
                a *= read(weight, col, col < size) + offset
            value = read(x_at, col * x_strides[-1], col < size) - mean
            dot += tl.sum(a * value, 0)
            if CENTRED:
                a_sum += tl.sum(a, 0)
                rest += tl.sum(tl.where(col < size, value, 0.0), 0)
        total = dot / size
        out_mean = a_sum / size * r
        betas, out_means = (), ()
        b_at, tan_at = a_at, x_at
        for k in tl.static_range(K):
            b_at += y_bar_strides[0]
            tan_at += x_strides[0]
            c = tl.load(stats_at + (k + 1) * per_stack)
            mean_tan = 0.0
            if CENTRED:
                mean_tan = tl.load(stats_at + (2 + K + k) * per_stack)
            dot, tan_dot, sum_of_b, tan_rest = 0.0, 0.0, 0.0, 0.0
            for start in range(0, size, BLOCK):
                col = start + tl.arange(0, BLOCK)
                b = read(b_at, col * y_bar_strides[-1], col < size)
                if weight is not None:
                    b *= read(weight, col, col < size) + offset
                dot += tl.sum(b * (read(x_at, col * x_strides[-1], col < size) - mean), 0)
                tangent = read(tan_at, col * x_strides[-1], col < size) - mean_tan
                tan_dot += tl.sum(b * tangent, 0)
                if CENTRED:
                    sum_of_b += tl.sum(b, 0)
                    tan_rest += tl.sum(tl.where(col < size, tangent, 0.0), 0)
            beta = dot / size * r
            total += tan_dot / size - 3.0 * c * beta
            out_mean -= r * r * (c * sum_of_b + beta * tan_rest) / size
            betas = betas + (beta,)
            out_means = out_means + ((sum_of_b * r - rest * (r * r * beta)) / size,)
        out_mean -= rest / size * (r * r * r * total)
        for start in range(0, size, BLOCK):
            col = start + tl.arange(0, BLOCK)
            at = row.to(tl.int64) * size + col
            primal = read(x_at, col * x_strides[-1], col < size) - mean
            a = read(a_at, col * y_bar_strides[-1], col < size)
            if w_parts is not None:
                w_sum += a * (primal * r)
            if weight is not None:
                scale = read(weight, col, col < size) + offset
                a *= scale
            out = a * r - primal * (r * r * r * total)
            b_at, tan_at = a_at, x_at
            if sum_bar is not None:
                more = sum_bar + row_offsets(row, sizes, sum_bar_strides)
                out += read(more, col * sum_bar_strides[-1], col < size)
            for k in tl.static_range(K):
                b_at += y_bar_strides[0]
                tan_at += x_strides[0]
                c = tl.load(stats_at + (k + 1) * per_stack)
                b = read(b_at, col * y_bar_strides[-1], col < size)
                tangent = read(tan_at, col * x_strides[-1], col < size)
                if CENTRED:
                    tangent -= tl.load(stats_at + (2 + K + k) * per_stack)
                if w_parts is not None:
                    w_sum += (b * r) * (tangent - primal * (r * c))
                if weight is not None:
                    b *= scale
                out -= (r * r) * (c * b + betas[k] * tangent)
                tangent_out = b * r - primal * (r * r * betas[k])
                if CENTRED:
                    tangent_out -= out_means[k]
                if sum_bar is not None:
                    more += sum_bar_strides[0]
                    tangent_out += read(more, col * sum_bar_strides[-1], col < size)
                tl.store(x_bar + (k + 1) * stack + at, tangent_out.to(x_bar.dtype.element_ty), col < size)
            if CENTRED:
                out -= out_mean
            tl.store(x_bar + at, out.to(x_bar.dtype.element_ty), col < size)
    col = tl.arange(0, BLOCK)
    part = program.to(tl.int64) * size + col
    if w_parts is not None:
        tl.store(w_parts + part, w_sum, col < size)


@triton.jit(do_not_specialize=["rows", "rows_per_part"])
def _norm_weight_bwd_kernel(
    y_bar, x, stats, w_parts,
    y_bar_strides, x_strides, sizes, rows, size, rows_per_part,
    K: tl.constexpr, CENTRED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    per_stack = rows.to(tl.int64)
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    first = part * rows_per_part
    last = tl.minimum(first + rows_per_part, rows)
    w_sum = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)[:, None]
        known, inside = row < last, (row < last) & (col < size)
        y_bar_at = row_offsets(row, sizes, y_bar_strides) + col * y_bar_strides[-1]
        x_at = row_offsets(row, sizes, x_strides) + col * x_strides[-1]
        r = read(stats, row, known)
        primal = read(x, x_at, inside)
        if CENTRED:
            primal -= read(stats + (1 + K) * per_stack, row, known)
        w_sum += read(y_bar, y_bar_at, inside) * (primal * r)
        for k in tl.static_range(K):
            x_at += x_strides[0]
            y_bar_at += y_bar_strides[0]
            c = read(stats + (k + 1) * per_stack, row, known)
            tangent = read(x, x_at, inside)
            if CENTRED:
                tangent -= read(stats + (2 + K + k) * per_stack, row, known)
            b = read(y_bar, y_bar_at, inside)
            w_sum += (b * r) * (tangent - primal * (r * c))
    tl.store(w_parts + part.to(tl.int64) * size + col, tl.sum(w_sum, 0)[None, :], col < size)
