"""The dual forward of attention: one pass over the keys, two accumulators."""

import triton
import triton.language as tl

from .device import (
    add_product,
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
)
from .schedule import own_place, visible_keys


@triton.jit(do_not_specialize=["H", "N", "M", "NP", "offset", "window", "C"])
def _attention_fwd_kernel(
    q, k, v, q_tan, k_tan, v_tan, mask, mask_tan, q_start, k_start, out, out_tan, stats, mu,
    q_strides, k_strides, v_strides, mask_strides, out_strides,
    scale, softcap, dropout, seed, H, N, M, NP, offset, window, C,
    context_k, context_v, context_mask, context_mask_tan,
    context_k_strides, context_v_strides, context_mask_strides,
    GROUP: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    MOVES: tl.constexpr, Q_TAN: tl.constexpr, K_TAN: tl.constexpr, V_TAN: tl.constexpr, MASK_TAN: tl.constexpr,
    PACKED: tl.constexpr, ALIGN_RIGHT: tl.constexpr, FIRST: tl.constexpr, SPLIT: tl.constexpr,
    TMA: tl.constexpr, PIN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A block of queries: output and one tangent of it.

    Programs: see :mod:`.schedule`, and `sequence` if packed. FIRST stores the primal, the statistics
    ``[1 | 2, B, H, NP]`` (shift, and if SPLIT -log2 of the normaliser) and mu ``[B, H, NP]``. MOVES: the scores of some
    keys have tangents. C: keys of a context before the others, None without one; they have no tangents, and a second
    loop goes over them.
    """
    # the last blocks see the most keys: they go first
    head, block = own_place(True)
    heads = (tl.num_programs(0) * tl.num_programs(2)).to(tl.int64)
    b = head // H
    h = head % H
    hk = h // GROUP
    q_first, k_first, n, m, block, offset = sequence(
        q_start, k_start, block, N, M, offset, BLOCK_M, PACKED, ALIGN_RIGHT
    )
    i0 = block * BLOCK_M
    if i0 >= n:
        if not PACKED:  # the padding of the statistics, which larger blocks of other kernels read
            beyond = head.to(tl.int64) * NP + i0 + tl.arange(0, BLOCK_M)
            there = i0 + tl.arange(0, BLOCK_M) < NP
            if FIRST:
                tl.store(stats + beyond, tl.full([BLOCK_M], float("inf"), tl.float32), mask=there)
                if SPLIT:
                    beyond_all = heads * NP + beyond
                    tl.store(stats + beyond_all, tl.zeros([BLOCK_M], tl.float32), mask=there)
            if MOVES:
                tl.store(mu + beyond, tl.zeros([BLOCK_M], tl.float32), mask=there)
        return
    q_end = q_first + n
    k_end = k_first + m
    rows = i0 + tl.arange(0, BLOCK_M)
    i = rows[:, None]
    qs = load_rows(q, q_strides, b, h, q_first + i0, q_end, BLOCK_M, BLOCK_D, D, TMA)
    q_tans = qs
    if Q_TAN:
        q_tans = load_rows(q_tan, q_strides, b, h, q_first + i0, q_end, BLOCK_M, BLOCK_D, D, TMA)

    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    acc_tan = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mean = tl.zeros([BLOCK_M], tl.float32)
    for part in tl.static_range(1 if C is None else 2):
        if part == 1:  # the context
            k, v, mask, mask_tan = context_k, context_v, context_mask, context_mask_tan
            k_strides, v_strides, mask_strides = context_k_strides, context_v_strides, context_mask_strides
            k_end, m, offset = C, C, offset + C
        low, high = visible_keys(i0, m, offset, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
        last, before = seen(i, m, offset, window, CAUSAL)
        for start in tl.range(settle(low, PIN), high, BLOCK_N, num_stages=STAGES):
            j = start + tl.arange(0, BLOCK_N)[None, :]
            keys = load_rows(k, k_strides, b, hk, k_first + start, k_end, BLOCK_N, BLOCK_D, D, TMA)
            zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            s = add_product(zeros, qs, keys, False, PRECISION)
            if MOVES:
                t = zeros
                if Q_TAN:
                    t = add_product(t, q_tans, keys, False, PRECISION)
                if K_TAN and part == 0:
                    key_tans = load_rows(
                        k_tan, k_strides, b, hk, k_first + start, k_end, BLOCK_N, BLOCK_D, D, TMA
                    )
                    t = add_product(t, qs, key_tans, False, PRECISION)
            s, tau = scores(
                s, mask, mask_strides, b, h, i, j, i0, start, n, m, last, before, scale, softcap,
                WINDOW, MASK, SOFTCAP, True,
            )  # fmt: skip
            peak = tl.maximum(top, tl.max(s, 1))
            finite = tl.where(peak == float("-inf"), 0.0, peak)  # nothing visible so far
            if MASK == 2:
                p = tl.exp(s - finite[:, None])
                decay = tl.exp(top - finite)
            else:
                p = tl.exp2(s - finite[:, None])
                decay = tl.exp2(top - finite)
            top = peak
            total = total * decay + tl.sum(p, 1)
            weight = p
            if DROPOUT:
                keep = kept(seed, b, h, H, i, joint(j, C, part), dropout)
                weight = p * keep
            values = load_rows(v, v_strides, b, hk, k_first + start, k_end, BLOCK_N, BLOCK_V, V, TMA)
            low_weight = pin(weight.to(values.dtype), PIN)
            if MOVES:
                slope = scale
                if SOFTCAP:
                    slope = scale * (1.0 - tau * tau)
                t = t * slope
                if MASK_TAN:
                    t += mask_tile(mask_tan, mask_strides, b, h, i, j, n, m).to(tl.float32)
                # Tangents count from their mean over the keys so far. Only what differs from it is rounded to the
                # dtype of the values, and nothing is left to be subtracted in the end; the sum so far follows the
                # mean exactly.
                step = tl.sum(p * (t - mean[:, None]), 1) / tl.where(total == 0.0, 1.0, total)
                acc_tan = acc_tan - step[:, None] * acc
                mean += step
                moved = p * (t - mean[:, None])
                if DROPOUT:
                    moved = moved * keep
            acc = tl.dot(low_weight, values, acc * decay[:, None], input_precision=PRECISION)
            if MOVES or V_TAN:
                acc_tan = acc_tan * decay[:, None]
            if MOVES:
                acc_tan = tl.dot(pin(moved.to(values.dtype), PIN), values, acc_tan, input_precision=PRECISION)
            if V_TAN and part == 0:
                value_tans = load_rows(
                    v_tan, v_strides, b, hk, k_first + start, k_end, BLOCK_N, BLOCK_V, V, TMA
                )
                acc_tan = tl.dot(low_weight, value_tans, acc_tan, input_precision=PRECISION)

    empty = total == 0.0  # but not where NaN
    total = tl.where(empty, 1.0, total)
    inverse = tl.where(empty, 0.0, 1.0 / total)
    acc = acc * inverse[:, None]
    at = head.to(tl.int64) * NP + q_first + rows
    if FIRST:
        store_rows(out, out_strides, b, h, q_first + i0, q_end, acc, BLOCK_M, BLOCK_V, V)
        # beyond the last query shift is +inf, so that weights vanish there; packed rows belong to the next sequence
        real = rows < n
        present = real if PACKED else q_first + rows < NP
        if SPLIT:
            shift = top
            lnorm = -tl.log2(total)
            tl.store(stats + heads * NP + at, tl.where(real, lnorm, 0.0), mask=present)
        else:
            shift = top + tl.log2(total)
        tl.store(stats + at, tl.where(empty | (rows >= n), float("inf"), shift), mask=present)
    if MOVES or V_TAN:
        if MOVES:
            present = rows < n if PACKED else q_first + rows < NP
            tl.store(mu + at, tl.where(empty | (rows >= n), 0.0, mean), mask=present)
        acc_tan = acc_tan * inverse[:, None]
        store_rows(out_tan, out_strides, b, h, q_first + i0, q_end, acc_tan, BLOCK_M, BLOCK_V, V)
