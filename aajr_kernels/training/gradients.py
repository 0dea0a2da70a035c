"""Gradients of a training step: that of the penalty apart where it is clipped apart, norms of whole parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from .objective import Terms
from .shards import whole

__all__ = ["Gradients", "over_processes"]


class Gradients:
    """Of the parameters that a step changes, sharded or not.

    Args:
        parameters: of the optimizer.
        limit: largest norm of all, or of the losses alone with `penalty_limit`; None for no limit.
        penalty_limit: largest norm of the penalty's gradient, which is then clipped apart.
    """

    def __init__(
        self, parameters: list[nn.Parameter], limit: float | None, penalty_limit: float | None
    ) -> None:
        self.parameters, self.limit, self.penalty_limit = parameters, limit, penalty_limit
        self._of_penalty: list[Tensor | None] = [None] * len(parameters)

    def add(self, terms: Terms) -> None:
        """Of a micro-batch."""
        if self.penalty_limit is None or terms.penalty is None:
            terms.total.backward()
            return
        # not autograd.grad, for which sharded parameters are no part of the graph
        before = [p.grad for p in self.parameters]
        self._put(self._of_penalty)
        terms.penalty.backward(retain_graph=True)
        self._of_penalty = [p.grad for p in self.parameters]
        self._put(before)
        (terms.total - terms.penalty).backward()

    def _put(self, gradients: list[Tensor | None]) -> None:
        for p, gradient in zip(self.parameters, gradients):
            p.grad = gradient

    def clip(self) -> dict[str, float]:
        """Clip, and add up what was apart; the norms before, by their names in rows."""
        norm = whole(get_total_norm([p.grad for p in self.parameters if p.grad is not None]))
        clip_grads_with_norm_(self.parameters, self.limit or math.inf, norm)
        norms = {"gradient_norm": float(norm)}
        if self.penalty_limit is not None:
            norms["penalty_gradient_norm"] = self._add_penalty(self.penalty_limit)
        return norms

    def _add_penalty(self, limit: float) -> float:
        present = [(p, g) for p, g in zip(self.parameters, self._of_penalty) if g is not None]
        if not present:
            return 0.0
        norm = whole(get_total_norm([g for _, g in present]))
        for p, g in present:
            g = g * (limit / (norm + 1e-6)).clamp(max=1.0)
            p.grad = g if p.grad is None else p.grad + g
        return float(norm)


def over_processes(parts: Mapping[str, list[Tensor]], group: Any, device: torch.device) -> dict[str, float]:
    """Sums over the micro-batches and the processes of a group; the largest of what ends in ``_max``."""
    numbers: dict[str, float] = {}
    for is_largest in (False, True):
        names = [name for name in parts if name.endswith("_max") == is_largest]
        columns = [torch.stack(parts[name]) for name in names]
        values = [float(column.max() if is_largest else column.sum()) for column in columns]
        if names and group is not None:
            totals = torch.tensor(values, dtype=torch.float64, device=device)
            kind = torch.distributed.ReduceOp.MAX if is_largest else torch.distributed.ReduceOp.SUM
            torch.distributed.all_reduce(totals, kind, group=group)
            values = totals.tolist()
        numbers.update(zip(names, values))
    return numbers
