"""Random losses whose curvature along every segment is known, and ascents on them of every kind.

Two families, one loss per batch row:

- quadratic: g(z) = ⟨b, z⟩ + ½ zᵀHz, H symmetric and indefinite; along a unit d the curvature is dᵀHd everywhere.
- wave: g(z) = ⟨b, z⟩ + c cos(⟨w, z⟩ + φ); along d from z₀ it is −c ω² cos(θ), ω = ⟨w, d⟩, with θ running from θ₀ to
  θ₀ + ℓω, so that the supremum of its negative part is cω² times the largest cosine (for c > 0) on that interval.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

import aajr_kernels as aajr
from aajr_kernels.method import step_condition

from ..store import Row

STEPS = ("raw", "normalized", "sign")
SCOPES = ("sequence", "token", "agent")
PROJECTIONS = ("none", "l2 ball", "linf ball", "box")
FAMILIES = ("quadratic", "wave")
TOKENS, CHANNELS = 4, 3
SIZE = TOKENS * CHANNELS
#: edges of ηκ for the figure
EDGES = [0.25 * 2 ** (i / 2) for i in range(17)]


class Problem:
    """A batch of losses.

    Args:
        family: one of :data:`FAMILIES`.
        rows: of the batch.
        generator: of their coefficients.
    """

    def __init__(self, family: str, rows: int, generator: torch.Generator) -> None:
        options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
        self.family = family
        self.slope = torch.randn(rows, SIZE, **options)
        matrix = torch.randn(rows, SIZE, SIZE, **options)
        self.matrix = (matrix + matrix.mT) / 2
        self.wave = torch.randn(rows, SIZE, **options)
        self.phase = 2 * math.pi * torch.rand(rows, **options)
        self.height = 1 + 3 * torch.rand(rows, **options)

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, 4, 3]`` to ``[B]``."""
        z = x.flatten(1)
        linear = (self.slope * z).sum(1)
        if self.family == "quadratic":
            return linear + 0.5 * torch.einsum("bi,bij,bj->b", z, self.matrix, z)
        return linear + self.height * torch.cos((self.wave * z).sum(1) + self.phase)

    def kappa(self, start: torch.Tensor, displacement: torch.Tensor) -> torch.Tensor:
        """Supremum of the negative part of the curvature along a segment, ``[B]``, exactly."""
        z, delta = start.flatten(1), displacement.flatten(1)
        length = delta.norm(dim=1, keepdim=True)
        d = delta / torch.where(length == 0, 1.0, length)
        if self.family == "quadratic":
            return (-torch.einsum("bi,bij,bj->b", d, self.matrix, d)).clamp(min=0)
        first = (self.wave * z).sum(1) + self.phase
        last = first + (self.wave * delta).sum(1)
        low, high = torch.minimum(first, last), torch.maximum(first, last)
        peak = torch.floor(high / (2 * math.pi)) * 2 * math.pi >= low  # a multiple of 2π lies between
        cosine = torch.where(peak, 1.0, torch.maximum(first.cos(), last.cos()))
        return self.height * (self.wave * d).sum(1).square() * cosine.clamp(min=0)


def _mean(norms: torch.Tensor) -> torch.Tensor:
    """Mean over the groups that have a gradient."""
    return norms.sum(-1) / (norms > 0).sum(-1).clamp(min=1)


def _smallest(norms: torch.Tensor) -> torch.Tensor:
    return torch.where(norms > 0, norms, math.inf).amin(-1)


