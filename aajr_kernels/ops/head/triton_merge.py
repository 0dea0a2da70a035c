# mypy: disable-error-code="no-untyped-def, assignment"
"""The second kernel of the streamed head's forward: shares of the vocabulary become statistics of all of it."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kernels import _merge, _moments


@triton.jit(do_not_specialize=["T", "splits", "ignore_index", "stacks", "tangent"])
def _head_merge_kernel(
    partial, labels, count, at_label, stats, nll, T, splits, ignore_index, stacks, tangent,
    METRIC: tl.constexpr, K: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_COUNT: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """The shares of the vocabulary become the statistics ``[2 + 4K, T]``, in a fixed order; and the token losses.

    All but the total, 1, are zeros for tokens from number `count` on, whose shares are not read.
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
    all_total = row + 1.0
    tangents = stacks - 1
    for k in tl.static_range(K if METRIC >= 1 else 1):
        total, mean, square = row, row, row
        second_total, second_mean, second_square = row, row, row
        reference = row
        if METRIC == 2:
            base = partial + (2 + 3 * k) * field
        elif METRIC == 3:
            base = partial + (3 + 5 * k) * field
        else:
            base = partial + (k + (2 if HAS_LABELS else 0)) * field
        if METRIC >= 2:
            reference = tl.load(base + tokens, mask=inside, other=0.0)  # of the first share
        for start in range(0, splits, BS):
            s = start + tl.arange(0, BS)
            at = s.to(tl.int64)[:, None] * T + tokens[None, :]
            valid = (s < splits)[:, None] & inside[None, :]
            if SOFTMAX:
                decay = tl.exp(tl.load(partial + at, mask=valid, other=float("-inf")) - finite[None, :])
                weight = tl.load(partial + field + at, mask=valid, other=0.0) * decay
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
                    weight = tl.load(partial + 2 * field + at, mask=valid, other=0.0) * decay
                    w = tl.sum(weight, 0)
                    offset += tl.load(base + 3 * field + at, mask=valid, other=0.0)
                    m, q = _moments(weight, w, offset, 0)
                    q += tl.sum(tl.load(base + 4 * field + at, mask=valid, other=0.0) * decay, 0)
                    second_mean, second_square = _merge(second_total, second_mean, second_square, w, m, q)
                    second_total += w
            elif SOFTMAX:
                total += tl.sum(weight, 0)
            if METRIC == 1:
                square += tl.sum(tl.load(base + at, mask=valid, other=0.0), 0)
        if SOFTMAX:
            total = tl.where(inside, total, 1.0)
            all_total = total
        if METRIC >= 1:
            q = square
            kappa = row
            if METRIC == 2:
                q = square / total
            elif METRIC == 3:
                mass = second_total / (total * total)  # sum of p squared
                gap = second_mean - mean
                q = second_square / (total * total) + mass * gap * gap
                kappa = mass * gap
            to = stats + (1 + tangent + k).to(tl.int64) * T + tokens
            step = tangents.to(tl.int64) * T
            tl.store(to, reference, mask=exists)
            tl.store(to + step, mean, mask=exists)
            tl.store(to + 2 * step, q, mask=exists)
            tl.store(to + 3 * step, kappa, mask=exists)
    peak = tl.where(inside, peak, 0.0) if SOFTMAX else row
    tl.store(stats + tokens, peak, mask=exists)
    tl.store(stats + T + tokens, all_total, mask=exists)
    if HAS_LABELS:
        ignored = tl.load(labels + tokens, mask=inside, other=0) == ignore_index
        loss = tl.log(all_total) + (peak - tl.load(at_label + tokens, mask=inside, other=0.0))
        tl.store(nll + tokens, tl.where(ignored, 0.0, loss), mask=exists)
