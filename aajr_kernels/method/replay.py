"""A recorded ascent once more, from its own start and from another one: how far trajectories separate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import probes
from .evaluator import Evaluator
from .projection import Ball
from .scopes import kept, widened
from .trajectory import Trajectory

__all__ = ["separation"]

#: largest distance from the recorded points, as a share of the recorded way
DEVIATION = 0.05


def separation(
    loss_fn: Callable[[Any], Any],
    traj: Trajectory,
    offset: Tensor,
    project: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """‖δ'ₜ − δₜ‖ of two ascents with the recorded step sizes, ``[T + 1, B]``; NaN where they start at one point.

    Both are computed anew, so that their rounding is alike; costs 2 T gradients of the loss.

    Args:
        loss_fn: the function that was maximised.
        traj: the trajectory.
        offset: δ'₀ − δ₀ before δ'₀ is projected, like x; zero where nothing may be attacked.
        project: of :func:`ascend`, where it had one.

    Raises:
        ValueError: the ascent from the recorded start does not come by the recorded points.
    """
    ball = Ball(traj.norm, traj.radius, traj.groups)
    evaluator = Evaluator(loss_fn, traj.x, ball, traj.mask, project, None)
    with torch.enable_grad():
        start = widened(traj.points[0]) - evaluator.wide
        first = _positions(evaluator, traj, start)
        _check_repeated(traj, first)
        moved = evaluator.feasible(start + kept(offset.to(start), traj.mask))
        second = _positions(evaluator, traj, moved)
    distances = torch.stack([probes.row_norm(b - a) for a, b in zip(first, second)])
    return torch.where(distances[:1] > 0, distances, torch.nan)


def _positions(evaluator: Evaluator, traj: Trajectory, delta: Tensor) -> list[Tensor]:
    """δ₀ to δ_T with the steps of the trajectory."""
    positions = [delta]
    for step_size in traj.step_sizes:
        _, gradient = evaluator.gradient(delta)
        unit = evaluator.ball.groups.unit(gradient)
        direction = {"raw": gradient, "normalized": unit, "sign": gradient.sign()}[traj.step]
        delta, _ = evaluator.step(delta, direction, step_size)
        positions.append(delta)
    return positions


def _check_repeated(traj: Trajectory, positions: list[Tensor]) -> None:
    way = torch.zeros(traj.x.shape[0], dtype=positions[0].dtype, device=traj.x.device)
    wide = widened(traj.x)
    for point, delta, displacement in zip(traj.points[1:], positions[1:], traj.displacements):
        way = way + probes.row_norm(displacement)
        away = probes.row_norm(wide + delta - widened(point))
        rounding = torch.finfo(traj.x.dtype).eps * probes.row_norm(point)
        if bool((away > DEVIATION * way + rounding).any()):
            raise ValueError(
                f"the recorded steps lead elsewhere when they are repeated, by {float(away.max()):.3g}: give nearby "
                "with project= as ascend had it, the same loss_fn, and the model in the mode of the ascent."
            )
