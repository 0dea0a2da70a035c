# mypy: disable-error-code="no-untyped-def, assignment"
"""The second kernel of the streamed head's forward: shares of the vocabulary become statistics of all of it."""

from __future__ import annotations

import triton
import triton.language as tl

from ...backends.triton.math import log
from .triton_kernels import _merge, _moments


@triton.jit(do_not_specialize=["T", "splits", "ignore_index", "stacks", "tangent"])
def _head_merge_kernel(
    partial, labels, count, at_label, stats, nll, T, splits, ignore_index, stacks, tangent,
    METRIC: tl.constexpr, K: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_COUNT: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """The shares of the vocabulary become the statistics ``[2 + 4K, T]``, in a fixed order; and the token losses.

    They are zeros for tokens from number `count` on, whose shares are not read. The reference is that of the share with
    the likeliest word, from whose sums its weight of 1 is left out.
    """
    SOFTMAX: tl.constexpr = HAS_LABELS or METRIC >= 2
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    exists = tokens < T
    inside = exists
    if HAS_COUNT:
        inside = tokens < tl.load(count)
    row = tl.zeros((BT,), tl.float32)
    field = splits.to(tl.int64) * T
    peak = row + float("-inf")
    if SOFTMAX:
        for start in range(0, splits, BS):
            s = start + tl.arange(0, BS)
            at = s.to(tl.int64)[:, None] * T + tokens[None, :]
            valid = (s < splits)[:, None] & inside[None, :]
            peak = tl.maximum(peak, tl.max(tl.load(partial + at, mask=valid, other=float("-inf")), 0))
    finite = tl.where(peak == float("-inf"), 0.0, peak)
    all_rest, ties = row, row
    origin = tl.full((BT,), 2147483647, tl.int32)  # the first share with the likeliest word
    if SOFTMAX:
        for start in range(0, splits, BS):
            s = start + tl.arange(0, BS)
            at = s.to(tl.int64)[:, None] * T + tokens[None, :]
            valid = (s < splits)[:, None] & inside[None, :]
            part = tl.load(partial + at, mask=valid, other=float("-inf"))
            rest = tl.load(partial + field + at, mask=valid, other=0.0)
            highest = part == finite[None, :]
            all_rest += tl.sum(tl.where(highest, rest, (1.0 + rest) * tl.exp(part - finite[None, :])), 0)
            ties += tl.sum(tl.where(highest, 1.0, 0.0), 0)
            origin = tl.minimum(origin, tl.min(tl.where(highest, s[:, None], 2147483647), 0))
        all_rest = tl.where(inside, all_rest + (ties - 1.0), 0.0)
    all_total = 1.0 + all_rest
    tangents = stacks - 1
    for k in tl.static_range(K):
        total, mean, square = row, row, row
        second_total, second_mean, second_square = row, row, row
        reference = row
        if METRIC == 2:
            base = partial + (2 + 3 * k) * field
        elif METRIC == 3:
            base = partial + (3 + 5 * k) * field
        else:
            base = partial + (k + (2 if HAS_LABELS else 0)) * field
        second_rest = row
        if METRIC >= 2:
            reference = tl.load(
                base + origin.to(tl.int64) * T + tokens, mask=inside & (origin < splits), other=0.0
            )
        for start in range(0, splits, BS):
            s = start + tl.arange(0, BS)
            at = s.to(tl.int64)[:, None] * T + tokens[None, :]
            valid = (s < splits)[:, None] & inside[None, :]
            if SOFTMAX:
                part = tl.load(partial + at, mask=valid, other=float("-inf"))
                highest = part == finite[None, :]
                decay = tl.exp(part - finite[None, :])
                weight = (1.0 + tl.load(partial + field + at, mask=valid, other=0.0)) * decay
            if METRIC >= 2:
                shifted = tl.load(base + at, mask=valid, other=0.0) - reference[None, :]
                offset = shifted
                shifted += tl.load(base + field + at, mask=valid, other=0.0)
                w = tl.sum(weight, 0)
                m, q = _moments(weight, w, shifted, 0)
                q += tl.sum(tl.load(base + 2 * field + at, mask=valid, other=0.0) * decay, 0)
                mean, square = _merge(total, mean, square, w, m, q)
                total += w
                if METRIC == 3:
                    decay *= decay
                    rest = tl.load(partial + 2 * field + at, mask=valid, other=0.0)
                    weight = (1.0 + rest) * decay
                    second_rest += tl.sum(tl.where(highest, rest, weight), 0)
                    w = tl.sum(weight, 0)
                    offset += tl.load(base + 3 * field + at, mask=valid, other=0.0)
                    m, q = _moments(weight, w, offset, 0)
                    q += tl.sum(tl.load(base + 4 * field + at, mask=valid, other=0.0) * decay, 0)
                    second_mean, second_square = _merge(second_total, second_mean, second_square, w, m, q)
                    second_total += w
            if METRIC == 1:
                square += tl.sum(tl.load(base + at, mask=valid, other=0.0), 0)
        q = square
        slope = row
        if METRIC == 2:
            q = square / all_total
        elif METRIC == 3:
            norm = all_total * all_total
            second_rest = tl.where(inside, second_rest + (ties - 1.0), 0.0)
            mass = (1.0 + second_rest) / norm  # sum of p squared
            gap = second_mean - mean
            q = second_square / norm + mass * gap * gap
            slope = -((all_rest - second_rest) / norm * mean + mass * second_mean)
        to = stats + (1 + tangent + k).to(tl.int64) * T + tokens
        step = tangents.to(tl.int64) * T
        tl.store(to, reference, mask=exists)
        tl.store(to + step, mean, mask=exists)
        tl.store(to + 2 * step, q, mask=exists)
        tl.store(to + 3 * step, slope, mask=exists)
    peak = tl.where(inside, peak, 0.0) if SOFTMAX else row
    tl.store(stats + tokens, peak, mask=exists)
    tl.store(stats + T + tokens, all_rest, mask=exists)
    if HAS_LABELS:
        ignored = tl.load(labels + tokens, mask=inside, other=0) == ignore_index
        # log(1 + x) with the digits of a small x
        correction = (all_rest - (all_total - 1.0)) / all_total
        loss = log(all_total) + correction + (peak - tl.load(at_label + tokens, mask=inside, other=0.0))
        tl.store(nll + tokens, tl.where(ignored, 0.0, loss), mask=exists)
