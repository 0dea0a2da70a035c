"""Kernels of the sensitivities and of softmax; see :mod:`.triton`.

A row is read in blocks of BLOCK columns, the tangents of a block as the KP rows of one tile, KP the power of two that
holds K. Masses, means and second moments of a block are relative to its own largest logit and to ż there; blocks are
merged by adding masses and by the rule for means and second moments of a union, in which every term is positive, so
that neither a common offset of ż nor a large mean cancels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...backends.triton.math import exp_flushed
from ...backends.triton.rows import read, row_offsets


@triton.jit
def _columns(start, size, K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr):
    """Columns of a block and the masks of the primal ``[1, BLOCK]`` and of the tangents ``[KP, BLOCK]``."""
    col = start + tl.arange(0, BLOCK)[None, :]
    inside = col < size
    return col, inside, inside & (tl.arange(0, KP)[:, None] < K)


@triton.jit
def _row(pointer, row, sizes, strides, KP: tl.constexpr):
    """Where a row starts in the primal, and ``[KP, 1]`` in the tangents."""
    at = pointer + row_offsets(row, sizes, strides)
    return at, at + (tl.arange(0, KP)[:, None] + 1).to(tl.int64) * strides[0]


@triton.jit
def _finite_top(top):
    return tl.where(top == float("-inf"), 0.0, top)  # the weights of a row of -inf are zero, not NaN


@triton.jit
def _share(part, total):
    return tl.where(total == 0.0, 0.0, part / tl.where(total == 0.0, 1.0, total))


@triton.jit
def _block(z, tangents, col):
    """Largest logit, weights, mass, and ż at the largest logit of a block."""
    top = tl.max(z, 1, keep_dims=True)
    place = tl.min(tl.where(z == top, col, 2147483647), 1, keep_dims=True)
    reference = tl.sum(tl.where(col == place, tangents, 0.0), 1, keep_dims=True)
    weights = exp_flushed(z - _finite_top(top))
    return top, weights, tl.sum(weights, 1, keep_dims=True), reference


@triton.jit
def _softmax(z_at, offset, inside, top, mass):
    """p of a block."""
    return exp_flushed(tl.load(z_at + offset, inside, float("-inf")).to(tl.float32) - top) / mass


@triton.jit
def _moments_of(weights, mass, d):
    """Mean and sum of squares about it of a block."""
    mean = _share(tl.sum(weights * d, 1, keep_dims=True), mass)
    e = d - mean
    return mean, tl.sum(weights * e * e, 1, keep_dims=True)


@triton.jit
def _merge(mass, mean, second, more_mass, more_mean, more_second, shift, newer):
    """Union of two parts; `shift` takes the second's reference to the first's, `newer` keeps the second's."""
    total = mass + more_mass
    delta = more_mean + shift - mean
    share = _share(more_mass, total)
    merged = tl.where(newer, more_mean - delta * _share(mass, total), mean + delta * share)
    return total, merged, second + more_second + delta * delta * mass * share


