"""Gradients of the keys and values, a block of keys at a time."""

import triton
import triton.language as tl

from .triton_backward import bend, finish, tile_tangent, tile_weights
from .triton_tiles import add_product, kept, load_rows, product, sequence, store_rows


@triton.jit(do_not_specialize=["H", "N", "M", "NP", "offset", "window"])
def _attention_bwd_kv_kernel(
    q, k, v, g, q_tan, k_tan, v_tan, g_tan, mask, mask_tan, q_start, k_start,
    k_bar, k_tan_bar, v_bar, v_tan_bar, k_sum, v_sum, stats, mu, delta, delta_tan,
    q_strides, k_strides, v_strides, g_strides, mask_strides, k_bar_strides, v_bar_strides,
    scale, softcap, dropout, seed, H, N, M, NP, offset, window,
    GROUP: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    Q_TAN: tl.constexpr, K_TAN: tl.constexpr, V_TAN: tl.constexpr, MASK_TAN: tl.constexpr,
    PACKED: tl.constexpr, ALIGN_RIGHT: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, TANGENT: tl.constexpr,
    SPLIT: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr,
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
    k_first, q_first, m, n, block, _ = sequence(
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
        if SPLIT:
            lnorm = tl.load(stats + (tl.num_programs(1) * GROUP).to(tl.int64) * NP + at, mask=here, other=0.0)
        qs = load_rows(q, q_strides, b, h, q_first + start, q_end, BLOCK_M, BLOCK_D, D, TMA)
        q_tans = qs
        if Q_TAN:
            q_tans = load_rows(q_tan, q_strides, b, h, q_first + start, q_end, BLOCK_M, BLOCK_D, D, TMA)
        p, tau = tile_weights(
            qs, q_tans, keys, key_tans, shift, lnorm, mask, mask_strides, b, h, i, j, n, m, offset, window, scale,
            softcap, CAUSAL, WINDOW, MASK, SOFTCAP, SPLIT, CAUSAL or PACKED, True, PRECISION,
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
            v_bar,
            v_bar_strides,
            v_sum,
            b,
            hk,
            HK,
            M,
            k_first + j0,
            k_end,
            v_acc,
            BLOCK_N,
            BLOCK_V,
            V,
            FIRST,
            LAST,
        )
        if TANGENT and V_TAN:
            store_rows(v_tan_bar, v_bar_strides, b, hk, k_first + j0, k_end, v_tan_acc, BLOCK_N, BLOCK_V, V)
    if NEED_K:
        finish(
            k_bar, k_bar_strides, k_sum, b, hk, HK, M, k_first + j0, k_end, k_acc * scale, BLOCK_N, BLOCK_D, D, FIRST,
            LAST,
        )  # fmt: skip
        if K_TAN:
            store_rows(
                k_tan_bar, k_bar_strides, b, hk, k_first + j0, k_end, k_tan_acc * scale, BLOCK_N, BLOCK_D, D
            )
