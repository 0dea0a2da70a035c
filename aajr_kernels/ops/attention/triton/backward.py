"""The reverse-over-forward of attention: row statistics, then the gradients of the keys and values, and of the queries.

Each program recomputes the scores of its tiles from the saved statistics. With p the weights and c their tangents'
deviations from the mean, and G, H the cotangents of the output and its tangent, a tile takes

    A = H V^T - D1,   B = G V^T + H V'^T - D0,   S'_bar = p A,   S_bar = p (A c + B)

in the order c, A, B, p: B is added to A c, and what is multiplied by p waits for it. Three tiles live at a time, and
four if p came first. But with a soft cap c needs the scores, and where the operands of products are in registers (not
LATE) those of the scores should serve their tangents too: there p comes first.
"""

import triton
import triton.language as tl

from .device import add_product, expand, load_rows, mask_tile, scores, store_rows, weights


@triton.jit(do_not_specialize=["N", "NP"])
def _attention_rows_kernel(
    out, out_tan, out_bar, out_tan_bar, delta, delta_tan, out_strides, bar_strides, H, N, NP,
    V: tl.constexpr, BLOCK_V: tl.constexpr, TANGENT: tl.constexpr, FIRST: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """D0 = rowsum(G O) + rowsum(H O') and D1 = rowsum(H O), ``[B, H, NP]``; the first term of D0 in FIRST alone."""
    b = tl.program_id(1) // H
    h = tl.program_id(1) % H
    start = tl.program_id(0) * BLOCK_M
    o = load_rows(out, out_strides, b, h, start, N, BLOCK_M, BLOCK_V, V, False).to(tl.float32)
    d0 = tl.zeros([BLOCK_M], tl.float32)
    at = tl.program_id(1).to(tl.int64) * NP + start + tl.arange(0, BLOCK_M)
    present = start + tl.arange(0, BLOCK_M) < NP
    if FIRST:
        g = load_rows(out_bar, bar_strides, b, h, start, N, BLOCK_M, BLOCK_V, V, False).to(tl.float32)
        d0 += tl.sum(g * o, 1)
    if TANGENT:
        g = load_rows(out_tan_bar, bar_strides, b, h, start, N, BLOCK_M, BLOCK_V, V, False).to(tl.float32)
        o_tan = load_rows(out_tan, out_strides, b, h, start, N, BLOCK_M, BLOCK_V, V, False).to(tl.float32)
        d0 += tl.sum(g * o_tan, 1)
        tl.store(delta_tan + at, tl.sum(g * o, 1), mask=present)
    tl.store(delta + at, d0, mask=present)


@triton.jit
def tile_weights(
    s, shift, lnorm, mask, mask_strides, b, h, i, j, row, col, n, m, last, before, scale, softcap,
    WINDOW: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, SPLIT: tl.constexpr, CHECK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Weights of a tile from the products of its queries and keys, and tanh's value under a soft cap."""
    s, tau = scores(
        s, mask, mask_strides, b, h, i, j, row, col, n, m, last, before, scale, softcap,
        WINDOW, MASK, SOFTCAP, CHECK,
    )  # fmt: skip
    return weights(s, expand(shift, TRANSPOSED), expand(lnorm, TRANSPOSED), MASK, SPLIT), tau


@triton.jit
def add_tangents(
    t, qs, q_tans, keys, key_tans, Q_TAN: tl.constexpr, K_TAN: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`t` and the tangents of the products of queries and keys."""
    if Q_TAN:
        t = add_product(t, q_tans, keys, TRANSPOSED, PRECISION)
    if K_TAN:
        t = add_product(t, qs, key_tans, TRANSPOSED, PRECISION)
    return t


@triton.jit
def tile_tangent(
    t, mu, tau, mask_tan, mask_strides, b, h, i, j, n, m, scale,
    MASK_TAN: tl.constexpr, SOFTCAP: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Tangents of the raw scores from those of the products and, capped, biased and less their mean, of the scores."""
    t = t * scale
    c = t
    if SOFTCAP:
        c = t * (1.0 - tau * tau)
    if MASK_TAN:
        c += mask_tile(mask_tan, mask_strides, b, h, i, j, n, m).to(tl.float32)
    return t, c - expand(mu, TRANSPOSED)


@triton.jit
def bend(s_bar, t_bar, t, tau, softcap, TANGENT: tl.constexpr):
    """Cotangents of the raw scores and their tangents from those of the capped ones."""
    slope = 1.0 - tau * tau
    if TANGENT:
        s_bar = slope * (s_bar - (2.0 / softcap) * tau * t * t_bar)
        t_bar = slope * t_bar
    else:
        s_bar = slope * s_bar
    return s_bar, t_bar


@triton.jit
def finish(
    x_bar, strides, total, b, h, heads, size, start, end, tile,
    ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Store a primal's gradient, or add it to the sum over tangents, ``[B, heads, size, WIDTH]`` in float32."""
    if FIRST and LAST:
        store_rows(x_bar, strides, b, h, start, end, tile, ROWS, COLS, WIDTH)
    else:
        row = start + tl.arange(0, ROWS)
        col = tl.arange(0, COLS)
        base = total + ((b * heads + h).to(tl.int64) * size + start) * WIDTH
        pointers = base + tl.arange(0, ROWS)[:, None] * WIDTH + col[None, :]
        inside = (row < end)[:, None] & (col < WIDTH)[None, :]
        if not FIRST:
            tile += tl.load(pointers, mask=inside, other=0.0)
        if LAST:
            store_rows(x_bar, strides, b, h, start, end, tile, ROWS, COLS, WIDTH)
        else:
            tl.store(pointers, tile, mask=inside)
