# mypy: disable-error-code="no-untyped-def, assignment"
"""Device code of the streamed head (MATH.md section 6): tiles of logits, their statistics and their cotangents.

A tile is ``[BT tokens, BV columns]`` of the logits and of S - 1 of their tangents: S products that share the weight, in
float32 registers. The forward reduces tiles to statistics per token and share of the vocabulary, the backward turns
tiles into cotangents, which leave in the dtype of the inputs for the products that follow. What comes after the
products works on halves or quarters of the columns, one after the other: a whole tile and its intermediate results
would not fit the registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...backends.triton.math import tanh

#: metrics as the kernels know them; 0 is none (l2 is one of hidden states and needs no logits)
METRICS = {"l2": 0, "logits": 1, "fisher": 2, "probs": 3}
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _place(pid, token_blocks, others, GROUP: tl.constexpr):
    """Block of tokens and share of the vocabulary: GROUP blocks of tokens stay in cache while the weight goes by."""
    group = pid // (GROUP * others)
    first = group * GROUP
    size = tl.minimum(token_blocks - first, GROUP)
    rest = pid - group * GROUP * others
    return first + rest % size, rest // size


@triton.jit
def _block(
    x, row, column, stride, rows, columns,
    BR: tl.constexpr, BC: tl.constexpr, DESCRIPTOR: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """``[BR, BC]`` of a matrix; zeros beyond the last column, zeros or numbers of the matrix beyond the last row."""
    if DESCRIPTOR:
        return x.load([row, column])
    else:
        r = tl.minimum(row + tl.arange(0, BR), rows - 1)
        c = column + tl.arange(0, BC)
        at = x + r.to(tl.int64)[:, None] * stride + c[None, :]
        if EVEN:
            return tl.load(at)
        else:
            return tl.load(at, mask=(c < columns)[None, :], other=0.0)


@triton.jit
def _raw(
    h, weight, bias, token, word, T, V, C, h_rows, h_stride, w_stride, tangent, scale,
    S: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
    DESCRIPTOR: tl.constexpr, EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``scale · (W h + b)`` and the tangents from `tangent` on: S blocks ``[BT, BV]``.

    Rows beyond the last token hold those of the next stack, columns beyond the last any numbers.
    """
    sums = ()
    for _i in tl.static_range(S):
        sums = sums + (tl.zeros((BT, BV), tl.float32),)
    for c in range(0, C, BK):
        w = _block(weight, word, c, w_stride, V, C, BV, BK, DESCRIPTOR, EVEN).T
        step = ()
        for s in tl.static_range(S):
            row = token if s == 0 else (tangent + s - 1) * T + token
            x = _block(h, row, c, h_stride, h_rows, C, BT, BK, DESCRIPTOR, EVEN)
            step = step + (tl.dot(x, w, sums[s], input_precision=PRECISION),)
        sums = step
    out = ()
    for s in tl.static_range(S):
        x = sums[s]
        if HAS_BIAS and s == 0:
            columns = word + tl.arange(0, BV)
            x += tl.load(bias + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
        out = out + ((x * scale if HAS_SCALE else x),)
    return out


@triton.jit
def _parts(x, S: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, PARTS: tl.constexpr):
    """Blocks ``[BT, BV]`` cut into halves or quarters of their columns: ``PARTS`` times S blocks, all in registers."""
    if PARTS == 1:
        return (x,)
    else:
        left, right = (), ()
        for s in tl.static_range(S):
            a, b = tl.split(tl.permute(tl.reshape(x[s], (BT, 2, BV // 2)), (0, 2, 1)))
            left, right = left + (a,), right + (b,)
        return _parts(left, S, BT, BV // 2, PARTS // 2) + _parts(right, S, BT, BV // 2, PARTS // 2)


@triton.jit
def _cap(x, softcap):
    """The soft cap and its slope."""
    tau, slope = tanh(x / softcap)
    return softcap * tau, slope


@triton.jit
def _local_labels(labels, tokens, inside, V, ignore_index):
    """Labels as int32, -1 where there is none, -2 where it is none of these columns but of another process."""
    label = tl.load(labels + tokens, mask=inside, other=-1)
    known = tl.where((label >= 0) & (label < V), label, -2)
    return tl.where(label == ignore_index, -1, known).to(tl.int32)


@triton.jit
def _merge(weight, mean, square, other_weight, other_mean, other_square):
    """Mean and sum of squares about it of two weighted sets (Chan): nothing large cancels."""
    inverse = 1.0 / tl.maximum(weight + other_weight, TINY)
    kept, share = weight * inverse, other_weight * inverse
    step = other_mean - mean
    return mean * kept + other_mean * share, square + other_square + step * step * share * weight


@triton.jit
def _moments(weight, total, shifted, AXIS: tl.constexpr):
    """Weighted mean, and the sum of squares about it."""
    mean = tl.sum(weight * shifted, AXIS) / tl.maximum(total, TINY)
    centred = shifted - tl.expand_dims(mean, AXIS)
    return mean, tl.sum(weight * centred * centred, AXIS)


@triton.jit
def _take(
    raw, state, first, second, columns, V, label, softcap,
    S: tl.constexpr, BV: tl.constexpr, METRIC: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Statistics of columns taken in: `state` (peak, sums of w = e^(z - peak) and of w² without the 1 of the likeliest
    word, logit of the label), and per tangent `first` (reference, mean, square) and `second` (mean, square under w²).

    The reference is ż of the likeliest word so far, which has no share in the mean: of a confident token the mean is
    what the other words leave, with all of its digits. Masks keep ``x * scale - reference`` from being fused.
    """
    SOFTMAX: tl.constexpr = HAS_LABELS or METRIC >= 2
    peak, rest, second_rest, label_logit = state
    valid = (columns < V)[None, :]
    z = raw[0]
    if HAS_SOFTCAP:
        z, slope = _cap(z, softcap)
    before, here, second_before, second_here, ties, decay = rest, rest, rest, rest, rest, rest
    w, at_peak, moved, started = z, valid, peak > peak, peak > peak
    if SOFTMAX:
        z = tl.where(valid, z, float("-inf"))
        if HAS_LABELS:
            label_logit += tl.sum(tl.where(columns[None, :] == label[:, None], z, 0.0), 1)
        higher = tl.maximum(peak, tl.max(z, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # only -inf so far
        decay = tl.exp(peak - finite)
        moved, started = higher > peak, peak > float("-inf")
        peak = higher
        w = tl.exp(z - finite[:, None])
        at_peak = z == finite[:, None]
        one = tl.where(at_peak, 1.0, 0.0)
        ties, others = tl.sum(one, 1), tl.sum(w - one, 1)
        here = others + ties
        before = (1.0 + rest) * decay
        rest = others + tl.where(moved, before + (ties - 1.0), rest + ties)
        if METRIC == 3:
            others = tl.sum(w * w - one, 1)
            second_here = others + ties
            second_before = (1.0 + second_rest) * decay * decay
            second_rest = others + tl.where(moved, second_before + (ties - 1.0), second_rest + ties)
    new_first, new_second = (), ()
    for k in tl.static_range(S - 1):
        z_tan = raw[k + 1]
        if HAS_SOFTCAP:
            z_tan *= slope
        reference, mean, square = first[k]
        if METRIC == 1:
            square += tl.sum(tl.where(valid, z_tan * z_tan, 0.0), 1)
        else:
            z_tan = tl.where(valid, z_tan, 0.0)
            found = tl.sum(tl.where(at_peak, z_tan, 0.0), 1) / tl.maximum(ties, 1.0)
            shift = tl.where(moved & started, reference - found, 0.0)
            reference = tl.where(moved, found, reference)
            shifted = z_tan - reference[:, None]
            m, s = _moments(w, here, shifted, 1)
            mean, square = _merge(before, mean + shift, square * decay, here, m, s)
            if METRIC == 3:
                second_mean, second_square = second[k]
                m, s = _moments(w * w, second_here, shifted, 1)
                new_second = new_second + (
                    _merge(
                        second_before, second_mean + shift, second_square * decay * decay, second_here, m, s
                    ),
                )
        new_first = new_first + ((reference, mean, square),)
    return (peak, rest, second_rest, label_logit), new_first, new_second


@triton.jit(
    do_not_specialize=["T", "h_rows", "kept_tokens", "ignore_index", "splits", "per_split", "tangent"]
)
def _head_fwd_kernel(
    h, weight, bias, labels, count, partial, at_label, kept,
    T, V, C, h_rows, h_stride, w_stride, kept_tokens, kept_stride,
    tangent, splits, per_split, ignore_index, scale, softcap,
    METRIC: tl.constexpr, S: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
    DESCRIPTOR: tl.constexpr, EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LABELS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_COUNT: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Statistics ``partial [fields, splits, T]`` of a block of tokens over one share of the vocabulary.

    Nothing is computed for tokens from number `count` on.

    `kept` ``[S, kept_tokens, kept_stride]`` has room for whole tiles. Fields: peak and sum of the others' weights (for
    a softmax), then that of their squares (``probs``), then per tangent the reference, mean and square (``logits``:
    only the square), and for ``probs`` mean and square under the squares.
    """
    K: tl.constexpr = S - 1
    BC: tl.constexpr = BV // PARTS
    SOFTMAX: tl.constexpr = HAS_LABELS or METRIC >= 2
    block, split = _place(tl.program_id(0), tl.cdiv(T, BT), splits, GROUP)
    counting = T
    if HAS_COUNT:
        counting = tl.load(count)
        if block * BT >= counting:
            return
    tokens = block * BT + tl.arange(0, BT)
    inside = tokens < counting
    row = tl.zeros((BT,), tl.float32)
    state = (row + float("-inf"), row - 1.0, row - 1.0, row)
    first, second = (), ()
    for _k in tl.static_range(K):
        first = first + ((row, row, row),)
        if METRIC == 3:
            second = second + ((row, row),)
    label = tokens
    if HAS_LABELS:
        label = _local_labels(labels, tokens, inside, V, ignore_index)
    first_block = split * per_split
    last_block = tl.minimum(first_block + per_split, tl.cdiv(V, BV))
    for b in range(first_block, last_block):
        word = b * BV
        raw = _raw(
            h, weight, bias, block * BT, word, T, V, C, h_rows, h_stride, w_stride, tangent, scale,
            S, BT, BV, BK, DESCRIPTOR, EVEN, HAS_BIAS, HAS_SCALE, PRECISION,
        )  # fmt: skip
        parts = _parts(raw, S, BT, BV, PARTS)
        for i in tl.static_range(PARTS):
            start = word + i * BC
            if KEEP:
                for s in tl.static_range(S):
                    to = (s * kept_tokens + tokens).to(tl.int64) * kept_stride + start
                    tl.store((kept + to)[:, None] + tl.arange(0, BC)[None, :], parts[i][s])
            state, first, second = _take(
                parts[i], state, first, second, start + tl.arange(0, BC), V, label, softcap,
                S, BC, METRIC, HAS_LABELS, HAS_SOFTCAP,
            )  # fmt: skip
    field = splits.to(tl.int64) * T
    to = partial + split.to(tl.int64) * T + tokens
    if SOFTMAX:
        tl.store(to, state[0], mask=inside)
        tl.store(to + field, state[1], mask=inside)
        to += 2 * field
    if METRIC == 3:
        tl.store(to, state[2], mask=inside)
        to += field
    for k in tl.static_range(K):
        if METRIC >= 2:
            tl.store(to, first[k][0], mask=inside)
            tl.store(to + field, first[k][1], mask=inside)
            to += 2 * field
        tl.store(to, first[k][2], mask=inside)
        to += field
        if METRIC == 3:
            tl.store(to, second[k][0], mask=inside)
            tl.store(to + field, second[k][1], mask=inside)
            to += 2 * field
    if HAS_LABELS:
        mine = inside & (label >= first_block * BV) & (label < last_block * BV)
        tl.store(at_label + tokens, state[3], mask=mine)


@triton.jit
def _cotangents(
    x_bar, z, z_tan, w, inverse, reference, mean, q, at_peak, g, slope, softcap,
    METRIC: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Adds one tangent's share to the cotangent `x_bar` of the logits before the cap, and gives the tangent's own.

    `at_peak` is p e - κ at the likeliest word (``probs``), whose own terms differ by less than their rounding.
    """
    p = w * inverse
    e = z_tan - reference - mean
    if METRIC == 1:
        z_bar = tl.zeros_like(p)
        z_tan_bar = 2.0 * g * z_tan
    elif METRIC == 2:
        pe = p * e
        z_bar = g * (e * pe - p * q)
        z_tan_bar = 2.0 * g * pe
    else:
        b = (w * e + mean) * inverse + at_peak
        twice = 2.0 * g * p
        z_bar = twice * (e * b - q)
        z_tan_bar = twice * b
    if HAS_SOFTCAP:
        z_bar = slope * z_bar - 2.0 / (softcap * softcap) * z * z_tan * z_tan_bar
        z_tan_bar *= slope
    if METRIC != 1 or HAS_SOFTCAP:
        x_bar += z_bar
    return x_bar, z_tan_bar


@triton.jit(
    do_not_specialize=[
        "T",
        "h_rows",
        "kept_tokens",
        "ignore_index",
        "first_column",
        "width",
        "stacks",
        "tangent",
    ]
)
def _head_bwd_kernel(
    h, weight, bias, labels, count, stats, q_bar, nll_bar, kept, z_bar, b_partial,
    T, V, C, h_rows, h_stride, w_stride, kept_tokens, kept_stride, z_stride,
    stacks, tangent, first_column, width, ignore_index, scale, softcap,
    METRIC: tl.constexpr, S: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
    DESCRIPTOR: tl.constexpr, EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NLL: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_COUNT: tl.constexpr, KEPT: tl.constexpr,
    NEED_BIAS: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Cotangents ``z_bar [S, T, width]`` of ``W h + b`` and its tangents, from the column `first_column` on.

    The logits are formed again, or read from `kept`. Rows of `z_bar` have room for whole tiles.
    ``b_partial [blocks of tokens, width]`` takes the sums over a block of tokens. Nothing is written for tokens from
    number `count` on, nor for blocks of them.
    """
    K: tl.constexpr = S - 1
    BC: tl.constexpr = BV // PARTS
    block, other = _place(tl.program_id(0), tl.cdiv(T, BT), tl.cdiv(width, BV), GROUP)
    counting = T
    if HAS_COUNT:
        counting = tl.load(count)
        if block * BT >= counting:
            return
    tokens = block * BT + tl.arange(0, BT)
    inside = tokens < counting
    store = inside[:, None]
    word = first_column + other * BV
    if KEPT:
        raw = ()
        for s in tl.static_range(S):
            at = (s * kept_tokens + tokens).to(tl.int64) * kept_stride + word
            raw = raw + (tl.load((kept + at)[:, None] + tl.arange(0, BV)[None, :]),)
    else:
        raw = _raw(
            h, weight, bias, block * BT, word, T, V, C, h_rows, h_stride, w_stride, tangent, scale,
            S, BT, BV, BK, DESCRIPTOR, EVEN, HAS_BIAS, HAS_SCALE, PRECISION,
        )  # fmt: skip
    parts = _parts(raw, S, BT, BV, PARTS)
    peak = tl.load(stats + tokens, mask=inside, other=float("inf"))[:, None]
    rest = tl.load(stats + T + tokens, mask=inside, other=0.0)[:, None]
    inverse = 1.0 / (1.0 + rest)
    for i in tl.static_range(PARTS):
        local = other * BV + i * BC
        z = parts[i][0]
        slope = z
        if HAS_SOFTCAP:
            z, slope = _cap(z, softcap)
        if HAS_SCALE or HAS_SOFTCAP:
            z = tl.where(store, z, 0.0)  # a mask keeps the product from being fused with the subtraction
        w = tl.exp(z - peak)
        x_bar = tl.zeros((BT, BC), tl.float32)
        if HAS_NLL:
            label = _local_labels(labels, tokens, inside, V, ignore_index)
            # a label that is ignored has no gradient, whatever arrives there
            n = tl.load(nll_bar + tokens, mask=inside & (label != -1), other=0.0)[:, None]
            columns = first_column + local + tl.arange(0, BC)
            is_label = columns[None, :] == label[:, None]
            x_bar = (n * inverse) * tl.where(is_label, (w - 1.0) - rest, w)
            if HAS_SOFTCAP:
                x_bar *= slope
        for k in tl.static_range(K):
            z_tan = parts[i][k + 1]
            if HAS_SOFTCAP:
                z_tan *= slope
            if HAS_SCALE or HAS_SOFTCAP:
                z_tan = tl.where(store, z_tan, 0.0)
            row = (tangent + k - 1).to(tl.int64) * T + tokens
            step = (stacks - 1).to(tl.int64) * T
            at = stats + 2 * T + row
            x_bar, x_tan_bar = _cotangents(
                x_bar,
                z,
                z_tan,
                w,
                inverse,
                tl.load(at, mask=inside, other=0.0)[:, None],
                tl.load(at + step, mask=inside, other=0.0)[:, None],
                tl.load(at + 2 * step, mask=inside, other=0.0)[:, None],
                tl.load(at + 3 * step, mask=inside, other=0.0)[:, None],
                tl.load(q_bar + row, mask=inside, other=0.0)[:, None],
                slope,
                softcap,
                METRIC,
                HAS_SOFTCAP,
            )
            to = z_bar + (((k + 1) * T + tokens).to(tl.int64) * z_stride + local)
            to = to[:, None] + tl.arange(0, BC)[None, :]
            if HAS_SCALE:
                x_tan_bar *= scale
            tl.store(to, x_tan_bar.to(z_bar.dtype.element_ty), mask=store)
        if HAS_SCALE:
            x_bar *= scale
        to = (z_bar + (tokens.to(tl.int64) * z_stride + local))[:, None] + tl.arange(0, BC)[None, :]
        tl.store(to, x_bar.to(z_bar.dtype.element_ty), mask=store)
        if NEED_BIAS:
            here = local + tl.arange(0, BC)
            sums = tl.sum(tl.where(store, x_bar, 0.0), 0)
            tl.store(b_partial + block.to(tl.int64) * width + here, sums, mask=here < width)
