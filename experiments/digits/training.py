"""The policy, its penalties, its training and the attacks on it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import aajr_kernels as aajr
from aajr_kernels.method import baseline_penalty

from .data import CLASSES, UTILITIES, Split

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


class Sine(nn.Module):
    """sin x: units of bounded slope whose curvature grows with the square of the weights before them."""

    def forward(self, x: Any) -> Any:
        return torch.sin(x)


def make_policy(width: int, seed: int, unit: type[nn.Module] = nn.GELU, gain: float = 1.0) -> nn.Sequential:
    """Two hidden layers, then class logits and utilities side by side: ``[n, 64]`` to ``[n, 14]``.

    Args:
        width: of the hidden layers.
        seed: of the start.
        unit: of the hidden layers.
        gain: factor on the first layer's initial weights: the frequency that sine units start from.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        policy = nn.Sequential(
            *(nn.Linear(64, width), unit(), nn.Linear(width, width), unit()),
            nn.Linear(width, CLASSES + len(UTILITIES)),
        )
        for parameter in policy[0].parameters():
            parameter.mul_(gain)
    return policy


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
    """Ascent on only the class loss: the adversary ignores the utilities."""

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
    value: torch.Tensor = baseline_penalty(
        *(baseline, policy, traj.points[:-1].flatten(0, 1), traj.directions.flatten(0, 1)),
        metric=fisher if metric == "fisher" else "l2",
        iterations=iterations,
        generator=generator,
        module=policy,
    )
    return value


class Batches:
    """Shuffled batches; an epoch leaves out what does not fill a batch."""

    def __init__(self, part: Split, size: int, seed: int) -> None:
        self.part, self.size = part, size
        self.generator = torch.Generator().manual_seed(seed)
        self.per_epoch = len(part) // size

    def epochs(self, count: int) -> Iterator[Split]:
        for _ in range(count):
            shuffled = self.part[torch.randperm(len(self.part), generator=self.generator)]
            for number in range(self.per_epoch):
                yield shuffled[slice(number * self.size, (number + 1) * self.size)]


def inner_ascent(
    config: dict[str, Any], policy: nn.Module, part: Split, generator: torch.Generator, **options: Any
) -> aajr.Trajectory:
    """A short ascent from random starts, whose points are penalised."""
    inner = config["inner"]
    return attack(
        *(policy, part, "cross-entropy", generator),
        radius=config["radius"],
        steps=inner["steps"],
        step_size=config["radius"] * inner["step"],
        init="uniform",
        **options,
    )


def unit_weight(
    config: dict[str, Any],
    seed: int,
    method: str,
    policy: nn.Module,
    part: Split,
    ascent: Callable[..., aajr.Trajectory],
) -> float:
    """1 over the penalty of a policy at the points of an ascent on `part`."""
    generator = torch.Generator().manual_seed(5000 + seed)
    traj = ascent(config, policy, part, generator)
    with torch.no_grad():
        return 1.0 / penalty(method, policy, traj, 10 * config["power_iterations"], generator).item()


def train(
    config: dict[str, Any],
    seed: int,
    part: Split,
    method: str = "none",
    weight: float = 0.0,
    policy: nn.Module | None = None,
    every: int = 1,
) -> nn.Module:
    """Nominal loss plus `weight` times the penalty at the points of a short ascent on every batch.

    With ``every=k`` k times that, on every k-th batch only.

    Start, order of the batches and random starts of the ascents depend only on the seed, not on the method.
    """
    policy = policy or make_policy(config["width"], seed)
    batches = Batches(part, config["batch"], 1000 + seed)
    starts, directions = (torch.Generator().manual_seed(1000 * i + seed) for i in (2, 3))
    steps, rate = config["epochs"] * batches.per_epoch, config["learning_rate"]
    optimizer = torch.optim.Adam(policy.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step, batch in enumerate(batches.epochs(config["epochs"]), 1):
        entropy, error, _ = nominal_losses(policy, batch)
        loss = entropy + error
        if method != "none" and step % every == 0:
            traj = inner_ascent(config, policy, batch, starts, evaluate_last=False)
            loss = loss + every * weight * penalty(
                method, policy, traj, config["power_iterations"], directions
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return policy


@torch.no_grad()
def nominal(policy: nn.Module, part: Split) -> dict[str, float]:
    """Nominal loss, its parts, and accuracy."""
    entropy, error, accuracy = nominal_losses(policy, part)
    return {
        "nominal": (entropy + error).item(),
        "cross_entropy": entropy.item(),
        "utility_error": error.item(),
        "accuracy": accuracy.item(),
    }


def robust(config: dict[str, Any], policy: nn.Module, part: Split, seed: int) -> dict[str, float]:
    """Largest cross-entropy, and share of images rightly classified, over all points of all attacks.

    The attacks are ascents on every loss with every step size that the configuration's ``attack`` names.
    """
    strong = config["attack"]
    generator = torch.Generator().manual_seed(4000 + seed)
    with torch.no_grad():
        logits = policy(part.x)[:, :CLASSES]
        worst, right = F.cross_entropy(logits, part.y, reduction="none"), logits.argmax(1) == part.y
    for kind, share in itertools.product(strong["losses"], strong["step"]):
        traj = attack(
            *(policy, part, kind, generator),
            radius=config["radius"],
            steps=strong["steps"],
            step_size=config["radius"] * share,
            init="uniform",
            restarts=strong["restarts"],
        )
        with torch.no_grad():
            logits = policy(traj.points.flatten(0, 1))[:, :CLASSES]
            target = part.y.repeat(len(traj.points))
            losses = F.cross_entropy(logits, target, reduction="none").unflatten(0, (-1, len(part)))
        worst = torch.maximum(worst, losses.amax(0))
        right &= (logits.argmax(1) == target).unflatten(0, (-1, len(part))).all(0)
    return {"robust_loss": worst.mean().item(), "robust_accuracy": right.float().mean().item()}


def evaluate(config: dict[str, Any], policy: nn.Module, part: Split, seed: int) -> dict[str, float]:
    """Nominal losses, and the share of images that every attack leaves rightly classified at all its points."""
    accuracy = robust(config, policy, part, seed)["robust_accuracy"]
    return nominal(policy, part) | {"robust_accuracy": accuracy}