@triton.jit
def _row_moments(
    z_at, tan_at, step, size, K: tl.constexpr, KP: tl.constexpr, PROBS: tl.constexpr, BLOCK: tl.constexpr
):
    """Over a row: largest logit, mass, reference, mean of ż − reference and second moment; with PROBS also mass, mean
    and second moment under the squared weights."""
    top = tl.full((1, 1), float("-inf"), tl.float32)
    mass, mass2 = tl.zeros((1, 1), tl.float32), tl.zeros((1, 1), tl.float32)
    reference = tl.zeros((KP, 1), tl.float32)
    mean, second = tl.zeros((KP, 1), tl.float32), tl.zeros((KP, 1), tl.float32)
    mean2, second2 = tl.zeros((KP, 1), tl.float32), tl.zeros((KP, 1), tl.float32)
    for start in range(0, size, BLOCK):
        col, inside, tan_inside = _columns(start, size, K, KP, BLOCK)
        z = tl.load(z_at + col * step, inside, float("-inf")).to(tl.float32)
        tangents = read(tan_at, col * step, tan_inside)
        block_top, weights, block_mass, block_reference = _block(z, tangents, col)
        d = tangents - block_reference
        block_mean, block_second = _moments_of(weights, block_mass, d)
        newer = block_top > top
        new_top = tl.maximum(top, block_top)
        old = exp_flushed(top - _finite_top(new_top))
        new = exp_flushed(block_top - _finite_top(new_top))
        shift = block_reference - reference
        if PROBS:
            squares = weights * weights
            block_mass2 = tl.sum(squares, 1, keep_dims=True)
            block_mean2, block_second2 = _moments_of(squares, block_mass2, d)
            old2, new2 = old * old, new * new
            mass2, mean2, second2 = _merge(
                mass2 * old2,
                mean2,
                second2 * old2,
                block_mass2 * new2,
                block_mean2,
                block_second2 * new2,
                shift,
                newer,
            )
        mass, mean, second = _merge(
            mass * old, mean, second * old, block_mass * new, block_mean, block_second * new, shift, newer
        )
        reference = tl.where(newer, block_reference, reference)
        top = new_top
    return _finite_top(top), mass, reference, mean, second, mass2, mean2, second2


