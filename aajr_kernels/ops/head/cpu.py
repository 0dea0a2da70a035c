"""The streamed head on the native CPU kernels; contracts are those of :mod:`.reference`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...backends import cpu as native
from . import operators

_METRICS = {"l2": 0, "logits": 1, "fisher": 2, "probs": 3}
#: columns (stacks times tokens) and bytes of the logits that are kept between the two halves of a joint pass: below
#: `_LEAST` columns the gradient of the weight would be read and written too often
_COLUMNS, _LEAST, _BYTES = 288, 128, 96 << 20


@native.operator(operators.HEAD_FWD)
def head_fwd(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor | None,
    metric: str,
    scale: float,
    softcap: float | None,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """q ``[K, T]``, nll ``[T]`` or None, and statistics ``[2 + 4K, T]``; float32."""
    return _forward(h, weight, bias, labels, metric, scale, softcap, ignore_index, None)


def _forward(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor | None,
    metric: str,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    kept: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """:func:`head_fwd`, which also leaves its logits in `kept`."""
    stacks, tokens, _ = h.shape
    k = stacks - 1
    stats = h.new_empty((2 + 4 * k, tokens), dtype=torch.float32)
    nll = None if labels is None else stats.new_empty(tokens)
    native.call(
        "head_fwd",
        (*_operands(h, weight, bias, labels), stats, nll, kept),
        (_METRICS[metric], ignore_index),
        (scale, softcap or 0.0),
    )
    return stats[2 + 2 * k : 2 + 3 * k].clone(), nll, stats


def head_bwd(
    q_bar: torch.Tensor | None,
    nll_bar: torch.Tensor | None,
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor | None,
    stats: torch.Tensor,
    metric: str,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    need_h: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Cotangents of h ``[1 + K, T, C]``, weight ``[V, C]`` and bias ``[V]`` (float32); None where not needed."""
    operands = (h, weight, bias, labels, metric, scale, softcap, ignore_index)
    h_bar, weight_bar, bias_bar = _head_bwd(*operands, q_bar, nll_bar, stats, need_h, need_weight, need_bias)
    return h_bar, weight_bar, bias_bar


@native.operator(operators.HEAD_BWD)
def _head_bwd(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor | None,
    metric: str,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    q_bar: torch.Tensor | None,
    nll_bar: torch.Tensor | None,
    stats: torch.Tensor,
    need_h: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    outputs = _outputs(h, weight, need_h, need_weight, need_bias)
    native.call(
        "head_bwd",
        (*_operands(h, weight, bias, labels), stats, *_cotangents(q_bar, nll_bar), *outputs, None),
        (_METRICS[metric], ignore_index, 0),
        (scale, softcap or 0.0),
    )
    return outputs


def head_joint(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor | None,
    metric: str,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    expected: Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor | None]],
    need_h: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor], tuple[torch.Tensor | None, ...]] | None:
    """Forward and backward of chunks of tokens, whose logits are kept in between: 6 products instead of 8 for K = 1.

    Args:
        expected: from q ``[K, t]`` of the tokens of a slice to the cotangents of q and nll.

    Returns:
        What `head_fwd` returns, and ``(q_bar, nll_bar, h_bar, weight_bar, bias_bar)``; None where it would not pay or
        is not supported: many words, a soft cap, low dtypes (they cannot hold the sum over chunks), metric l2.
    """
    stacks, tokens, _ = h.shape
    vocab_size = weight.shape[0]
    columns = min(_COLUMNS, _BYTES // (4 * vocab_size) - 32)
    step = columns // stacks
    if (
        metric == "l2"
        or softcap is not None
        or h.dtype != torch.float32
        or tokens == 0
        or columns < _LEAST
        or step < 16
    ):
        return None
    step = -(-tokens // -(-tokens // step))  # equal chunks
    kept = h.new_empty(vocab_size * (stacks * (step + 16) + 64))
    outputs = _outputs(h, weight, need_h, need_weight, need_bias)
    results, cotangents = [], []
    for start in range(0, tokens, step):
        rows = slice(start, min(start + step, tokens))
        here = None if labels is None else labels[rows]
        results.append(_forward(h[:, rows], weight, bias, here, metric, scale, softcap, ignore_index, kept))
        cotangents.append(_cotangents(*expected(results[-1][0], rows)))
        part = h.new_empty(h[:, rows].shape) if need_h else None
        native.call(
            "head_bwd",
            (
                *_operands(h[:, rows], weight, bias, here),
                results[-1][2],
                *cotangents[-1],
                part,
                *outputs[1:],
                kept,
            ),
            (_METRICS[metric], ignore_index, int(start > 0)),
            (scale, 0.0),
        )
        if outputs[0] is not None and part is not None:
            outputs[0][:, rows] = part
    q, stats = _joined([q for q, _, _ in results]), _joined([stats for _, _, stats in results])
    assert q is not None and stats is not None
    nll = _joined([nll for _, nll, _ in results])
    q_bar, nll_bar = (
        _joined([q_bar for q_bar, _ in cotangents]),
        _joined([nll_bar for _, nll_bar in cotangents]),
    )
    return (q, nll, stats), (q_bar, nll_bar, *outputs)


def _joined(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
    """The chunks along the tokens, None if they are."""
    present = [part for part in parts if part is not None]
    return torch.cat(present, -1) if present else None


def _outputs(
    h: torch.Tensor, weight: torch.Tensor, need_h: bool, need_weight: bool, need_bias: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    return (
        torch.empty(h.shape, dtype=h.dtype) if need_h else None,
        torch.empty(weight.shape, dtype=weight.dtype) if need_weight else None,
        torch.empty(weight.shape[0], dtype=torch.float32) if need_bias else None,
    )


def _cotangents(*bars: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    return tuple(None if bar is None else bar.float().contiguous() for bar in bars)


def _operands(
    h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    return (
        native.row_dense(h),
        native.row_dense(weight),
        None if bias is None else bias.contiguous(),
        None if labels is None else labels.contiguous(),
    )
