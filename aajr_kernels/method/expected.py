"""The cotangents that a penalty's backward will bring to the streamed head, known before the head has run.

They let the head compute its gradients in the forward, chunk of tokens by chunk of tokens. They serve speed only: the
backward compares them with what arrives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dual import Dual
from .options import PenaltyOptions

__all__ = ["expected_cotangents"]

Expected = Callable[[Tensor, slice], tuple[Tensor, Tensor | None]]


def expected_cotangents(hidden: Dual, options: PenaltyOptions, count: Any) -> Expected | None:
    """From q ``[K, t]`` of a slice of the flattened tokens to the cotangents of q and nll, or None if unknown.

    Args:
        hidden: input of the head, ``[*batch, C]``.
        options: of the penalty; with `labels`, ``penalty_weight · penalty + Σ nll / count`` is what is differentiated.
        count: divides the loss.
    """
    labels, weight, batch = options.labels, options.penalty_weight, tuple(hidden.shape[:-1])
    per_sequence = options.unit == "sequence" and len(batch) > 0
    if (
        hidden.device.type not in ("cpu", "cuda", "meta")
        or torch.compiler.is_compiling()
        or not torch.is_grad_enabled()
        or (labels is not None and weight is None)
        or options.reduction == "none"
        or (per_sequence and options.gamma is not None)
    ):
        return None
    keep = options.included(batch, hidden.device)
    factor = _factor(options, hidden.stacked[1:, ..., 0].detach())
    flat_keep = None if keep is None else keep.reshape(-1)
    loss_bar = None
    if labels is not None and weight is not None:
        factor *= float(weight)
        # at ignored labels too: the sum takes their zeros
        loss_bar = torch.ones(labels.numel(), device=hidden.device) / _number(count)

    def expected(q: Tensor, rows: slice) -> tuple[Tensor, Tensor | None]:
        bar = options.slope(q) * factor
        if flat_keep is not None:
            bar = torch.where(flat_keep[rows], bar, 0.0)
        return bar, None if loss_bar is None else loss_bar[rows]

    return expected


def _factor(options: PenaltyOptions, q: Tensor) -> float | Tensor:
    """The factor on the sum over units of any q ``[K, *batch]``; on its device if they are counted there."""
    if options.reduction == "sum":
        return 1.0
    units, keep = options.units(q)
    return 1.0 / (len(q) * _number(options.divisor(units[0].numel(), keep)))


def _number(x: Any) -> float | Tensor:
    """A float where that does not wait for an accelerator."""
    return x if isinstance(x, Tensor) and x.device.type != "cpu" else float(x)
