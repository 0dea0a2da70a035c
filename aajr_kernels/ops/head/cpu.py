"""The streamed head on the native CPU kernels; contracts are those of :mod:`.reference`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...backends import cpu as native
from . import operators
from .joint import Expected, Forward, Joint, Optional, blockwise
from .reference import Problem

_METRICS = {"l2": 0, "logits": 1, "fisher": 2, "probs": 3}
#: columns (stacks times tokens) and bytes of the logits that are kept between the two halves of a joint pass: below
#: `_LEAST` columns the gradient of the weight would be read and written too often
_COLUMNS, _LEAST, _BYTES = 288, 128, 96 << 20


@native.operator(operators.HEAD_FWD)
def head_fwd(*operands: Any) -> Forward:
    """q ``[K, T]``, nll ``[T]`` or None, and statistics ``[2 + 4K, T]``; float32."""
    p = Problem(*operands)
    if p.count is None or native.is_dry():
        return _forward(p, None)
    q, nll, stats = _forward(_front(p), None)
    return _padded(q, p), None if nll is None else _padded(nll, p), _padded(stats, p)


@native.operator(operators.HEAD_BWD)
def head_bwd(*args: Any) -> tuple[Optional, Optional, Optional]:
    """As the reference's; the cotangent of the bias in float32."""
    p = Problem(*args[:9])
    q_bar, nll_bar, stats, *needs = args[9:]
    front = p
    if p.count is not None and not native.is_dry():
        front = _front(p)
        q_bar, nll_bar, stats = (
            None if x is None else x[..., : front.tokens] for x in (q_bar, nll_bar, stats)
        )
    outputs = _outputs(front, *needs)
    _backward(front, stats.contiguous(), q_bar, nll_bar, outputs, None, False)
    if front is p or outputs[0] is None:
        return outputs
    return _padded(outputs[0], p, 1), *outputs[1:]


def head_joint(*args: Any) -> Joint | None:
    """Forward and backward of chunks of tokens, whose logits are kept in between: 6 products instead of 8 for K = 1.

    Args:
        args: the operands of `head_fwd`, a function from q ``[K, t]`` of the tokens of a slice to the cotangents of q
            and nll, and which results are needed: of h, the weight, the bias.

    Returns:
        The results of `head_fwd`, and ``(q_bar, nll_bar, h_bar, weight_bar, bias_bar)``; None where it would not pay
        or is not supported: a large vocabulary, a soft cap, low dtypes (they cannot hold the sum over chunks), metric
        l2.
    """
    p = Problem(*args[:9])
    expected: Expected = args[9]
    columns = min(_COLUMNS, _BYTES // (4 * p.vocab_size) - 32)
    step = columns // p.stacks
    if (
        p.metric == "l2"
        or p.softcap is not None
        or p.h.dtype != torch.float32
        or p.tokens == 0
        or p.count is not None
        or columns < _LEAST
        or step < 16
    ):
        return None
    step = -(-p.tokens // -(-p.tokens // step))  # equal chunks
    logits = p.h.new_empty(p.vocab_size * (p.stacks * (step + 16) + 64))
    h_bar, weight_bar, bias_bar = _outputs(p, *args[10:])

    def backward(block: Problem, rows: slice, stats: Tensor, q_bar: Optional, nll_bar: Optional) -> None:
        part = None if h_bar is None else block.h.new_empty(block.h.shape)
        _backward(block, stats, q_bar, nll_bar, (part, weight_bar, bias_bar), logits, rows.start > 0)
        if h_bar is not None and part is not None:
            h_bar[:, rows] = part

    results, bars = blockwise(p, step, expected, lambda block: _forward(block, logits), backward)
    return results, (*bars, h_bar, weight_bar, bias_bar)


def _front(p: Problem) -> Problem:
    """The tokens that count."""
    assert p.count is not None  # the caller looked
    return replace(p.block(slice(0, int(p.count))), count=None)


def _padded(x: Tensor, p: Problem, axis: int = -1) -> Tensor:
    """The results of the tokens that count, with zeros for the others."""
    shape = list(x.shape)
    shape[axis] = p.tokens
    padded = x.new_zeros(shape)
    padded.narrow(axis, 0, x.shape[axis]).copy_(x)
    return padded


def _forward(p: Problem, logits: Optional) -> Forward:
    """The forward, which also leaves its logits in `logits`."""
    k = p.stacks - 1
    stats = p.h.new_empty((2 + 4 * k, p.tokens), dtype=torch.float32)
    nll = None if p.labels is None else stats.new_empty(p.tokens)
    native.call(
        "head_fwd",
        (*_operands(p), stats, nll, logits),
        (_METRICS[p.metric], p.ignore_index),
        (p.scale, p.softcap or 0.0),
    )
    return stats[2 + 2 * k : 2 + 3 * k].clone(), nll, stats


def _backward(
    p: Problem,
    stats: Tensor,
    q_bar: Optional,
    nll_bar: Optional,
    outputs: tuple[Optional, ...],
    logits: Optional,
    accumulate: bool,
) -> None:
    """Writes the cotangents of h, weight and bias, or adds to the latter two; `logits` as the forward left them."""
    q_bar, nll_bar = (None if bar is None else bar.float().contiguous() for bar in (q_bar, nll_bar))
    native.call(
        "head_bwd",
        (*_operands(p), stats, q_bar, nll_bar, *outputs, logits),
        (_METRICS[p.metric], p.ignore_index, accumulate),
        (p.scale, p.softcap or 0.0),
    )


def _outputs(
    p: Problem, need_h: bool, need_weight: bool, need_bias: bool
) -> tuple[Optional, Optional, Optional]:
    return (
        torch.empty(p.h.shape, dtype=p.h.dtype) if need_h else None,
        torch.empty(p.weight.shape, dtype=p.weight.dtype) if need_weight else None,
        torch.empty(p.vocab_size, dtype=torch.float32) if need_bias else None,
    )


def _operands(p: Problem) -> tuple[Optional, ...]:
    return (
        native.row_dense(p.h),
        native.row_dense(p.weight),
        None if p.bias is None else p.bias.contiguous(),
        None if p.labels is None else p.labels.contiguous(),
    )
