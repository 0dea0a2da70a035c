"""The attack on embeddings: ascents of several step sizes from several starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ascent import STEPS, ascend
from ..checks import check_choices, check_integers, check_number
from ..projection import NORMS
from ..scopes import SCOPES
from ..trajectory import Trajectory
from .scene import Found, Scene

__all__ = ["EmbeddingAttack", "check_radius", "check_step_size", "largest_on_the_way"]


def check_radius(radius: Any) -> None:
    """Raise unless it is a positive number."""
    check_number("radius", radius)
    if radius <= 0:
        raise ValueError(f"radius must be positive, got {radius}.")


def check_step_size(name: str, size: Any) -> None:
    """Raise unless it is ``"auto"`` or a positive number."""
    if isinstance(size, str):
        check_choices(("auto",), **{name: size})
        return
    check_number(name, size)
    if size <= 0:
        raise ValueError(f"{name} must be positive or 'auto', got {size}.")


def largest_on_the_way(ascents: list[Trajectory]) -> Tensor:
    """Largest loss of any ascent after 0, 1, ... steps, ``[T + 1, B]``."""
    return torch.stack([traj.losses for traj in ascents]).amax(0).cummax(0).values


@dataclass(frozen=True)
class EmbeddingAttack:
    """Projected gradient ascent on the embeddings, the largest loss at any point of any ascent.

    Attributes:
        radius: of the ball of every group of the scope.
        relative: `radius` counts in norms of a token: the root mean square of the norms of the batch's embedded tokens
            that are attended to (``norm="linf"``: of their entries). False: in the embedding's own units.
        steps: of every ascent.
        step_sizes: one ascent for each, in radii; or ``"auto"``, see :func:`~aajr_kernels.ascend`.
        restarts: of every ascent: the first from the tokens themselves, the others from uniform draws.
        scope, norm, step: of :func:`~aajr_kernels.ascend`.
    """

    radius: float = 0.1
    relative: bool = True
    steps: int = 20
    step_sizes: tuple[float | str, ...] = (0.5, 0.125)
    restarts: int = 1
    scope: str = "token"
    norm: str = "l2"
    step: str = "normalized"

    #: what an evaluation calls it
    name = "embedding"

    def __post_init__(self) -> None:
        check_radius(self.radius)
        check_integers(1, steps=self.steps, restarts=self.restarts)
        if isinstance(self.step_sizes, str) or not self.step_sizes:
            raise ValueError(
                f"step_sizes must be a sequence with an entry for every ascent, got {self.step_sizes!r}."
            )
        object.__setattr__(self, "step_sizes", tuple(self.step_sizes))
        for size in self.step_sizes:
            check_step_size("step_sizes", size)
        check_choices(SCOPES, scope=self.scope)
        check_choices(NORMS, norm=self.norm)
        check_choices(STEPS, step=self.step)

    def ascents(self, scene: Scene, generator: torch.Generator) -> list[Trajectory]:
        """One for every step size."""
        unit = scene.unit if self.relative else 1.0
        if self.norm == "linf" and self.relative:
            unit /= math.sqrt(scene.x.shape[-1])
        radius = self.radius * unit
        return [
            ascend(
                *(scene.loss, scene.x),
                radius=radius,
                steps=self.steps,
                step_size=size if isinstance(size, str) else size * radius,
                step=self.step,
                norm=self.norm,
                scope=self.scope,
                agents=scene.batch.agents,
                restarts=self.restarts,
                mask=scene.mask,
                generator=generator,
                module=scene.modules,
                eval_mode=bool(scene.modules),
            )
            for size in self.step_sizes
        ]

    def run(self, scene: Scene, generator: torch.Generator) -> Found:
        """The largest losses; `generator` draws the starts."""
        ascents = self.ascents(scene, generator)
        curve = largest_on_the_way(ascents)
        gradients, forwards = (sum(traj.evaluations[kind] for traj in ascents) for kind in (0, 1))
        return Found(curve[-1], curve, (gradients, forwards))
