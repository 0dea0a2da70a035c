"""The streamed head on the native CPU kernels; contracts are those of :mod:`.reference`."""

from __future__ import annotations

import torch

from ... import native

_METRICS = {"l2": 0, "logits": 1, "fisher": 2, "probs": 3}


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
    stacks, tokens, _ = h.shape
    k = stacks - 1
    stats = h.new_empty((2 + 4 * k, tokens), dtype=torch.float32)
    nll = None if labels is None else stats.new_empty(tokens)
    native.call(
        "head_fwd",
        (*_operands(h, weight, bias, labels), stats, nll),
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
    h_bar = torch.empty(h.shape, dtype=h.dtype) if need_h else None
    w_bar = torch.empty(weight.shape, dtype=weight.dtype) if need_weight else None
    b_bar = torch.empty(weight.shape[0], dtype=torch.float32) if need_bias else None
    native.call(
        "head_bwd",
        (
            *_operands(h, weight, bias, labels),
            stats,
            *(None if g is None else g.float().contiguous() for g in (q_bar, nll_bar)),
            h_bar,
            w_bar,
            b_bar,
        ),
        (_METRICS[metric], ignore_index),
        (scale, softcap or 0.0),
    )
    return h_bar, w_bar, b_bar


def _operands(
    h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    return (
        native.row_dense(h),
        native.row_dense(weight),
        None if bias is None else bias.contiguous(),
        None if labels is None else labels.contiguous(),
    )
