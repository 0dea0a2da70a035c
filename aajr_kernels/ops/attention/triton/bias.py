"""The gradient of a bias: the cotangents of the scores, summed over the axes along which the bias was broadcast."""

import triton
import triton.language as tl

from .backward import add_tangents, tile_tangent, tile_weights
from .device import add_product, kept, load_rows, seen


@triton.jit(do_not_specialize=["B", "H", "N", "M", "offset", "window", "NP"])
def _attention_bwd_bias_kernel(
    q, k, v, g, q_tan, k_tan, v_tan, g_tan, mask, mask_tan, bias_bar, bias_tan_bar, stats, mu, delta, delta_tan,
    q_strides, k_strides, v_strides, g_strides, mask_strides, bar_strides,
    B, scale, softcap, dropout, seed, H, N, M, NP, offset, window,
    GROUP: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    Q_TAN: tl.constexpr, K_TAN: tl.constexpr, V_TAN: tl.constexpr, MASK_TAN: tl.constexpr,
    FIRST: tl.constexpr, TANGENT: tl.constexpr, SPLIT: tl.constexpr,
    PER_B: tl.constexpr, PER_H: tl.constexpr, PER_N: tl.constexpr, PER_M: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of the bias, or of what it was broadcast from: PER_* name the axes it has.

    Programs: (blocks of queries times blocks of keys, batch rows times heads, parts), 1 along the axes that were
    broadcast; the tiles of those are added in a fixed order, every part some of them into memory of its own. float32
    outputs; a later tangent adds to the primal's.
    """
    MOVES: tl.constexpr = Q_TAN or K_TAN or MASK_TAN
    n_blocks = (N + BLOCK_M - 1) // BLOCK_M
    m_blocks = (M + BLOCK_N - 1) // BLOCK_N
    own_m = m_blocks if PER_M else 1
    own_h = H if PER_H else 1
    loop_b = 1 if PER_B else B
    loop_h = 1 if PER_H else H
    loop_n = 1 if PER_N else n_blocks
    loop_m = 1 if PER_M else m_blocks
    first_n = tl.program_id(0) // own_m
    first_m = tl.program_id(0) % own_m
    first_b = tl.program_id(1) // own_h
    first_h = tl.program_id(1) % own_h
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total_tan = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    steps = loop_b * loop_h * loop_n * loop_m
    share = (steps + tl.num_programs(2) - 1) // tl.num_programs(2)
    low = tl.program_id(2) * share
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
            keep = kept(seed, b, h, H, i, j, dropout)
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
    base += tl.program_id(2).to(tl.int64) * bar_strides[0]
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
