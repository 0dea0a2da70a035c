"""Kernels of the activations and gated products; see :mod:`.triton`."""

from __future__ import annotations

import triton
import triton.language as tl

from ...backends.triton.math import normal, sigmoid, tanh
from ...backends.triton.rows import read, row_offsets


@triton.jit
def _derivatives(x, KIND: tl.constexpr):
    """f, f' and f''. None of the formulas takes a difference that cancels in a tail."""
    if KIND == "relu":
        step = tl.where(x > 0.0, 1.0, 0.0)
        return tl.where(x <= 0.0, 0.0, x), step, step * 0.0
    elif KIND == "relu2":
        positive = tl.where(x <= 0.0, 0.0, x)  # NaN passes
        return positive * positive, positive + positive, tl.where(x > 0.0, 2.0, 0.0)
    elif KIND == "tanh":
        t, slope = tanh(x)
        return t, slope, -2.0 * t * slope
    elif KIND == "sigmoid":
        p, rest = sigmoid(x)
        slope = p * rest
        return p, slope, slope * (rest - p)
    elif KIND == "gelu":
        cdf, density = normal(x)
        near = tl.minimum(tl.maximum(x, -40.0), 40.0)  # beyond, the density is zero, and x² must not overflow
        return x * cdf, cdf + near * density, density * (2.0 - near * near)
    elif KIND == "gelu_tanh":
        # xσ(w) with w = 2√(2/π)(x + 0.044715x³), since (1 + tanh v)/2 = σ(2v); beyond 40 σ is 0 or 1
        near = tl.minimum(tl.maximum(x, -40.0), 40.0)
        square = near * near
        w = (square * 0.044715 + 1.0) * near * 1.5957691216057308
        p, rest = sigmoid(tl.where(x == x, w, x))
        slope = p * rest
        x_slope = near * slope
        w1 = (square * 0.134145 + 1.0) * 1.5957691216057308
        w2 = near * 0.42812889763560147
        bend = w2 + (rest - p) * (w1 * w1)
        return x * p, p + x_slope * w1, slope * (w1 + w1) + x_slope * bend
    else:
        # xσ(βx): with s = σ(βx)σ(−βx), f' = σ + βxs and f'' = 2βs + β²xs(σ(−βx) − σ(βx))
        BETA: tl.constexpr = 1.702 if KIND == "quick_gelu" else 1.0
        p, rest = sigmoid(x * BETA)
        slope = p * rest
        x_slope = x * slope
        return x * p, p + BETA * x_slope, BETA * (slope + slope + BETA * x_slope * (rest - p))


