"""The attack on embeddings: ascents of several step sizes from several starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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

__all__ = [
    "EmbeddingAttack",
    "ascents_of",
    "check_ascents",
    "check_radius",
    "check_step_size",
    "found_by",
]


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


def _checked_step_sizes(sizes: Any) -> tuple[float | str, ...]:
    """Them as a tuple.

    Raises:
        TypeError, ValueError: there is none, or one is neither ``"auto"`` nor a positive number.
    """
    if isinstance(sizes, str) or not isinstance(sizes, Sequence) or not sizes:
        raise ValueError(f"step_sizes must be a sequence with an entry for every ascent, got {sizes!r}.")
    for size in sizes:
        check_step_size("step_sizes", size)
    return tuple(sizes)


def check_ascents(attack: Any) -> None:
    """Raise where an entry that all attacks by ascents have is wrong; `step_sizes` become a tuple."""
    check_radius(attack.radius)
    check_integers(1, steps=attack.steps, restarts=attack.restarts)
    object.__setattr__(attack, "step_sizes", _checked_step_sizes(attack.step_sizes))
    check_choices(SCOPES, scope=attack.scope)
    check_choices(STEPS, step=attack.step)


def ascents_of(
    scene: Scene,
    loss: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    radius: float,
    step_sizes: tuple[float | str, ...],
    **options: Any,
) -> list[Trajectory]:
    """An ascent on `loss` from `x` for every step size, in radii; `options` of :func:`~aajr_kernels.ascend`.

    Where the loss has no gradient at the clean input all start from uniform draws.
    """
    return [
        ascend(
            *(loss, x),
            radius=radius,
            step_size=size if isinstance(size, str) else size * radius,
            module=scene.modules,
            eval_mode=bool(scene.modules),
            init="uniform" if scene.is_flat else "zero",
            **options,
        )
        for size in step_sizes
    ]


def found_by(ascents: list[Trajectory], more: int = 0) -> Found:
    """The largest losses at any point of any ascent, after 0, 1, ... steps; `more` forwards were made beside theirs."""
    curve = torch.stack([traj.losses for traj in ascents]).amax(0).cummax(0).values
    gradients, forwards = (sum(traj.evaluations[kind] for traj in ascents) for kind in (0, 1))
    return Found(curve[-1], curve, (gradients, forwards + more))


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

    #: name of its results in an evaluation
    name = "embedding"

    def __post_init__(self) -> None:
        check_ascents(self)
        check_choices(NORMS, norm=self.norm)

    def ascents(self, scene: Scene, generator: torch.Generator) -> list[Trajectory]:
        """One for every step size."""
        unit = scene.unit if self.relative else 1.0
        if self.norm == "linf" and self.relative:
            unit /= math.sqrt(scene.x.shape[-1])
        return ascents_of(
            scene,
            scene.loss,
            scene.x,
            radius=self.radius * unit,
            steps=self.steps,
            step_sizes=self.step_sizes,
            step=self.step,
            norm=self.norm,
            scope=self.scope,
            agents=scene.batch.agents,
            restarts=self.restarts,
            mask=scene.mask,
            generator=generator,
        )

    def run(self, scene: Scene, generator: torch.Generator) -> Found:
        """The largest losses; `generator` draws the starts."""
        return found_by(self.ascents(scene, generator))
