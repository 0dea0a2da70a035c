"""Gradients of the queries, a block of them at a time."""

import triton
import triton.language as tl

from .backward import add_tangents, bend, finish, tile_tangent, tile_weights
from .device import add_product, kept, load_rows, pin, seen, sequence, settle, store_rows


@triton.jit(do_not_specialize=["H", "N", "M", "NP", "offset", "window"])
def _attention_bwd_q_kernel(
    q, k, v, g, q_tan, k_tan, v_tan, g_tan, mask, mask_tan, q_start, k_start,
    q_bar, q_tan_bar, q_sum, stats, mu, delta, delta_tan,
    q_strides, k_strides, v_strides, g_strides, mask_strides, q_bar_strides,
    scale, softcap, dropout, seed, H, N, M, NP, offset, window,
    GROUP: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    Q_TAN: tl.constexpr, K_TAN: tl.constexpr, V_TAN: tl.constexpr, MASK_TAN: tl.constexpr,
    PACKED: tl.constexpr, ALIGN_RIGHT: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, TANGENT: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr, LATE: tl.constexpr, PIN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A block of queries: gradients of the queries and their tangent; programs as in the forward."""
    MOVES: tl.constexpr = Q_TAN or K_TAN or MASK_TAN
    EARLY: tl.constexpr = SOFTCAP or not LATE
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
    if SPLIT:
        lnorm = tl.load(stats + tl.num_programs(1).to(tl.int64) * NP + at, mask=here, other=0.0)
    d0 = tl.load(delta + at, mask=here, other=0.0)
    d1 = d0
    center = d0
    if MOVES and TANGENT:
        d1 = tl.load(delta_tan + at, mask=here, other=0.0)
        center = tl.load(mu + at, mask=here, other=0.0)

    low = 0
    high = m
    if CAUSAL:
        high = tl.maximum(tl.minimum(m, i0 + BLOCK_M + offset), 0)
        if WINDOW:
            low = (tl.maximum(i0 + offset - window + 1, 0) // BLOCK_N) * BLOCK_N
    last, before = seen(i, m, offset, window, CAUSAL)
    q_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    q_tan_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in tl.range(settle(low, PIN), high, BLOCK_N, num_stages=STAGES):
        j = (start + tl.arange(0, BLOCK_N))[None, :]
        keys = load_rows(k, k_strides, b, hk, k_first + start, k_end, BLOCK_N, BLOCK_D, D, TMA)
        key_tans = keys
        if K_TAN:
            key_tans = load_rows(k_tan, k_strides, b, hk, k_first + start, k_end, BLOCK_N, BLOCK_D, D, TMA)
        zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        keep = 1.0
        if DROPOUT:
            keep = kept(seed, b, h, H, i, j, dropout)
        tau = 0.0
        if EARLY:
            s = add_product(zeros, qs, keys, False, PRECISION)
            p, tau = tile_weights(
                s, shift, lnorm, mask, mask_strides, b, h, i, j, i0, start, n, m,
                last, before, scale, softcap, WINDOW, MASK, SOFTCAP, SPLIT, True, False,
            )  # fmt: skip
        if MOVES and TANGENT:
            t, c = tile_tangent(
                add_tangents(zeros, qs, q_tans, keys, key_tans, Q_TAN, K_TAN, False, PRECISION), center, tau,
                mask_tan, mask_strides, b, h, i, j, n, m, scale, MASK_TAN, SOFTCAP, False,
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
        if V_TAN:
            value_tans = load_rows(v_tan, v_strides, b, hk, k_first + start, k_end, BLOCK_N, BLOCK_V, V, TMA)
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
            if K_TAN:
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
