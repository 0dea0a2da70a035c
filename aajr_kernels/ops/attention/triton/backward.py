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

from .device import (
    add_product,
    expand,
    joint,
    kept,
    load_rows,
    mask_tile,
    pin,
    scores,
    seen,
    sequence,
    settle,
    store_rows,
    weights,
)
from .schedule import own_place, visible_keys, visible_queries


@triton.jit(do_not_specialize=["N", "NP"])
def _attention_rows_kernel(
    out, out_tan, out_bar, out_tan_bar, delta, delta_tan, out_strides, bar_strides, H, N, NP,
    V: tl.constexpr, BLOCK_V: tl.constexpr, TANGENT: tl.constexpr, FIRST: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """D0 = rowsum(G O) + rowsum(H O') and D1 = rowsum(H O), ``[B, H, NP]``; the first term of D0 in FIRST only."""
    head, block = own_place(False)
    b = head // H
    h = head % H
    start = block * BLOCK_M
    o = load_rows(out, out_strides, b, h, start, N, BLOCK_M, BLOCK_V, V, False).to(tl.float32)
    d0 = tl.zeros([BLOCK_M], tl.float32)
    at = head.to(tl.int64) * NP + start + tl.arange(0, BLOCK_M)
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


@triton.jit(do_not_specialize=["H", "N", "M", "NP", "offset", "window", "C"])
def _attention_bwd_q_kernel(
    q, k, v, g, q_tan, k_tan, v_tan, g_tan, mask, mask_tan, q_start, k_start,
    q_bar, q_tan_bar, q_sum, stats, mu, delta, delta_tan,
    q_strides, k_strides, v_strides, g_strides, mask_strides, q_bar_strides,
    scale, softcap, dropout, seed, H, N, M, NP, offset, window, C,
    context_k, context_v, context_mask, context_mask_tan,
    context_k_strides, context_v_strides, context_mask_strides,
    GROUP: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    MOVES: tl.constexpr, Q_TAN: tl.constexpr, K_TAN: tl.constexpr, V_TAN: tl.constexpr, MASK_TAN: tl.constexpr,
    PACKED: tl.constexpr, ALIGN_RIGHT: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, TANGENT: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr, LATE: tl.constexpr, PIN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A block of queries: gradients of the queries and their tangent; programs and context as in the forward."""
    EARLY: tl.constexpr = SOFTCAP or not LATE
    head, block = own_place(True)
    b = head // H
    h = head % H
    hk = h // GROUP
    q_first, k_first, n, m, block, offset = sequence(
        q_start, k_start, block, N, M, offset, BLOCK_M, PACKED, ALIGN_RIGHT
    )
    i0 = block * BLOCK_M
    if i0 >= n:
        return
    q_end = q_first + n
    k_end = k_first + m
    i = (i0 + tl.arange(0, BLOCK_M))[:, None]
    qs = load_rows(q, q_strides, b, h, q_first + i0, q_end, BLOCK_M, BLOCK_D, D, TMA)
    q_tans = qs
    if Q_TAN:
        q_tans = load_rows(q_tan, q_strides, b, h, q_first + i0, q_end, BLOCK_M, BLOCK_D, D, TMA)
    gs = load_rows(g, g_strides, b, h, q_first + i0, q_end, BLOCK_M, BLOCK_V, V, TMA)
    g_tans = gs
    if TANGENT:
        g_tans = load_rows(g_tan, g_strides, b, h, q_first + i0, q_end, BLOCK_M, BLOCK_V, V, TMA)
    at = head.to(tl.int64) * NP + q_first + i0 + tl.arange(0, BLOCK_M)
    here = i0 + tl.arange(0, BLOCK_M) < n
    shift = tl.load(stats + at, mask=here, other=float("inf"))
    lnorm = shift
    if SPLIT:
        heads = (tl.num_programs(0) * tl.num_programs(2)).to(tl.int64)
        lnorm = tl.load(stats + heads * NP + at, mask=here, other=0.0)
    d0 = tl.load(delta + at, mask=here, other=0.0)
    d1 = d0
    center = d0
    if MOVES and TANGENT:
        d1 = tl.load(delta_tan + at, mask=here, other=0.0)
        center = tl.load(mu + at, mask=here, other=0.0)

    q_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    q_tan_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for part in tl.static_range(1 if C is None else 2):
        if part == 1:  # the context
            k, v, mask, mask_tan = context_k, context_v, context_mask, context_mask_tan
            k_strides, v_strides, mask_strides = context_k_strides, context_v_strides, context_mask_strides
            k_end, m, offset = C, C, offset + C
        low, high = visible_keys(i0, m, offset, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
        last, before = seen(i, m, offset, window, CAUSAL)
        for start in tl.range(settle(low, PIN), high, BLOCK_N, num_stages=STAGES):
            j = (start + tl.arange(0, BLOCK_N))[None, :]
            keys = load_rows(k, k_strides, b, hk, k_first + start, k_end, BLOCK_N, BLOCK_D, D, TMA)
            key_tans = keys
            if K_TAN and part == 0:
                key_tans = load_rows(
                    k_tan, k_strides, b, hk, k_first + start, k_end, BLOCK_N, BLOCK_D, D, TMA
                )
            zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            keep = 1.0
            if DROPOUT:
                keep = kept(seed, b, h, H, i, joint(j, C, part), dropout)
            tau = 0.0
            if EARLY:
                s = add_product(zeros, qs, keys, False, PRECISION)
                p, tau = tile_weights(
                    s, shift, lnorm, mask, mask_strides, b, h, i, j, i0, start, n, m,
                    last, before, scale, softcap, WINDOW, MASK, SOFTCAP, SPLIT, True, False,
                )  # fmt: skip
            if MOVES and TANGENT:
                t = add_tangents(
                    zeros, qs, q_tans, keys, key_tans, Q_TAN, K_TAN and part == 0, False, PRECISION
                )  # fmt: skip
                t, c = tile_tangent(
                    t, center, tau, mask_tan, mask_strides, b, h, i, j, n, m, scale, MASK_TAN, SOFTCAP, False
                )  # fmt: skip
            values = load_rows(v, v_strides, b, hk, k_first + start, k_end, BLOCK_N, BLOCK_V, V, TMA)
            s_bar = zeros
            if MOVES and TANGENT:
                t_bar = add_product(zeros, g_tans, values, False, PRECISION)
                t_bar = t_bar * keep - d1[:, None]
                if not DROPOUT:
                    s_bar = pin(t_bar * c - d0[:, None], PIN)
            if FIRST:
                s_bar = add_product(s_bar, gs, values, False, PRECISION)
            if V_TAN and part == 0:
                value_tans = load_rows(
                    v_tan, v_strides, b, hk, k_first + start, k_end, BLOCK_N, BLOCK_V, V, TMA
                )
                s_bar = add_product(s_bar, g_tans, value_tans, False, PRECISION)
            if DROPOUT:
                s_bar = s_bar * keep - d0[:, None]
                if MOVES and TANGENT:
                    s_bar += t_bar * c
            elif not (MOVES and TANGENT):
                s_bar -= d0[:, None]
            if not EARLY:
                s = add_product(zeros, qs, keys, False, PRECISION)
                p, tau = tile_weights(
                    s, shift, lnorm, mask, mask_strides, b, h, i, j, i0, start, n, m,
                    last, before, scale, softcap, WINDOW, MASK, SOFTCAP, SPLIT, True, False,
                )  # fmt: skip
            s_bar = p * s_bar
            if MOVES and TANGENT:
                t_bar = p * t_bar
                if SOFTCAP:
                    s_bar, t_bar = bend(s_bar, t_bar, t, tau, softcap, True)
                low_t_bar = pin(t_bar.to(keys.dtype), PIN)
                if Q_TAN:
                    q_tan_acc = tl.dot(low_t_bar, keys, q_tan_acc, input_precision=PRECISION)
                if K_TAN and part == 0:
                    q_acc = tl.dot(low_t_bar, key_tans, q_acc, input_precision=PRECISION)
            elif SOFTCAP:
                s_bar, _ = bend(s_bar, s_bar, s_bar, tau, softcap, False)
            q_acc = tl.dot(pin(s_bar.to(keys.dtype), PIN), keys, q_acc, input_precision=PRECISION)

    finish(
        q_bar, q_bar_strides, q_sum, b, h, H, N, q_first + i0, q_end, q_acc * scale, BLOCK_M, BLOCK_D, D, FIRST, LAST
    )  # fmt: skip
    if Q_TAN:
        q_tan_acc *= scale
        store_rows(q_tan_bar, q_bar_strides, b, h, q_first + i0, q_end, q_tan_acc, BLOCK_M, BLOCK_D, D)


@triton.jit
def row_statistic(x, at, here, other, MASKED: tl.constexpr):
    """A statistic of a block of queries, which is padded; packed, the next sequence follows instead."""
    if MASKED:
        value = tl.load(x + at, mask=here, other=other)
    else:
        value = tl.load(x + at)
    return value


@triton.jit
def _weights(
    qs, keys, stats, head, lnorms, at, here, mask, mask_strides, b, h, i, j, row, col, n, m, offset, window, scale,
    softcap,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, SPLIT: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weights of a transposed tile. Keys that do not exist need no mask: their rows are never stored."""
    s = add_product(tl.zeros([keys.shape[0], qs.shape[0]], tl.float32), qs, keys, True, PRECISION)
    shift = row_statistic(stats + head, at, here, float("inf"), PACKED)
    lnorm = shift
    if SPLIT:
        lnorm = row_statistic(stats + lnorms + head, at, here, 0.0, PACKED)
    return tile_weights(
        s, shift, lnorm, mask, mask_strides, b, h, i, j, row, col, n, m,
        i + offset, i + offset - window, scale, softcap,
        WINDOW, MASK, SOFTCAP, SPLIT, CAUSAL, True,
    )  # fmt: skip


@triton.jit(do_not_specialize=["H", "N", "M", "NP", "offset", "window", "C"])
def _attention_bwd_kv_kernel(
    q, k, v, g, q_tan, k_tan, v_tan, g_tan, mask, mask_tan, q_start, k_start,
    k_bar, k_tan_bar, v_bar, v_tan_bar, k_sum, v_sum, stats, mu, delta, delta_tan,
    q_strides, k_strides, v_strides, g_strides, mask_strides, k_bar_strides, v_bar_strides,
    scale, softcap, dropout, seed, H, N, M, NP, offset, window, C,
    GROUP: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    MOVES: tl.constexpr, Q_TAN: tl.constexpr, K_TAN: tl.constexpr, V_TAN: tl.constexpr, MASK_TAN: tl.constexpr,
    PACKED: tl.constexpr, ALIGN_RIGHT: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, TANGENT: tl.constexpr,
    SPLIT: tl.constexpr, SHARE: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr, LAST_FIRST: tl.constexpr,
    TMA: tl.constexpr, LATE: tl.constexpr, PIN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A block of keys: gradients of the keys and their tangent (NEED_K), of the values and theirs (NEED_V).

    Programs: see :mod:`.schedule`, and `sequence` if packed. One loop runs over SHARE query heads of the group and
    the blocks of queries; where these are not all, the gradients are those of as many more key heads, to be added.
    TANGENT: the output has a tangent; with several, one launch each adds to the primal's gradients
    in `k_sum` and `v_sum` (float32), from the FIRST to the LAST. MOVES: the scores of some keys have tangents, these
    or those of another launch: a context has one of its own. C of its keys come before these, None without dropout.
    """
    EARLY: tl.constexpr = SOFTCAP or not LATE
    head, block = own_place(LAST_FIRST)
    heads = H // SHARE
    b = head // heads
    own_h = head % heads
    hk = own_h // (GROUP // SHARE)
    k_first, q_first, m, n, block, _ = sequence(k_start, q_start, block, M, N, offset, BLOCK_N, PACKED, False)
    if ALIGN_RIGHT:
        offset = m - n
    j0 = block * BLOCK_N
    if j0 >= m:
        return
    k_end = k_first + m
    q_end = q_first + n
    j = (j0 + tl.arange(0, BLOCK_N))[:, None]
    keys = load_rows(k, k_strides, b, hk, k_first + j0, k_end, BLOCK_N, BLOCK_D, D, TMA)
    key_tans = keys
    if K_TAN:
        key_tans = load_rows(k_tan, k_strides, b, hk, k_first + j0, k_end, BLOCK_N, BLOCK_D, D, TMA)
    values = keys
    value_tans = keys
    if NEED_K:
        values = load_rows(v, v_strides, b, hk, k_first + j0, k_end, BLOCK_N, BLOCK_V, V, TMA)
        if V_TAN:
            value_tans = load_rows(v_tan, v_strides, b, hk, k_first + j0, k_end, BLOCK_N, BLOCK_V, V, TMA)

    low, high = visible_queries(j0, n, offset, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
    blocks = tl.maximum((high - low + BLOCK_M - 1) // BLOCK_M, 0)

    lnorms = (tl.num_programs(0) * tl.num_programs(2) * SHARE).to(tl.int64) * NP
    k_acc = pin(tl.zeros([BLOCK_N, BLOCK_D], tl.float32), PIN)
    k_tan_acc = pin(tl.zeros([BLOCK_N, BLOCK_D], tl.float32), PIN)
    v_acc = pin(tl.zeros([BLOCK_N, BLOCK_V], tl.float32), PIN)
    v_tan_acc = pin(tl.zeros([BLOCK_N, BLOCK_V], tl.float32), PIN)
    start = settle(low, PIN)
    h = own_h * SHARE
    for _ in tl.range(0, SHARE * blocks, num_stages=STAGES):
        i = (start + tl.arange(0, BLOCK_M))[None, :]
        qs = load_rows(q, q_strides, b, h, q_first + start, q_end, BLOCK_M, BLOCK_D, D, TMA)
        q_tans = qs
        if Q_TAN:
            q_tans = load_rows(q_tan, q_strides, b, h, q_first + start, q_end, BLOCK_M, BLOCK_D, D, TMA)
        row = (b * H + h).to(tl.int64) * NP
        at = q_first + start + tl.arange(0, BLOCK_M)
        here = at < q_end
        zeros = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        keep = 1.0
        if DROPOUT:
            keep = kept(seed, b, h, H, i, joint(j, C, False), dropout)
        p, tau = zeros, 0.0
        if EARLY:
            p, tau = _weights(
                qs, keys, stats, row, lnorms, at, here, mask, mask_strides, b, h, i, j, j0, start, n, m, offset,
                window, scale, softcap, CAUSAL, WINDOW, MASK, SOFTCAP, SPLIT, PACKED, PRECISION,
            )  # fmt: skip
        if MOVES and TANGENT:
            t = add_tangents(zeros, qs, q_tans, keys, key_tans, Q_TAN, K_TAN, True, PRECISION)
            center = row_statistic(mu + row, at, here, 0.0, PACKED)
            t, c = tile_tangent(
                t, center, tau, mask_tan, mask_strides, b, h, i, j, n, m, scale, MASK_TAN, SOFTCAP, True
            )  # fmt: skip
        gs = load_rows(g, g_strides, b, h, q_first + start, q_end, BLOCK_M, BLOCK_V, V, TMA)
        g_tans = gs
        if TANGENT:
            g_tans = load_rows(g_tan, g_strides, b, h, q_first + start, q_end, BLOCK_M, BLOCK_V, V, TMA)
        s_bar = zeros
        if NEED_K:
            if MOVES and TANGENT:
                t_bar = add_product(zeros, g_tans, values, True, PRECISION)
                d1 = row_statistic(delta_tan + row, at, here, 0.0, PACKED)
                t_bar = t_bar * keep - d1[None, :]
                if not DROPOUT:
                    s_bar = pin(t_bar * c, PIN)
            if FIRST:
                s_bar = add_product(s_bar, gs, values, True, PRECISION)
            if V_TAN:
                s_bar = add_product(s_bar, g_tans, value_tans, True, PRECISION)
            d0 = row_statistic(delta + row, at, here, 0.0, PACKED)
            s_bar = s_bar * keep - d0[None, :]
            if MOVES and TANGENT and DROPOUT:
                s_bar += t_bar * c
        if not EARLY:
            p, tau = _weights(
                qs, keys, stats, row, lnorms, at, here, mask, mask_strides, b, h, i, j, j0, start, n, m, offset,
                window, scale, softcap, CAUSAL, WINDOW, MASK, SOFTCAP, SPLIT, PACKED, PRECISION,
            )  # fmt: skip
        if NEED_V:
            weight = p * keep
            low_weight = pin(weight.to(gs.dtype), PIN)
            if MOVES and TANGENT:
                v_acc = tl.dot(pin((weight * c).to(gs.dtype), PIN), g_tans, v_acc, input_precision=PRECISION)
            if FIRST:
                v_acc = tl.dot(low_weight, gs, v_acc, input_precision=PRECISION)
            if TANGENT and V_TAN:
                v_tan_acc = tl.dot(low_weight, g_tans, v_tan_acc, input_precision=PRECISION)
        if NEED_K:
            s_bar = p * s_bar
            if MOVES and TANGENT:
                t_bar = p * t_bar
                if SOFTCAP:
                    s_bar, t_bar = bend(s_bar, t_bar, t, tau, softcap, True)
                low_t_bar = pin(t_bar.to(qs.dtype), PIN)
                if K_TAN:
                    k_tan_acc = tl.dot(low_t_bar, qs, k_tan_acc, input_precision=PRECISION)
                if Q_TAN:
                    k_acc = tl.dot(low_t_bar, q_tans, k_acc, input_precision=PRECISION)
            elif SOFTCAP:
                s_bar, _ = bend(s_bar, s_bar, s_bar, tau, softcap, False)
            k_acc = tl.dot(pin(s_bar.to(qs.dtype), PIN), qs, k_acc, input_precision=PRECISION)
        start += BLOCK_M
        if SHARE > 1:
            # the next head of the group
            h = tl.where(start < high, h, h + 1)
            start = tl.where(start < high, start, low)

    if NEED_V:
        finish(
            v_bar, v_bar_strides, v_sum, b, own_h, heads, M, k_first + j0, k_end, v_acc,
            BLOCK_N, BLOCK_V, V, FIRST, LAST,
        )  # fmt: skip
        if TANGENT and V_TAN:
            store_rows(
                v_tan_bar, v_bar_strides, b, own_h, k_first + j0, k_end, v_tan_acc, BLOCK_N, BLOCK_V, V
            )
    if NEED_K:
        k_acc *= scale
        finish(
            k_bar, k_bar_strides, k_sum, b, own_h, heads, M, k_first + j0, k_end, k_acc,
            BLOCK_N, BLOCK_D, D, FIRST, LAST,
        )  # fmt: skip
        if K_TAN:
            k_tan_acc *= scale
            store_rows(
                k_tan_bar, k_bar_strides, b, own_h, k_first + j0, k_end, k_tan_acc, BLOCK_N, BLOCK_D, D
            )


@triton.jit(do_not_specialize=["B", "H", "N", "M", "offset", "window", "NP", "C"])
def _attention_bwd_bias_kernel(
    q, k, v, g, q_tan, k_tan, v_tan, g_tan, mask, mask_tan, bias_bar, bias_tan_bar, stats, mu, delta, delta_tan,
    q_strides, k_strides, v_strides, g_strides, mask_strides, bar_strides,
    B, scale, softcap, dropout, seed, H, N, M, NP, offset, window, C,
    GROUP: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    MOVES: tl.constexpr, Q_TAN: tl.constexpr, K_TAN: tl.constexpr, V_TAN: tl.constexpr, MASK_TAN: tl.constexpr,
    FIRST: tl.constexpr, TANGENT: tl.constexpr, SPLIT: tl.constexpr,
    PER_B: tl.constexpr, PER_H: tl.constexpr, PER_N: tl.constexpr, PER_M: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of the bias, or of what it was broadcast from: PER_* name the axes it has.

    Programs: (blocks of queries times blocks of keys times batch rows times heads, parts), 1 along the axes that were
    broadcast; the tiles of those are added in a fixed order, every part some of them into memory of its own. float32
    outputs; a later tangent adds to the primal's.
    """
    n_blocks = (N + BLOCK_M - 1) // BLOCK_M
    m_blocks = (M + BLOCK_N - 1) // BLOCK_N
    own_m = m_blocks if PER_M else 1
    own_h = H if PER_H else 1
    own_heads = B * own_h if PER_B else own_h
    loop_b = 1 if PER_B else B
    loop_h = 1 if PER_H else H
    loop_n = 1 if PER_N else n_blocks
    loop_m = 1 if PER_M else m_blocks
    head = tl.program_id(0) % own_heads
    tile = tl.program_id(0) // own_heads
    first_n = tile // own_m
    first_m = tile % own_m
    first_b = head // own_h
    first_h = head % own_h
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total_tan = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    steps = loop_b * loop_h * loop_n * loop_m
    share = (steps + tl.num_programs(1) - 1) // tl.num_programs(1)
    low = tl.program_id(1) * share
    for step in range(low, tl.minimum(low + share, steps)):
        j0 = (first_m + step % loop_m) * BLOCK_N
        rest = step // loop_m
        i0 = (first_n + rest % loop_n) * BLOCK_M
        rest = rest // loop_n
        h = first_h + rest % loop_h
        b = first_b + rest // loop_h
        hk = h // GROUP
        i = (i0 + tl.arange(0, BLOCK_M))[:, None]
        j = (j0 + tl.arange(0, BLOCK_N))[None, :]
        at = (b * H + h).to(tl.int64) * NP + i0 + tl.arange(0, BLOCK_M)
        here = i0 + tl.arange(0, BLOCK_M) < N
        shift = tl.load(stats + at, mask=here, other=float("inf"))
        lnorm = tl.load(stats + (B * H).to(tl.int64) * NP + at, mask=here, other=0.0)
        qs = load_rows(q, q_strides, b, h, i0, N, BLOCK_M, BLOCK_D, D, False)
        keys = load_rows(k, k_strides, b, hk, j0, M, BLOCK_N, BLOCK_D, D, False)
        q_tans = qs
        if Q_TAN:
            q_tans = load_rows(q_tan, q_strides, b, h, i0, N, BLOCK_M, BLOCK_D, D, False)
        key_tans = keys
        if K_TAN:
            key_tans = load_rows(k_tan, k_strides, b, hk, j0, M, BLOCK_N, BLOCK_D, D, False)
        last, before = seen(i, M, offset, window, CAUSAL)
        zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        p, tau = tile_weights(
            add_product(zeros, qs, keys, False, PRECISION), shift, lnorm, mask, mask_strides, b, h, i, j, i0, j0, N, M,
            last, before, scale, softcap, WINDOW, MASK, SOFTCAP, SPLIT, True, False,
        )  # fmt: skip
        keep = 1.0
        if DROPOUT:
            keep = kept(seed, b, h, H, i, joint(j, C, False), dropout)
        gs = load_rows(g, g_strides, b, h, i0, N, BLOCK_M, BLOCK_V, V, False)
        values = load_rows(v, v_strides, b, hk, j0, M, BLOCK_N, BLOCK_V, V, False)
        g_tans = gs
        if TANGENT:
            g_tans = load_rows(g_tan, g_strides, b, h, i0, N, BLOCK_M, BLOCK_V, V, False)
        s_bar = zeros
        if FIRST:
            s_bar = add_product(s_bar, gs, values, False, PRECISION)
        if V_TAN:
            value_tans = load_rows(v_tan, v_strides, b, hk, j0, M, BLOCK_N, BLOCK_V, V, False)
            s_bar = add_product(s_bar, g_tans, value_tans, False, PRECISION)
        s_bar = p * (s_bar * keep - tl.load(delta + at, mask=here, other=0.0)[:, None])
        if MOVES and TANGENT:
            t_bar = add_product(zeros, g_tans, values, False, PRECISION) * keep
            t_bar = p * (t_bar - tl.load(delta_tan + at, mask=here, other=0.0)[:, None])
            center = tl.load(mu + at, mask=here, other=0.0)
            _, c = tile_tangent(
                add_tangents(zeros, qs, q_tans, keys, key_tans, Q_TAN, K_TAN, False, PRECISION), center, tau,
                mask_tan, mask_strides, b, h, i, j, N, M, scale, MASK_TAN, SOFTCAP, False,
            )  # fmt: skip
            s_bar += t_bar * c
            total_tan += t_bar
        total += s_bar

    base = first_b.to(tl.int64) * bar_strides[1] + first_h.to(tl.int64) * bar_strides[2]
    base += tl.program_id(1).to(tl.int64) * bar_strides[0]
    row = first_n * BLOCK_M + tl.arange(0, BLOCK_M)
    col = first_m * BLOCK_N + tl.arange(0, BLOCK_N)
    if not PER_N:
        total = tl.broadcast_to(tl.sum(total, 0)[None, :], [BLOCK_M, BLOCK_N])
        total_tan = tl.broadcast_to(tl.sum(total_tan, 0)[None, :], [BLOCK_M, BLOCK_N])
    if not PER_M:
        total = tl.broadcast_to(tl.sum(total, 1)[:, None], [BLOCK_M, BLOCK_N])
        total_tan = tl.broadcast_to(tl.sum(total_tan, 1)[:, None], [BLOCK_M, BLOCK_N])
    rows = N if PER_N else 1
    cols = M if PER_M else 1
    pointers = base + row[:, None].to(tl.int64) * bar_strides[3] + col[None, :] * bar_strides[4]
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    if not FIRST:
        total += tl.load(bias_bar + pointers, mask=inside, other=0.0)
    tl.store(bias_bar + pointers, total, mask=inside)
    if MASK_TAN:
        tl.store(bias_tan_bar + pointers, total_tan, mask=inside)


@triton.jit(do_not_specialize=["HK", "M", "parts"])
def _attention_sum_kernel(
    part_bars, bar, part_stack, part_strides, bar_stack, bar_strides, HK, M, parts,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of a stack of keys or values: the sum of `parts` consecutive heads each, in their order.

    Programs: (batch rows times key heads, blocks of keys, stacks).
    """
    b = tl.program_id(0) // HK
    h = tl.program_id(0) % HK
    start = tl.program_id(1) * BLOCK_N
    stack = tl.program_id(2).to(tl.int64)
    part_bars += stack * part_stack
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for part in range(parts):
        total += load_rows(part_bars, part_strides, b, h * parts + part, start, M, BLOCK_N, BLOCK_D, D, False)
    store_rows(bar + stack * bar_stack, bar_strides, b, h, start, M, total, BLOCK_N, BLOCK_D, D)
