"""The reverse-over-forward of attention: row statistics, then the gradients of the keys and values, and of the queries.

Each program recomputes the scores of its tiles from the saved statistics. With p the weights and c their tangents'
deviations from the mean, and G, H the cotangents of the output and its tangent, a tile takes

    A = H V^T - D1,   B = G V^T + H V'^T - D0,   S'_bar = p A,   S_bar = p B + S'_bar c

in the order S, B, A, S': the products of S'_bar are issued before S_bar is finished, and fewer tiles live at a time.
"""

import triton
import triton.language as tl

from .triton_tiles import (
    add_product,
    expand,
    kept,
    load_rows,
    mask_tile,
    product,
    scores,
    sequence,
    store_rows,
    weights,
)

_SIZES = ["H", "N", "M", "offset", "window", "seed", "NP"]


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
    qs, q_tans, keys, key_tans, shift, lnorm, mask, mask_strides, b, h, i, j, n, m, offset, window, scale, softcap,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, CHECK: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weights of a tile, and tanh's value under a soft cap."""
    s = product(qs, keys, TRANSPOSED, PRECISION)
    s, tau = scores(
        s, mask, mask_strides, b, h, i, j, n, m, offset, window, scale, softcap, CAUSAL, WINDOW, MASK, SOFTCAP, CHECK
    )
    return weights(s, expand(shift, TRANSPOSED), expand(lnorm, TRANSPOSED), MASK), tau


