"""The loss and its gradient at points x + δ of an attack, and the feasible points around x."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..autocast import no_autocast
from ..dual import Dual
from .attack_state import RandomState
from .checks import kind_of
from .projection import Ball
from .scopes import kept, widened

__all__ = ["Evaluator", "checked_losses", "input_gradient"]


def checked_losses(losses: Any, batch: int, name: str = "loss_fn") -> Any:
    """`losses`, a tensor or Dual ``[B]``.

    Raises:
        TypeError: they are no floating point tensor.
        ValueError: their shape is another one.
    """
    if not isinstance(losses, (Tensor, Dual)) or not losses.is_floating_point():
        raise TypeError(f"{name} must return a floating point tensor of losses, got {kind_of(losses)}.")
    if tuple(losses.shape) != (batch,):
        raise ValueError(
            f"{name} must return one loss per batch row, shape ({batch},), got {tuple(losses.shape)}: use "
            "reduction='none' and reduce over every axis but the first."
        )
    return losses


def input_gradient(losses: Tensor, point: Tensor) -> Tensor:
    """Gradient of the summed losses at `point`.

    Raises:
        ValueError: they do not depend on it.
    """
    gradient = None
    if losses.requires_grad:
        (gradient,) = torch.autograd.grad(losses.sum(), point, allow_unused=True)
    if gradient is None:
        raise ValueError(
            "the loss of loss_fn does not depend on its input: a detach(), a no-grad block or the clean input in place "
            "of the argument breaks the path."
        )
    return gradient


class Evaluator:
    """Losses, gradients and projections for the perturbations of one batch, all from one random state.

    Args:
        loss_fn: from a tensor like `x` to ``[B]``.
        x: the clean input.
        ball: the set of perturbations.
        keep: which entries may be attacked, broadcastable to `x`; None for all.
        project: applied after the ball's projection, or None.
        ranks: the process group whose ranks call the model equally often, or None.

    Attributes:
        wide: `x` in float32 or float64, as perturbations are.
        calls: evaluations with a gradient, and without.
    """

    def __init__(
        self,
        loss_fn: Callable[[Tensor], Tensor],
        x: Tensor,
        ball: Ball,
        keep: Tensor | None,
        project: Callable[[Tensor], Tensor] | None,
        ranks: Any,
    ) -> None:
        self.loss_fn, self.x, self.ball, self.keep = loss_fn, x, ball, keep
        self.project, self.ranks = project, ranks
        self.wide = widened(x)
        self.random = RandomState(x.device)
        self.calls = (0, 0)

    def point(self, delta: Tensor) -> Tensor:
        """x + δ in the dtype of x."""
        return (self.wide + delta).to(self.x.dtype)

    def gradient(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Losses ``[B]`` and their gradient, zero where nothing may be attacked."""
        self.calls = (self.calls[0] + 1, self.calls[1])
        point = self.point(delta).requires_grad_()
        # a copy may be changed in place, and hooks on what enters a module do not meet a leaf, where some are refused
        losses = self._losses(point.clone())
        with no_autocast(self.x.device.type):
            gradient = input_gradient(losses, point)
        return losses.detach(), kept(gradient.to(self.wide.dtype), self.keep)

    def loss(self, delta: Tensor) -> Tensor:
        """Losses ``[B]`` only."""
        self.calls = (self.calls[0], self.calls[1] + 1)
        with torch.no_grad():
            return self._losses(self.point(delta))

    def _losses(self, point: Tensor) -> Tensor:
        losses = checked_losses(self.random.replay(self.loss_fn, point), self.x.shape[0])
        if not isinstance(losses, Tensor):
            raise TypeError(
                "loss_fn must return a tensor of losses, got a Dual: captured Duals have no place there."
            )
        return losses

    def all(self, rows: Tensor) -> bool:
        """Whether it is true of all rows, on all ranks that have to agree."""
        if self.ranks is None:
            return bool(rows.all())
        everywhere = rows.all().int()
        torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MIN, group=self.ranks)
        return bool(everywhere)

    def step(self, delta: Tensor, direction: Tensor, step_size: Tensor) -> tuple[Tensor, Tensor]:
        """Π(δ + η s) for η ``[B]``, and whether the projection moved it, ``[B]``."""
        rows = (-1, *(1,) * (delta.dim() - 1))
        free = delta + direction * step_size.to(delta).reshape(rows)
        inside = self.feasible(free)
        # a projection of what is inside already may still round
        slack = 4 * torch.finfo(free.dtype).eps * free.abs().flatten(1).amax(-1)
        return inside, (inside - free).abs().flatten(1).amax(-1) > slack

    def feasible(self, delta: Tensor) -> Tensor:
        """Π(δ).

        Raises:
            TypeError, ValueError: `project` returns something other than a perturbation.
        """
        delta = self.ball.project(delta)
        if self.project is None:
            return delta
        with torch.no_grad():
            projected = self.project(delta)
        if isinstance(projected, Tensor) and not projected.is_floating_point():
            raise TypeError(f"project must return a floating-point perturbation, got {projected.dtype}.")
        if not isinstance(projected, Tensor) or projected.shape != delta.shape:
            got = tuple(projected.shape) if isinstance(projected, Tensor) else type(projected).__name__
            raise ValueError(f"project must return a perturbation of shape {tuple(delta.shape)}, got {got}.")
        return kept(projected.to(delta), self.keep)
