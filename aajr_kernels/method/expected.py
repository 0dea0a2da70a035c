"""The cotangents that a penalty's backward will bring to the streamed head, known before the head has run.

They let the head compute its gradients in the forward, chunk of tokens by chunk of tokens. They are a matter of speed
alone: the backward compares them with what arrives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..dual import Dual
from .directions import included

__all__ = ["Reduction", "expected_cotangents"]

Expected = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True)
class Reduction:
    """How q becomes the penalty; the arguments of the same names of ``aligned_penalty``."""

    gamma: float | None
    form: str
    mask: torch.Tensor | None
    unit: str
    reduction: str
    denominator: Any

    def slope(self, q: torch.Tensor) -> torch.Tensor:
        """Derivative of the form at every q."""
        if self.gamma is None:
            return torch.ones_like(q)
        if self.form == "squared":
            return (q - self.gamma**2 > 0).to(q.dtype)
        root = torch.where(q > 0, q, 1.0).sqrt()
        excess = torch.where(q > 0, root - self.gamma, 0.0)
        if self.form == "hinge":
            return torch.where(excess > 0, 0.5 / root, 0.0)
        return torch.where(excess > 0, excess / root, 0.0)

    def factor(self, stacks: int, batch: tuple[int, ...], keep: torch.Tensor | None) -> float | torch.Tensor:
        """What multiplies the sum over units; on the device of `keep` if it is counted there."""
        if self.reduction == "sum":
            return 1.0
        denominator = self.denominator
        if denominator is None:
            if self.unit == "sequence" and len(batch) > 1:
                units = batch[0] if keep is None else keep.flatten(1).any(-1).sum()
            else:
                units = math.prod(batch) if keep is None else keep.sum()
            denominator = units.clamp(min=1) if isinstance(units, torch.Tensor) else max(units, 1)
        return 1.0 / (stacks * _number(denominator))


def _number(x: Any) -> float | torch.Tensor:
    """A float where that does not wait for an accelerator."""
    return x if isinstance(x, torch.Tensor) and x.device.type != "cpu" else float(x)


def expected_cotangents(
    hidden: Dual,
    shape: Reduction,
    labels: torch.Tensor | None,
    count: Any,
    penalty_weight: float | None,
) -> Expected | None:
    """From q ``[K, t]`` of a slice of the flattened tokens to the cotangents of q and nll, or None if unknown.

    Args:
        hidden: what enters the head, ``[*batch, C]``.
        shape: how q becomes the penalty.
        labels: ``[*batch]``; then ``penalty_weight · penalty + Σ nll / count`` is what is differentiated.
        count: divides the loss.
        penalty_weight: None if unknown.
    """
    if (
        hidden.device.type not in ("cpu", "cuda")
        or torch.compiler.is_compiling()
        or not torch.is_grad_enabled()
    ):
        return None
    batch = tuple(hidden.shape[:-1])
    per_sequence = shape.unit == "sequence" and len(batch) > 0
    unknown = labels is not None and penalty_weight is None
    if unknown or shape.reduction == "none" or (per_sequence and shape.gamma is not None):
        return None
    keep = None if shape.mask is None else included(shape.mask, batch, "mask").to(hidden.device)
    factor = shape.factor(hidden.num_tangents, batch, keep)
    flat_keep = None if keep is None else keep.reshape(-1)
    loss_bar = None
    if labels is not None and penalty_weight is not None:
        factor *= float(penalty_weight)
        # at ignored labels too: the sum takes their zeros
        loss_bar = torch.ones(labels.numel(), device=hidden.device) / _number(count)

    def expected(q: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        bar = shape.slope(q) * factor
        if flat_keep is not None:
            bar = torch.where(flat_keep[rows], bar, 0.0)
        return bar, None if loss_bar is None else loss_bar[rows]

    return expected