@triton.jit
def tile_tangent(
    qs, q_tans, keys, key_tans, mu, tau, mask_tan, mask_strides, b, h, i, j, n, m, scale,
    Q_TAN: tl.constexpr, K_TAN: tl.constexpr, MASK_TAN: tl.constexpr, SOFTCAP: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tangents of the raw scores and, capped, biased and less their mean, those of the scores."""
    if Q_TAN:
        t = product(q_tans, keys, TRANSPOSED, PRECISION)
        if K_TAN:
            t = add_product(t, qs, key_tans, TRANSPOSED, PRECISION)
    elif K_TAN:
        t = product(qs, key_tans, TRANSPOSED, PRECISION)
    else:
        t = tl.zeros_like(i + j + 0.0)
    t = t * scale
    c = t
    if SOFTCAP:
        c = t * (1.0 - tau * tau)
    if MASK_TAN:
        c += mask_tile(mask_tan, mask_strides, b, h, i, j, (i < n) & (j < m)).to(tl.float32)
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


@triton.jit(do_not_specialize=_SIZES)
def _attention_bwd_kv_kernel(
    q, k, v, g, q_tan, k_tan, v_tan, g_tan, mask, mask_tan, q_start, k_start,
    k_bar, k_tan_bar, v_bar, v_tan_bar, k_sum, v_sum, stats, mu, delta, delta_tan,
    q_strides, k_strides, v_strides, g_strides, mask_strides, k_bar_strides, v_bar_strides,
    scale, softcap, dropout, seed, H, N, M, NP, offset, window,
    GROUP: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    Q_TAN: tl.constexpr, K_TAN: tl.constexpr, V_TAN: tl.constexpr, MASK_TAN: tl.constexpr,
    PACKED: tl.constexpr, ALIGN_RIGHT: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, TANGENT: tl.constexpr,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A block of keys: gradients of the keys and their tangent (NEED_K), of the values and theirs (NEED_V).

    Programs: (blocks of keys, times sequences if packed; batch rows times key heads). One loop runs over the query
    heads of the group and the blocks of queries. TANGENT: the output has a tangent; with several, one launch each
    adds to the primal's gradients in `k_sum` and `v_sum` (float32), from the FIRST to the LAST.
    """
    MOVES: tl.constexpr = Q_TAN or K_TAN or MASK_TAN
    HK = H // GROUP
    b = tl.program_id(1) // HK
    hk = tl.program_id(1) % HK
    k_first, q_first, m, n, block, unused = sequence(
        k_start, q_start, tl.program_id(0), M, N, offset, BLOCK_N, PACKED, False
    )
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

    low = 0
    high = n
    if CAUSAL:
        low = (tl.maximum(j0 - offset, 0) // BLOCK_M) * BLOCK_M
        if WINDOW:
            high = tl.maximum(tl.minimum(n, j0 + BLOCK_N - 1 - offset + window), 0)
    blocks = tl.maximum((high - low + BLOCK_M - 1) // BLOCK_M, 0)

    k_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    k_tan_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    v_acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    v_tan_acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for step in tl.range(0, GROUP * blocks, num_stages=STAGES):
        h = hk * GROUP + step // blocks
        start = low + (step % blocks) * BLOCK_M
        i = (start + tl.arange(0, BLOCK_M))[None, :]
        at = (b * H + h).to(tl.int64) * NP + q_first + start + tl.arange(0, BLOCK_M)
        if PACKED:
            here = start + tl.arange(0, BLOCK_M) < n
            shift = tl.load(stats + at, mask=here, other=float("inf"))
        else:
            here = tl.full([BLOCK_M], True, tl.int1)
            shift = tl.load(stats + at)
        lnorm = shift
        if MASK == 2:
            lnorm = tl.load(stats + (tl.num_programs(1) * GROUP).to(tl.int64) * NP + at, mask=here, other=0.0)
        qs = load_rows(q, q_strides, b, h, q_first + start, q_end, BLOCK_M, BLOCK_D, D, TMA)
        q_tans = qs
        if Q_TAN:
            q_tans = load_rows(q_tan, q_strides, b, h, q_first + start, q_end, BLOCK_M, BLOCK_D, D, TMA)
        p, tau = tile_weights(
            qs, q_tans, keys, key_tans, shift, lnorm, mask, mask_strides, b, h, i, j, n, m, offset, window, scale,
            softcap, CAUSAL, WINDOW, MASK, SOFTCAP, CAUSAL or PACKED, True, PRECISION,
        )  # fmt: skip
        keep = 1.0
        weight = p
        if DROPOUT:
            keep = kept(seed, b, h, H, i, j, dropout)
            weight = p * keep
        gs = load_rows(g, g_strides, b, h, q_first + start, q_end, BLOCK_M, BLOCK_V, V, TMA)
        g_tans = gs
        if TANGENT:
            g_tans = load_rows(g_tan, g_strides, b, h, q_first + start, q_end, BLOCK_M, BLOCK_V, V, TMA)
        if NEED_V:
            low_weight = weight.to(gs.dtype)
            if FIRST:
                v_acc = tl.dot(low_weight, gs, v_acc, input_precision=PRECISION)
            if TANGENT and V_TAN:
                v_tan_acc = tl.dot(low_weight, g_tans, v_tan_acc, input_precision=PRECISION)
        if NEED_K:
            s_bar = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            if FIRST:
                s_bar = product(gs, values, True, PRECISION)
            if V_TAN:
                s_bar = add_product(s_bar, g_tans, value_tans, True, PRECISION)
            if DROPOUT:
                s_bar = s_bar * keep
            s_bar = p * (s_bar - tl.load(delta + at, mask=here, other=0.0)[None, :])
        t_bar = p
        t = p
        if MOVES and TANGENT:
            if NEED_K:
                t_bar = product(g_tans, values, True, PRECISION)
                if DROPOUT:
                    t_bar = t_bar * keep
                t_bar = p * (t_bar - tl.load(delta_tan + at, mask=here, other=0.0)[None, :])
            center = tl.load(mu + at, mask=here, other=0.0)
            t, c = tile_tangent(
                qs, q_tans, keys, key_tans, center, tau, mask_tan, mask_strides, b, h, i, j, n, m, scale,
                Q_TAN, K_TAN, MASK_TAN, SOFTCAP, True, PRECISION,
            )  # fmt: skip
            if NEED_V:
                v_acc = tl.dot((weight * c).to(gs.dtype), g_tans, v_acc, input_precision=PRECISION)
            if NEED_K:
                s_bar += t_bar * c
        if NEED_K:
            if SOFTCAP:
                s_bar, t_bar = bend(s_bar, t_bar, t, tau, softcap, MOVES and TANGENT)
            if MOVES and TANGENT:
                low_t_bar = t_bar.to(qs.dtype)
                if K_TAN:
                    k_tan_acc = tl.dot(low_t_bar, qs, k_tan_acc, input_precision=PRECISION)
                if Q_TAN:
                    k_acc = tl.dot(low_t_bar, q_tans, k_acc, input_precision=PRECISION)
            k_acc = tl.dot(s_bar.to(qs.dtype), qs, k_acc, input_precision=PRECISION)

    if NEED_V:
        finish(
            v_bar, v_bar_strides, v_sum, b, hk, HK, M, k_first + j0, k_end, v_acc, BLOCK_N, BLOCK_V, V, FIRST, LAST
        )
        if TANGENT and V_TAN:
            store_rows(v_tan_bar, v_bar_strides, b, hk, k_first + j0, k_end, v_tan_acc, BLOCK_N, BLOCK_V, V)
    if NEED_K:
        finish(
            k_bar, k_bar_strides, k_sum, b, hk, HK, M, k_first + j0, k_end, k_acc * scale, BLOCK_N, BLOCK_D, D, FIRST,
            LAST,
        )  # fmt: skip
        if K_TAN:
            store_rows(k_tan_bar, k_bar_strides, b, hk, k_first + j0, k_end, k_tan_acc * scale, BLOCK_N, BLOCK_D, D)


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


@triton.jit
def _dq_loop(
    q_acc, q_tan_acc, qs, q_tans, gs, g_tans, k, v, k_tan, v_tan, mask, mask_tan, shift, lnorm, center, d0, d1,
    k_strides, v_strides, mask_strides, i, b, h, hk, H, low, high, k_first, n, m, k_end, offset, window,
    scale, softcap, dropout, seed,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    Q_TAN: tl.constexpr, K_TAN: tl.constexpr, V_TAN: tl.constexpr, MASK_TAN: tl.constexpr,
    FIRST: tl.constexpr, TANGENT: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, CHECK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The keys ``[low, high)`` of a block of queries; CHECK where some of them may be invisible."""
    MOVES: tl.constexpr = Q_TAN or K_TAN or MASK_TAN
    for start in tl.range(low, high, BLOCK_N, num_stages=STAGES):
        j = (start + tl.arange(0, BLOCK_N))[None, :]
        keys = load_rows(k, k_strides, b, hk, k_first + start, k_end, BLOCK_N, BLOCK_D, D, TMA)
        key_tans = keys
        if K_TAN:
            key_tans = load_rows(k_tan, k_strides, b, hk, k_first + start, k_end, BLOCK_N, BLOCK_D, D, TMA)
        p, tau = tile_weights(
            qs, q_tans, keys, key_tans, shift, lnorm, mask, mask_strides, b, h, i, j, n, m, offset, window, scale,
            softcap, CAUSAL, WINDOW, MASK, SOFTCAP, CHECK, False, PRECISION,
        )  # fmt: skip
        keep = 1.0
        if DROPOUT:
            keep = kept(seed, b, h, H, i, j, dropout)
        values = load_rows(v, v_strides, b, hk, k_first + start, k_end, BLOCK_N, BLOCK_V, V, TMA)
        s_bar = tl.zeros_like(p)
        if FIRST:
            s_bar = product(gs, values, False, PRECISION)
        if V_TAN:
            value_tans = load_rows(v_tan, v_strides, b, hk, k_first + start, k_end, BLOCK_N, BLOCK_V, V, TMA)
            s_bar = add_product(s_bar, g_tans, value_tans, False, PRECISION)
        if DROPOUT:
            s_bar = s_bar * keep
        s_bar = p * (s_bar - d0[:, None])
        t_bar = p
        t = p
        if MOVES and TANGENT:
            t_bar = product(g_tans, values, False, PRECISION)
            if DROPOUT:
                t_bar = t_bar * keep
            t_bar = p * (t_bar - d1[:, None])
            t, c = tile_tangent(
                qs, q_tans, keys, key_tans, center, tau, mask_tan, mask_strides, b, h, i, j, n, m, scale,
                Q_TAN, K_TAN, MASK_TAN, SOFTCAP, False, PRECISION,
            )  # fmt: skip
            s_bar += t_bar * c
        if SOFTCAP:
            s_bar, t_bar = bend(s_bar, t_bar, t, tau, softcap, MOVES and TANGENT)
        if MOVES and TANGENT:
            low_t_bar = t_bar.to(keys.dtype)
            if Q_TAN:
                q_tan_acc = tl.dot(low_t_bar, keys, q_tan_acc, input_precision=PRECISION)
            if K_TAN:
                q_acc = tl.dot(low_t_bar, key_tans, q_acc, input_precision=PRECISION)
        q_acc = tl.dot(s_bar.to(keys.dtype), keys, q_acc, input_precision=PRECISION)
    return q_acc, q_tan_acc


@triton.jit(do_not_specialize=_SIZES)
def _attention_bwd_q_kernel(
    q, k, v, g, q_tan, k_tan, v_tan, g_tan, mask, mask_tan, q_start, k_start,
    q_bar, q_tan_bar, q_sum, stats, mu, delta, delta_tan,
    q_strides, k_strides, v_strides, g_strides, mask_strides, q_bar_strides,
    scale, softcap, dropout, seed, H, N, M, NP, offset, window,
    GROUP: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    Q_TAN: tl.constexpr, K_TAN: tl.constexpr, V_TAN: tl.constexpr, MASK_TAN: tl.constexpr,
    PACKED: tl.constexpr, ALIGN_RIGHT: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, TANGENT: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A block of queries: gradients of the queries and their tangent; programs as in the forward."""
    MOVES: tl.constexpr = Q_TAN or K_TAN or MASK_TAN
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    b = tl.program_id(1) // H
    h = tl.program_id(1) % H
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
    at = tl.program_id(1).to(tl.int64) * NP + q_first + i0 + tl.arange(0, BLOCK_M)
    here = i0 + tl.arange(0, BLOCK_M) < n
    shift = tl.load(stats + at, mask=here, other=float("inf"))
    lnorm = shift
    if MASK == 2:
        lnorm = tl.load(stats + tl.num_programs(1).to(tl.int64) * NP + at, mask=here, other=0.0)
    d0 = tl.load(delta + at, mask=here, other=0.0)
    d1 = d0
    center = d0
    if MOVES and TANGENT:
        d1 = tl.load(delta_tan + at, mask=here, other=0.0)
        center = tl.load(mu + at, mask=here, other=0.0)

    low = 0
    high = m
    free = (m // BLOCK_N) * BLOCK_N
    if CAUSAL:
        high = tl.maximum(tl.minimum(m, i0 + BLOCK_M + offset), 0)
        free = tl.maximum(tl.minimum(free, ((i0 + offset + 1) // BLOCK_N) * BLOCK_N), 0)
        if WINDOW:
            low = (tl.maximum(i0 + offset - window + 1, 0) // BLOCK_N) * BLOCK_N
            free = low
    q_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    q_tan_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if not (WINDOW or PACKED):
        q_acc, q_tan_acc = _dq_loop(
            q_acc, q_tan_acc, qs, q_tans, gs, g_tans, k, v, k_tan, v_tan, mask, mask_tan, shift, lnorm, center, d0, d1,
            k_strides, v_strides, mask_strides, i, b, h, hk, H, low, free, k_first, n, m, k_end, offset, window,
            scale, softcap, dropout, seed, BLOCK_N, BLOCK_D, BLOCK_V, D, V, CAUSAL, WINDOW, MASK, SOFTCAP, DROPOUT,
            Q_TAN, K_TAN, V_TAN, MASK_TAN, FIRST, TANGENT, TMA, PRECISION, False, STAGES,
        )  # fmt: skip
        low = free
    q_acc, q_tan_acc = _dq_loop(
        q_acc, q_tan_acc, qs, q_tans, gs, g_tans, k, v, k_tan, v_tan, mask, mask_tan, shift, lnorm, center, d0, d1,
        k_strides, v_strides, mask_strides, i, b, h, hk, H, low, high, k_first, n, m, k_end, offset, window,
        scale, softcap, dropout, seed, BLOCK_N, BLOCK_D, BLOCK_V, D, V, CAUSAL, WINDOW, MASK, SOFTCAP, DROPOUT,
        Q_TAN, K_TAN, V_TAN, MASK_TAN, FIRST, TANGENT, TMA, PRECISION, True, STAGES,
    )  # fmt: skip
    finish(
        q_bar, q_bar_strides, q_sum, b, h, H, N, q_first + i0, q_end, q_acc * scale, BLOCK_M, BLOCK_D, D, FIRST, LAST
    )
    if Q_TAN:
        store_rows(q_tan_bar, q_bar_strides, b, h, q_first + i0, q_end, q_tan_acc * scale, BLOCK_M, BLOCK_D, D)
