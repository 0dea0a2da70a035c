"""Gradients of the keys and values, a block of keys at a time."""

import triton
import triton.language as tl

from .backward import add_tangents, bend, finish, tile_tangent, tile_weights
from .device import add_product, kept, load_rows, pin, sequence, settle, store_rows


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
    """Weights of a transposed tile. Keys that do not exist need no mask: nobody stores their rows."""
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
    TMA: tl.constexpr, LATE: tl.constexpr, PIN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A block of keys: gradients of the keys and their tangent (NEED_K), of the values and theirs (NEED_V).

    Programs: (blocks of keys, see `sequence` if packed; batch rows times key heads). One loop runs over the query
    heads of the group and the blocks of queries. TANGENT: the output has a tangent; with several, one launch each
    adds to the primal's gradients in `k_sum` and `v_sum` (float32), from the FIRST to the LAST.
    """
    MOVES: tl.constexpr = Q_TAN or K_TAN or MASK_TAN
    EARLY: tl.constexpr = SOFTCAP or not LATE
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

    lnorms = (tl.num_programs(1) * GROUP).to(tl.int64) * NP
    k_acc = pin(tl.zeros([BLOCK_N, BLOCK_D], tl.float32), PIN)
    k_tan_acc = pin(tl.zeros([BLOCK_N, BLOCK_D], tl.float32), PIN)
    v_acc = pin(tl.zeros([BLOCK_N, BLOCK_V], tl.float32), PIN)
    v_tan_acc = pin(tl.zeros([BLOCK_N, BLOCK_V], tl.float32), PIN)
    start = settle(low, PIN)
    h = hk * GROUP
    for _ in tl.range(0, GROUP * blocks, num_stages=STAGES):
        i = (start + tl.arange(0, BLOCK_M))[None, :]
        qs = load_rows(q, q_strides, b, h, q_first + start, q_end, BLOCK_M, BLOCK_D, D, TMA)
        q_tans = qs
        if Q_TAN:
            q_tans = load_rows(q_tan, q_strides, b, h, q_first + start, q_end, BLOCK_M, BLOCK_D, D, TMA)
        head = (b * H + h).to(tl.int64) * NP
        at = q_first + start + tl.arange(0, BLOCK_M)
        here = at < q_end
        zeros = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        keep = 1.0
        if DROPOUT:
            keep = kept(seed, b, h, H, i, j, dropout)
        p, tau = zeros, 0.0
        if EARLY:
            p, tau = _weights(
                qs, keys, stats, head, lnorms, at, here, mask, mask_strides, b, h, i, j, j0, start, n, m, offset,
                window, scale, softcap, CAUSAL, WINDOW, MASK, SOFTCAP, SPLIT, PACKED, PRECISION,
            )  # fmt: skip
        if MOVES and TANGENT:
            t = add_tangents(zeros, qs, q_tans, keys, key_tans, Q_TAN, K_TAN, True, PRECISION)
            center = row_statistic(mu + head, at, here, 0.0, PACKED)
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
                d1 = row_statistic(delta_tan + head, at, here, 0.0, PACKED)
                t_bar = t_bar * keep - d1[None, :]
                if not DROPOUT:
                    s_bar = pin(t_bar * c, PIN)
            if FIRST:
                s_bar = add_product(s_bar, gs, values, True, PRECISION)
            if V_TAN:
                s_bar = add_product(s_bar, g_tans, value_tans, True, PRECISION)
            d0 = row_statistic(delta + head, at, here, 0.0, PACKED)
            s_bar = s_bar * keep - d0[None, :]
            if MOVES and TANGENT and DROPOUT:
                s_bar += t_bar * c
        if not EARLY:
            p, tau = _weights(
                qs, keys, stats, head, lnorms, at, here, mask, mask_strides, b, h, i, j, j0, start, n, m, offset,
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
        if GROUP > 1:
            # the next head of the group
            h = tl.where(start < high, h, h + 1)
            start = tl.where(start < high, start, low)

    if NEED_V:
        finish(
            v_bar, v_bar_strides, v_sum, b, hk, HK, M, k_first + j0, k_end, v_acc, BLOCK_N, BLOCK_V, V, FIRST, LAST
        )  # fmt: skip
        if TANGENT and V_TAN:
            store_rows(v_tan_bar, v_bar_strides, b, hk, k_first + j0, k_end, v_tan_acc, BLOCK_N, BLOCK_V, V)
    if NEED_K:
        k_acc *= scale
        finish(
            k_bar, k_bar_strides, k_sum, b, hk, HK, M, k_first + j0, k_end, k_acc, BLOCK_N, BLOCK_D, D, FIRST, LAST
        )  # fmt: skip
        if K_TAN:
            k_tan_acc *= scale
            store_rows(k_tan_bar, k_bar_strides, b, hk, k_first + j0, k_end, k_tan_acc, BLOCK_N, BLOCK_D, D)