@triton.jit(do_not_specialize=["rows"])
def _sensitivity_fwd_kernel(
    y, q,
    y_strides, sizes, rows, size,
    METRIC: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    ks = tl.arange(0, KP)[:, None]
    z_at, tan_at = _row(y, row, sizes, y_strides, KP)
    step = y_strides[-1]
    if METRIC == "squares":
        out = tl.zeros((KP, 1), tl.float32)
        for start in range(0, size, BLOCK):
            col, _, tan_inside = _columns(start, size, K, KP, BLOCK)
            tangents = read(tan_at, col * step, tan_inside)
            out += tl.sum(tangents * tangents, 1, keep_dims=True)
    else:
        _, mass, _, mean, second, mass2, mean2, second2 = _row_moments(
            z_at, tan_at, step, size, K, KP, METRIC == "probs", BLOCK
        )
        if METRIC == "probs":
            apart = mean2 - mean
            out = (second2 + mass2 * apart * apart) / mass / mass
        else:
            out = second / mass
    tl.store(q + ks.to(tl.int64) * rows + row, out, ks < K)


@triton.jit(do_not_specialize=["rows"])
def _sensitivity_bwd_kernel(
    q_bar, y, y_bar,
    y_strides, y_bar_strides, sizes, rows, size,
    METRIC: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    ks = tl.arange(0, KP)[:, None]
    z_at, tan_at = _row(y, row, sizes, y_strides, KP)
    z_out, tan_out = _row(y_bar, row, sizes, y_bar_strides, KP)
    step, out_step = y_strides[-1], y_bar_strides[-1]
    g = read(q_bar, ks.to(tl.int64) * rows + row, ks < K)
    low = y_bar.dtype.element_ty
    if METRIC == "squares":
        for start in range(0, size, BLOCK):
            col, inside, tan_inside = _columns(start, size, K, KP, BLOCK)
            tl.store(z_out + col * out_step, tl.zeros((1, BLOCK), low), inside)
            out = 2.0 * g * read(tan_at, col * step, tan_inside)
            tl.store(tan_out + col * out_step, out.to(low), tan_inside)
    else:
        top, mass, reference, mean, second, mass2, mean2, second2 = _row_moments(
            z_at, tan_at, step, size, K, KP, METRIC == "probs", BLOCK
        )
        if METRIC == "probs":
            apart = mean2 - mean
            q = (second2 + mass2 * apart * apart) / mass / mass
            kappa = mass2 * apart / mass / mass
        else:
            q = second / mass
        for start in range(0, size, BLOCK):
            col, inside, tan_inside = _columns(start, size, K, KP, BLOCK)
            p = _softmax(z_at, col * step, inside, top, mass)
            e = (read(tan_at, col * step, tan_inside) - reference) - mean
            twice = 2.0 * g * p
            if METRIC == "probs":
                slope = p * e - kappa
                out = tl.sum(tl.where(ks < K, twice * (slope * e - q), 0.0), 0)[None, :]
                tan_bar = twice * slope
            else:
                out = tl.sum(tl.where(ks < K, 0.5 * twice * (e * e - q), 0.0), 0)[None, :]
                tan_bar = twice * e
            tl.store(z_out + col * out_step, out.to(low), inside)
            tl.store(tan_out + col * out_step, tan_bar.to(low), tan_inside)


@triton.jit(do_not_specialize=["rows"])
def _softmax_fwd_kernel(
    x, y,
    x_strides, y_strides, sizes, rows, size,
    K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    z_at, tan_at = _row(x, row, sizes, x_strides, KP)
    z_out, tan_out = _row(y, row, sizes, y_strides, KP)
    step, out_step = x_strides[-1], y_strides[-1]
    low = y.dtype.element_ty
    top, mass, reference, mean, _, _, _, _ = _row_moments(z_at, tan_at, step, size, K, KP, False, BLOCK)
    for start in range(0, size, BLOCK):
        col, inside, tan_inside = _columns(start, size, K, KP, BLOCK)
        p = _softmax(z_at, col * step, inside, top, mass)
        e = (read(tan_at, col * step, tan_inside) - reference) - mean
        tl.store(z_out + col * out_step, p.to(low), inside)
        tl.store(tan_out + col * out_step, (p * e).to(low), tan_inside)


@triton.jit(do_not_specialize=["rows"])
def _softmax_bwd_kernel(
    y_bar, x, x_bar,
    y_bar_strides, x_strides, x_bar_strides, sizes, rows, size,
    K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    ks = tl.arange(0, KP)[:, None]
    z_at, tan_at = _row(x, row, sizes, x_strides, KP)
    g_at, g_tan_at = _row(y_bar, row, sizes, y_bar_strides, KP)
    z_out, tan_out = _row(x_bar, row, sizes, x_bar_strides, KP)
    step, g_step, out_step = x_strides[-1], y_bar_strides[-1], x_bar_strides[-1]
    low = x_bar.dtype.element_ty
    top, mass, reference, mean, _, _, _, _ = _row_moments(z_at, tan_at, step, size, K, KP, False, BLOCK)
    # means of the cotangents: ν and the part of Σ p a that is ȳ's
    nu = tl.zeros((KP, 1), tl.float32)
    mean_a = tl.zeros((1, 1), tl.float32)
    for start in range(0, size, BLOCK):
        col, inside, tan_inside = _columns(start, size, K, KP, BLOCK)
        p = _softmax(z_at, col * step, inside, top, mass)
        nu += tl.sum(p * read(g_tan_at, col * g_step, tan_inside), 1, keep_dims=True)
        mean_a += tl.sum(p * read(g_at, col * g_step, inside), 1, keep_dims=True)
    for start in range(0, size, BLOCK):
        col, inside, tan_inside = _columns(start, size, K, KP, BLOCK)
        p = _softmax(z_at, col * step, inside, top, mass)
        e = (read(tan_at, col * step, tan_inside) - reference) - mean
        above = read(g_tan_at, col * g_step, tan_inside) - nu
        mean_a += tl.sum(p * tl.sum(tl.where(ks < K, above * e, 0.0), 0)[None, :], 1, keep_dims=True)
    for start in range(0, size, BLOCK):
        col, inside, tan_inside = _columns(start, size, K, KP, BLOCK)
        p = _softmax(z_at, col * step, inside, top, mass)
        e = (read(tan_at, col * step, tan_inside) - reference) - mean
        above = read(g_tan_at, col * g_step, tan_inside) - nu
        a = read(g_at, col * g_step, inside) + tl.sum(tl.where(ks < K, above * e, 0.0), 0)[None, :]
        tl.store(z_out + col * out_step, (p * (a - mean_a)).to(low), inside)
        tl.store(tan_out + col * out_step, (p * above).to(low), tan_inside)
