"""Counts that the means of a training step divide by, over its micro-batches and processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..method.baselines import NEEDS_LOSS
from ..method.batch import Prepared
from .config import ObjectiveConfig

__all__ = ["Counts", "units_of"]


@dataclass(frozen=True)
class Counts:
    """Of a whole step: tokens that are learnt, units that the penalty is a mean over, rows, tokens attended to.

    Attributes:
        processes: whose batches are counted. Gradients are averaged over them, so that each contributes its share of
            the sum this many times.
    """

    tokens: int
    units: int
    rows: int
    attended: int
    processes: int = 1

    def of_tokens(self, which: str) -> int:
        """Those with a label (``"loss"``), or all that are attended to, at least 1."""
        return self.tokens if which == "loss" else max(self.attended, 1)

    @classmethod
    def of(
        cls,
        batches: Sequence[Prepared],
        config: ObjectiveConfig,
        group: Any = None,
        device: torch.device | None = None,
    ) -> Counts:
        """Count.

        Args:
            batches: the micro-batches of this process.
            config: says what the units are.
            group: of processes whose batches are counted too, all of which call this; None for this one.
            device: for their sum.

        Raises:
            ValueError: there is nothing to learn.
        """
        tokens = sum(int(b.masks[0].sum()) for b in batches)
        attended = sum(int(b.masks[1].sum()) for b in batches)
        rows = sum(b.labels.shape[0] for b in batches)
        units = rows if config.penalty.method in NEEDS_LOSS else sum(units_of(b, config) for b in batches)
        if group is not None:
            total = torch.tensor([tokens, units, rows, attended], device=device)
            torch.distributed.all_reduce(total, group=group)
            tokens, units, rows, attended = map(int, total.tolist())
        if tokens == 0:
            raise ValueError(
                "labels must name at least one token to be learnt in every step, got none: check the attention mask "
                "and the labels, and that sequences are longer than one token."
            )
        return cls(tokens, max(units, 1), rows, attended, 1 if group is None else group.size())


def units_of(batch: Prepared, config: ObjectiveConfig) -> int:
    """Included tokens or sequences of a micro-batch."""
    learnt, attended, _ = batch.masks
    keep = learnt if config.penalty.tokens == "loss" else attended
    return int(keep.any(-1).sum() if config.unit == "sequence" else keep.sum())
