"""The policy, its penalties, its training and the attacks on it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import aajr_kernels as aajr
from aajr_kernels.method import baseline_penalty

from .data import CLASSES, UTILITIES, Split

__all__ = [
    "METHODS",
    "attack",
    "evaluate",
    "make_policy",
    "nominal_losses",
    "penalty",
    "strong_attacks",
    "train",
]

#: method -> (baseline, metric of the outputs)
METHODS = {
    "frobenius": ("frobenius", "l2"),
    "spectral": ("spectral", "l2"),
    "random": ("random", "l2"),
    "frobenius-fisher": ("frobenius", "fisher"),
    "spectral-fisher": ("spectral", "fisher"),
    "aajr-l2": ("aligned", "l2"),
    "aajr-fisher": ("aligned", "fisher"),
}


def make_policy(width: int, seed: int) -> nn.Sequential:
    """Two hidden layers, then class logits and utilities side by side: ``[n, 64]`` to ``[n, 14]``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Linear(64, width), nn.GELU(), nn.Linear(width, width), nn.GELU()),
            nn.Linear(width, CLASSES + len(UTILITIES)),
        )


def fisher(y: aajr.Dual) -> torch.Tensor:
    """Fisher metric of a categorical class and utilities with Gaussian noise of variance 1."""
    classes, utilities = y.split([CLASSES, len(UTILITIES)], -1)
    return aajr.sensitivity(classes, "fisher") + aajr.sensitivity(utilities, "l2")


def nominal_losses(policy: nn.Module, part: Split) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy, mean squared error of the utilities, and accuracy, without an adversary."""
    out = policy(part.x)
    entropy = F.cross_entropy(out[:, :CLASSES], part.y)
    error = (out[:, CLASSES:] - part.u).square().mean()
    return entropy, error, (out[:, :CLASSES].argmax(1) == part.y).float().mean()


def attack(
    policy: nn.Module, part: Split, kind: str, generator: torch.Generator, **options: Any
) -> aajr.Trajectory:
    """Ascent on the class loss alone: the utilities are none of the adversary's business."""

    def cross_entropy(x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(policy(x)[:, :CLASSES], part.y, reduction="none")

    def margin(x: torch.Tensor) -> torch.Tensor:
        z = policy(x)[:, :CLASSES]
        own = F.one_hot(part.y, CLASSES).bool()
        return z.masked_fill(own, -math.inf).amax(1) - z[own]

    loss = {"cross-entropy": cross_entropy, "margin": margin}[kind]
    return aajr.ascend(loss, part.x, generator=generator, module=policy, **options)


def penalty(
    method: str, policy: nn.Module, traj: aajr.Trajectory, iterations: int, generator: torch.Generator
) -> torch.Tensor:
    """The penalty of a method, averaged over all points of a trajectory."""
    baseline, metric = METHODS[method]
    found: torch.Tensor = baseline_penalty(
        *(baseline, policy, traj.points[:-1].flatten(0, 1), traj.directions.flatten(0, 1)),
        metric=fisher if metric == "fisher" else "l2",
        iterations=iterations,
        generator=generator,
        module=policy,
    )
    return found


def train(config: dict[str, Any], seed: int, part: Split, method: str | None, weight: float) -> nn.Module:
    """Nominal loss plus `weight` times the penalty at the points of a short ascent on every batch.

    Start, order of the batches and random starts of the ascents depend on the seed alone, not on the method.
    """
    policy = make_policy(config["width"], seed)
    batch = config["batch"]
    steps = config["epochs"] * (len(part) // batch)
    optimizer = torch.optim.Adam(policy.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config["learning_rate"], total_steps=steps)
    order, starts, directions = (torch.Generator().manual_seed(1000 * i + seed) for i in (1, 2, 3))
    inner = config["inner"]
    for step in range(steps):
        at = step * batch % (len(part) // batch * batch)
        if at == 0:
            shuffled = part[torch.randperm(len(part), generator=order)]
        here = shuffled[slice(at, at + batch)]
        entropy, error, _ = nominal_losses(policy, here)
        loss = entropy + error
        if method is not None:
            traj = attack(
                *(policy, here, "cross-entropy", starts),
                radius=config["radius"],
                steps=inner["steps"],
                step_size=config["radius"] * inner["step"],
                init="uniform",
                evaluate_last=False,
            )
            loss = loss + weight * penalty(method, policy, traj, config["power_iterations"], directions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return policy


def strong_attacks(
    config: dict[str, Any], policy: nn.Module, part: Split, seed: int
) -> Iterator[aajr.Trajectory]:
    """Ascents on every loss with every step size that the configuration's ``attack`` names."""
    strong = config["attack"]
    generator = torch.Generator().manual_seed(4000 + seed)
    for kind in strong["losses"]:
        for share in strong["step"]:
            yield attack(
                *(policy, part, kind, generator),
                radius=config["radius"],
                steps=strong["steps"],
                step_size=config["radius"] * share,
                init="uniform",
                restarts=strong["restarts"],
            )


def evaluate(config: dict[str, Any], policy: nn.Module, part: Split, seed: int) -> dict[str, float]:
    """Nominal losses, and the share of images that every attack leaves rightly classified at all its points."""
    with torch.no_grad():
        entropy, error, accuracy = nominal_losses(policy, part)
        right = policy(part.x)[:, :CLASSES].argmax(1) == part.y
    for traj in strong_attacks(config, policy, part, seed):
        with torch.no_grad():
            guess = policy(traj.points.flatten(0, 1))[:, :CLASSES].argmax(1).reshape(-1, len(part))
        right &= (guess == part.y).all(0)
    return {
        "nominal": (entropy + error).item(),
        "cross_entropy": entropy.item(),
        "utility_error": error.item(),
        "accuracy": accuracy.item(),
        "robust_accuracy": right.float().mean().item(),
    }