def _bounds(traj: aajr.Trajectory, kappa: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest step sizes of the special cases ``[T, B]``: the valid ones (NaN: there is none), and the naive ones.

    The naive ones carry the formulas for unprojected steps over to projected ones.
    """
    safe = torch.where(kappa > 0, kappa, 1.0)
    if traj.step == "raw":
        naive = valid = 2 / safe
    elif traj.step == "sign":
        assert traj.gradients is not None
        g = traj.gradients[:-1].flatten(2).abs()
        naive = 2 * _mean(g) / safe
        valid = torch.where(traj.projected, math.nan, naive)
    else:
        naive = 2 * _mean(traj.gradient_norms) / safe
        valid = torch.where(traj.projected, 2 * _smallest(traj.gradient_norms) / safe, naive)
    free = kappa == 0
    return torch.where(free & ~valid.isnan(), math.inf, valid), torch.where(free, math.inf, naive)


def _project(name: str) -> tuple[dict[str, Any], Callable[[torch.Tensor], torch.Tensor] | None]:
    if name == "none":
        return {"radius": math.inf}, None
    if name == "box":  # contains 0 off its centre
        return {"radius": math.inf}, lambda delta: delta.clamp(-0.2, 0.5)
    return {"radius": 0.6 if name == "l2 ball" else 0.3, "norm": name.split()[0]}, None


def trials(family: str, seed: int, rows: int, steps: int) -> list[Row]:
    """Ascents of every kind of step, scope and projection; one row of counts for each.

    Step sizes are drawn per row and step over two orders of magnitude around the admissible ones; a third of the rows
    has tokens that may not be attacked.
    """
    generator = torch.Generator().manual_seed(100 * FAMILIES.index(family) + seed)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    counts = []
    for step, scope, projection in itertools.product(STEPS, SCOPES, PROJECTIONS):
        problem = Problem(family, rows, generator)
        x = torch.randn(rows, TOKENS, CHANNELS, **options)
        mask = torch.rand(rows, TOKENS, **options) > 0.3
        mask[rows // 3 :] = True
        mask[:, 0] = True
        agents = torch.randint(0, 2, (rows, TOKENS), generator=generator)
        sizes = 0.3 * 10 ** (2 * torch.rand(steps, rows, **options) - 1)
        ball, project = _project(projection)
        traj = aajr.ascend(
            *(problem.loss, x),
            steps=steps,
            step_size=sizes,
            step=step,
            scope=scope,
            agents=agents if scope == "agent" else None,
            mask=mask,
            project=project,
            keep_gradients=True,
            **ball,
        )
        marks = {"family": family, "seed": seed, "step": step, "scope": scope, "projection": projection}
        counts.append(marks | _counts(problem, traj))
    return counts


def _counts(problem: Problem, traj: aajr.Trajectory) -> Row:
    assert traj.gradients is not None
    delta = traj.displacements
    length = delta.flatten(2).norm(dim=2)
    slope = (traj.gradients[:-1] * delta).flatten(2).sum(2)
    kappa = torch.stack([problem.kappa(p, move) for p, move in zip(traj.points, delta)])
    before, after = traj.losses[:-1], traj.losses[1:]
    # both losses and the slope are sums of a few hundred terms; rounding is far below 1e-12 of their size
    slack = 1e-12 * (1 + before.abs() + after.abs() + slope.abs())
    moved = length > 0
    falls = moved & (after - before < -slack)
    held = moved & step_condition(kappa, length, slope)
    tight = held & (kappa * length.square() > slope)
    valid, naive = _bounds(traj, kappa)
    special = moved & (traj.step_sizes <= valid)
    carried = moved & (traj.step_sizes <= naive) & traj.projected
    row: Row = {
        "trials": moved,
        "projected": moved & traj.projected,
        "falls": falls,
        "held": held,
        "tight": tight,
        "held_falls": held & falls,
        "special": special,
        "special_falls": special & falls,
        "special_beyond": special & ~held & moved,
        "carried": carried,
        "carried_falls": carried & falls,
    }
    row = {name: int(value.sum()) for name, value in row.items()}
    if traj.step == "raw":
        here = moved & ~traj.projected & (kappa > 0)
        row |= binned((traj.step_sizes * kappa)[here], falls[here])
    return row


def binned(eta_kappa: torch.Tensor, fell: torch.Tensor) -> Row:
    """Numbers of steps by ηκ, and of those that fell, between :data:`EDGES`."""
    edges = torch.tensor([0.0, *EDGES, math.inf], dtype=torch.float64)
    where = torch.bucketize(eta_kappa, edges) - 1
    bins = (torch.bincount(which, minlength=len(edges) - 1).tolist() for which in (where, where[fell]))
    return dict(zip(("bins", "bins_falls"), bins))