@triton.jit
def _tile(rows, cols, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows, columns and the mask of a program's tile."""
    program = tl.program_id(0)
    blocks = tl.cdiv(cols, BLOCK_C)
    row = (program // blocks).to(tl.int32) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    col = (program % blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    return row, col, (row < rows) & (col < cols)


@triton.jit
def _at(row, col, sizes, strides):
    return row_offsets(row, sizes, strides) + col * strides[-1]


@triton.jit
def _write(pointer, offset, value, mask):
    tl.store(pointer + offset, value.to(pointer.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows"])
def _pointwise_fwd_kernel(
    x, y,
    x_strides, y_strides, sizes, rows, cols,
    KIND: tl.constexpr, K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, col, inside = _tile(rows, cols, BLOCK_R, BLOCK_C)
    x_at, y_at = _at(row, col, sizes, x_strides), _at(row, col, sizes, y_strides)
    f, f1, _ = _derivatives(read(x, x_at, inside), KIND)
    _write(y, y_at, f, inside)
    for _k in tl.static_range(K):
        x_at += x_strides[0]
        y_at += y_strides[0]
        _write(y, y_at, f1 * read(x, x_at, inside), inside)


@triton.jit(do_not_specialize=["rows"])
def _pointwise_bwd_kernel(
    y_bar, x, x_bar,
    y_bar_strides, x_strides, x_bar_strides, sizes, rows, cols,
    KIND: tl.constexpr, K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, col, inside = _tile(rows, cols, BLOCK_R, BLOCK_C)
    x_at, y_bar_at = _at(row, col, sizes, x_strides), _at(row, col, sizes, y_bar_strides)
    x_bar_at = _at(row, col, sizes, x_bar_strides)
    first_at = x_bar_at
    _, f1, f2 = _derivatives(read(x, x_at, inside), KIND)
    primal = read(y_bar, y_bar_at, inside) * f1
    for _k in tl.static_range(K):
        x_at += x_strides[0]
        y_bar_at += y_bar_strides[0]
        x_bar_at += x_bar_strides[0]
        g = read(y_bar, y_bar_at, inside)
        primal += g * read(x, x_at, inside) * f2
        _write(x_bar, x_bar_at, g * f1, inside)
    _write(x_bar, first_at, primal, inside)


@triton.jit(do_not_specialize=["rows"])
def _gated_fwd_kernel(
    gate, up, h,
    gate_strides, up_strides, h_strides, sizes, rows, cols,
    KIND: tl.constexpr, K: tl.constexpr, GATE_TAN: tl.constexpr, UP_TAN: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, col, inside = _tile(rows, cols, BLOCK_R, BLOCK_C)
    gate_at, up_at = _at(row, col, sizes, gate_strides), _at(row, col, sizes, up_strides)
    h_at = _at(row, col, sizes, h_strides)
    f, f1, _ = _derivatives(read(gate, gate_at, inside), KIND)
    u = read(up, up_at, inside)
    _write(h, h_at, f * u, inside)
    for _k in tl.static_range(K):
        h_at += h_strides[0]
        tangent = tl.zeros_like(u)
        if GATE_TAN:
            gate_at += gate_strides[0]
            tangent = read(gate, gate_at, inside) * (f1 * u)
        if UP_TAN:
            up_at += up_strides[0]
            tangent += read(up, up_at, inside) * f
        _write(h, h_at, tangent, inside)


@triton.jit(do_not_specialize=["rows"])
def _gated_bwd_kernel(
    h_bar, gate, up, gate_bar, up_bar,
    h_bar_strides, gate_strides, up_strides, gate_bar_strides, up_bar_strides, sizes, rows, cols,
    KIND: tl.constexpr, K: tl.constexpr, GATE_TAN: tl.constexpr, UP_TAN: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, col, inside = _tile(rows, cols, BLOCK_R, BLOCK_C)
    h_bar_at = _at(row, col, sizes, h_bar_strides)
    gate_at, up_at = _at(row, col, sizes, gate_strides), _at(row, col, sizes, up_strides)
    gate_bar_at, up_bar_at = _at(row, col, sizes, gate_bar_strides), _at(row, col, sizes, up_bar_strides)
    gate_first, up_first = gate_bar_at, up_bar_at
    f, f1, f2 = _derivatives(read(gate, gate_at, inside), KIND)
    u = read(up, up_at, inside)
    primal = read(h_bar, h_bar_at, inside)
    of_gate, of_up, slope = primal * u, primal * f, tl.zeros_like(u)
    for _k in tl.static_range(K):
        h_bar_at += h_bar_strides[0]
        tangent = read(h_bar, h_bar_at, inside)
        if GATE_TAN:
            gate_at += gate_strides[0]
            slope += tangent * read(gate, gate_at, inside)
            if gate_bar is not None:
                gate_bar_at += gate_bar_strides[0]
                _write(gate_bar, gate_bar_at, tangent * (u * f1), inside)
        if UP_TAN:
            if gate_bar is not None:
                up_at += up_strides[0]
                of_gate += tangent * read(up, up_at, inside)
            if up_bar is not None:
                up_bar_at += up_bar_strides[0]
                _write(up_bar, up_bar_at, tangent * f, inside)
    if gate_bar is not None:
        out = of_gate * f1
        if GATE_TAN:
            out += slope * (f2 * u)
        _write(gate_bar, gate_first, out, inside)
    if up_bar is not None:
        out = of_up
        if GATE_TAN:
            out += slope * f1
        _write(up_bar, up_first, out, inside)
