"""The trajectory of an inner maximisation, as a record without a graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .scopes import Groups

__all__ = ["Trajectory"]

DIRECTIONS = ("ascent", "displacement", "sign")
PLACES = ("start", "mid", "end")


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Where an adversary went, T steps from ``x + δ_0`` to ``x + δ_T``; everything is detached.

    Attributes:
        x: the clean input, ``[B, ...]``.
        points: ``[T+1, *x.shape]``, x + δ_t.
        directions: ``[T, *x.shape]``, u_t: the gradient at ``points[t]``, scaled to Euclidean norm 1 in every group
            of the scope; zero where it is zero or where nothing may be attacked.
        displacements: ``[T, *x.shape]``, δ_{t+1} − δ_t as realised, after projection.
        losses: ``[T+1, B]`` at `points`; the last row is NaN where ``evaluate_last=False`` left it out.
        gradient_norms: ``[T, B, G]``, Euclidean norm of the gradient in every group.
        step_sizes: ``[T, B]``, the factor on the step's direction that was used; 0 for a row that stayed.
        projected: ``[T, B]``, bool: the projection moved the step.
        radius: a number, ``[B, 1]`` or ``[B, G]``.
        norm, scope, step: of :func:`ascend`.
        mask: bool, broadcastable to `x`: what could be attacked; None for everything.
        agents: ``[*x.shape[:-1]]``, or None.
        gradients: ``[T+1, *x.shape]``, the gradients at `points`, where they were kept.
        evaluations: calls of the loss: with a gradient, and without; of all restarts together.
    """

    x: Tensor
    points: Tensor
    directions: Tensor
    displacements: Tensor
    losses: Tensor
    gradient_norms: Tensor
    step_sizes: Tensor
    projected: Tensor
    radius: float | Tensor
    norm: str = "l2"
    scope: str = "sequence"
    step: str = "normalized"
    mask: Tensor | None = None
    agents: Tensor | None = None
    gradients: Tensor | None = None
    evaluations: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        """T, the number of steps."""
        return self.directions.shape[0]

    @property
    def groups(self) -> Groups:
        """The groups of the scope."""
        return Groups(self.scope, self.x.shape, self.agents)

    @property
    def worst_index(self) -> Tensor:
        """``[B]``, the point of largest loss of every batch row; the last one where its loss was not evaluated."""
        return torch.where(self.losses.isnan(), torch.inf, self.losses).argmax(0)

    @property
    def worst(self) -> Tensor:
        """Like `x`: every batch row at its point of largest loss (see `worst_index`)."""
        return self.at(self.worst_index)

    @property
    def worst_loss(self) -> Tensor:
        """``[B]``, the loss at `worst`; NaN where it was not evaluated."""
        return self.losses.gather(0, self.worst_index.unsqueeze(0)).squeeze(0)

    def at(self, index: Tensor) -> Tensor:
        """The points ``index[b]`` of every batch row b, like `x`."""
        return pick(self.points, index)


def pick(values: Tensor, index: Tensor) -> Tensor:
    """``values[index[b], b]`` for every batch row: from ``[S, B, ...]`` and ``[B]`` to ``[B, ...]``."""
    return values[index, torch.arange(values.shape[1], device=values.device)]
