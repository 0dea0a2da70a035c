"""The step condition on trained networks, where the curvature along a segment can only be sampled."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import aajr_kernels as aajr

from ..digits.data import CLASSES, load
from ..store import Row
from .closed import binned


def _trained(seed: int, width: int, epochs: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A classifier of digits in float64, and images that it has not seen."""
    digits = load(seed, (1200, 1, 96))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = nn.Sequential(
            *(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, CLASSES))
        ).double()
        order = [torch.randperm(1200) for _ in range(epochs)]
    x, y = digits.train.x.double(), digits.train.y
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    for shuffled in order:
        for batch in shuffled.split(100):
            optimizer.zero_grad()
            F.cross_entropy(policy(x[batch]), y[batch]).backward()
            optimizer.step()
    return policy.requires_grad_(False), digits.test.x.double(), digits.test.y


def network_rows(
    seed: int, width: int, epochs: int, steps: int, samples: int, factors: list[float], shares: list[float]
) -> list[Row]:
    """Counts for raw steps without projection, and for normalised steps in a ball.

    Args:
        seed: of data, start and batches.
        width, epochs: of the network and its training.
        steps: of every ascent.
        samples: points of every segment at which the curvature is measured.
        factors: raw steps take η = factor · 2/κ₀, κ₀ the largest curvature met by an ascent with small steps.
        shares: normalised steps take α = share · radius in an l2 ball of radius 1.
    """
    policy, x, y = _trained(seed, width, epochs)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(policy(x), y, reduction="none")

    # rows that the network is sure of hardly move by raw steps; normalised ones show them the curvature too
    small = aajr.ascend(loss, x, radius=math.inf, steps=4 * steps, step_size=0.1)
    kappa_0 = aajr.stability_report(loss, x, small, samples=samples).summary()["kappa_max"]
    with torch.no_grad():
        accuracy = (policy(x).argmax(1) == y).double().mean().item()
    common: Row = {"seed": seed, "accuracy": accuracy, "kappa_0": kappa_0}
    runs: list[tuple[Row, dict[str, Any]]] = [
        ({"kind": "raw", "factor": f, "eta": f * 2 / kappa_0}, {"radius": math.inf, "step": "raw"})
        for f in factors
    ]
    runs += [({"kind": "ball", "share": s, "eta": s}, {"radius": 1.0}) for s in shares]
    rows = []
    for row, options in runs:
        traj = aajr.ascend(loss, x, steps=steps, step_size=row["eta"], **options)
        report = aajr.stability_report(loss, x, traj, samples=samples)
        rows.append(common | row | _counts(traj, report))
    return rows


def _counts(traj: aajr.Trajectory, report: aajr.StabilityReport) -> Row:
    assert report.kappa is not None and report.violated is not None and report.unexplained is not None
    here = report.moved & (report.kappa > 0)
    counts = {
        "trials": report.moved,
        "falls": report.non_monotone,
        "held": report.moved & ~report.violated,
        "held_falls": report.unexplained,
        "projected": report.projected & report.moved,
    }
    return {
        **{name: int(value.sum()) for name, value in counts.items()},
        **binned((traj.step_sizes * report.kappa)[here], report.non_monotone[here]),
        "kappa_max": report.kappa.max().item(),
    }
