"""The policy, its training on the inner maximiser, and what is measured on the way."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import aajr_kernels as aajr

from ..ascents import recorded
from ..digits.data import CLASSES, UTILITIES, Split
from ..digits.training import attack, nominal_losses, penalty, strong_attacks

__all__ = ["METHODS", "curvature", "evaluate", "make_policy", "nominal", "pretrain", "tune", "unit_weight"]

#: the penalties that are compared; "none" stands for no penalty
METHODS = ("none", "frobenius", "spectral", "random", "aajr-l2", "aajr-fisher")
#: loss of the best policy that does not look at its input: ten classes alike, utilities of variance 1
CONSTANT = math.log(CLASSES) + 1


class Sine(nn.Module):
    """sin x: units of bounded slope whose curvature grows with the square of the weights before them."""

    def forward(self, x: Any) -> Any:
        return torch.sin(x)


def make_policy(width: int, gain: float, seed: int) -> nn.Sequential:
    """Two hidden layers of sine units, then class logits and utilities: ``[n, 64]`` to ``[n, 14]``.

    Args:
        width: of the hidden layers.
        gain: factor on the first layer's initial weights, the frequency that the policy starts from.
        seed: of the start.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = nn.Sequential(
            *(nn.Linear(64, width), Sine(), nn.Linear(width, width), Sine()),
            nn.Linear(width, CLASSES + len(UTILITIES)),
        )
    with torch.no_grad():
        for parameter in policy[0].parameters():
            parameter.mul_(gain)
    return policy


class _Batches:
    """Shuffled batches without end; an epoch leaves out what does not fill a batch."""

    def __init__(self, part: Split, size: int, seed: int) -> None:
        self.part, self.size = part, size
        self.generator = torch.Generator().manual_seed(seed)
        self.per_epoch = len(part) // size

    def epochs(self, count: int) -> Iterator[Split]:
        for _ in range(count):
            shuffled = self.part[torch.randperm(len(self.part), generator=self.generator)]
            for number in range(self.per_epoch):
                yield shuffled[slice(number * self.size, (number + 1) * self.size)]


def pretrain(config: dict[str, Any], seed: int, part: Split) -> nn.Module:
    """The unregularised policy that every run starts from: nominal loss, no adversary."""
    policy = make_policy(config["width"], config["gain"], seed)
    batches = _Batches(part, config["batch"], 1000 + seed)
    steps = config["pretraining"]["epochs"] * batches.per_epoch
    optimizer = torch.optim.Adam(policy.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config["pretraining"]["learning_rate"], total_steps=steps
    )
    for here in batches.epochs(config["pretraining"]["epochs"]):
        entropy, error, _ = nominal_losses(policy, here)
        optimizer.zero_grad()
        (entropy + error).backward()
        optimizer.step()
        schedule.step()
    return policy


def curvature(config: dict[str, Any], policy: nn.Module, part: Split) -> float:
    """κ₀: the largest negative curvature along an ascent with small steps through the ball."""
    steps = config["curvature_steps"]
    traj = attack(
        *(policy, part, "cross-entropy", torch.Generator()),
        radius=config["radius"],
        steps=steps,
        step_size=config["radius"] / steps,
    )
    report = _report(policy, part, traj)
    assert report.kappa is not None
    return report.kappa.max().item()


def inner_ascent(config: dict[str, Any], policy: nn.Module, part: Split, eta: float) -> aajr.Trajectory:
    """Raw gradient steps of size η from the clean images, in the ball."""
    return attack(
        *(policy, part, "cross-entropy", torch.Generator()),
        radius=config["radius"],
        steps=config["inner_steps"],
        step="raw",
        step_size=eta,
    )


def unit_weight(
    config: dict[str, Any], seed: int, policy: nn.Module, part: Split, eta: float, method: str
) -> float:
    """1 over the penalty of the unregularised policy: λ is counted in these units, whatever the metric."""
    if method == "none":
        return 1.0
    generator = torch.Generator().manual_seed(5000 + seed)
    traj = inner_ascent(config, policy, part, eta)
    with torch.no_grad():
        size = penalty(method, policy, traj, 10 * config["power_iterations"], generator)
    return 1.0 / size.item()


def tune(
    config: dict[str, Any],
    seed: int,
    start: nn.Module,
    part: Split,
    method: str,
    eta: float,
    *,
    mix: float,
    weight: float,
) -> tuple[nn.Module, dict[str, Any]]:
    """Minimax training: nominal loss and loss at the end of the ascent, plus a penalty at the points of the ascent.

    The batches depend on the seed alone, not on the method.

    Args:
        config: of the experiment.
        seed: of batches and random directions.
        start: the policy to begin with; not changed.
        part: the training part.
        method: one of :data:`METHODS`.
        eta: size of the raw inner steps.
        mix: w in (nominal + w · adversarial) / (1 + w).
        weight: λ, of the penalty.

    Returns:
        The policy, and a dictionary: ``falls`` and ``outer``, by epoch, the fraction of inner steps that lowered the
        loss they climb, and the mean adversarial loss; ``variance`` of the latter over the second half of the steps;
        ``jitter``, half its mean squared change from one step to the next, a variance that trends do not enter;
        ``finite``: otherwise a loss or gradient was not, and the run ended before that update; ``diverged``: it was
        not, or the last epoch is no better than a policy that does not look at its input.
    """
    policy = copy.deepcopy(start)
    batches = _Batches(part, config["batch"], 2000 + seed)
    directions = torch.Generator().manual_seed(3000 + seed)
    optimizer = torch.optim.Adam(policy.parameters(), config["learning_rate"])
    falls, outer, finite = [], [], True
    for here in batches.epochs(config["epochs"]):
        traj = inner_ascent(config, policy, here, eta)
        entropy, error, _ = nominal_losses(policy, here)
        worst_entropy, worst_error, _ = nominal_losses(policy, Split(traj.points[-1], here.y, here.u))
        adversarial = worst_entropy + worst_error
        loss = (entropy + error + mix * adversarial) / (1 + mix)
        if method != "none":
            loss = loss + weight * penalty(method, policy, traj, config["power_iterations"], directions)
        optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for p in policy.parameters() if p.grad is not None]
        finite = math.isfinite(loss.item()) and all(bool(g.isfinite().all()) for g in gradients)
        if not finite:
            break
        optimizer.step()
        report = recorded(traj)
        falls.append(report.non_monotone.float().mean().item())
        outer.append(adversarial.item())
    return policy, history(falls, outer, batches.per_epoch, finite)


def history(falls: list[float], outer: list[float], per_epoch: int, finite: bool) -> dict[str, Any]:
    """What a run is remembered by, from the values of its updates; see :func:`tune`."""
    series = torch.tensor(outer, dtype=torch.float64)
    by_epoch = {"falls": _by_epoch(falls, per_epoch), "outer": _by_epoch(outer, per_epoch)}
    return {
        **by_epoch,
        "variance": series[len(series) // 2 :].var().item() if finite else None,
        "jitter": 0.5 * series.diff().square().mean().item() if finite else None,
        "finite": finite,
        "diverged": not finite or by_epoch["outer"][-1] > CONSTANT,
    }


def nominal(policy: nn.Module, part: Split) -> dict[str, float]:
    """Nominal loss, its parts, and accuracy."""
    with torch.no_grad():
        entropy, error, accuracy = nominal_losses(policy, part)
    return {
        "nominal": (entropy + error).item(),
        "cross_entropy": entropy.item(),
        "utility_error": error.item(),
        "accuracy": accuracy.item(),
    }


def evaluate(
    config: dict[str, Any], policy: nn.Module, part: Split, seed: int, eta: float
) -> dict[str, float]:
    """Nominal losses; loss and accuracy of the classes under strong attacks; the inner ascent's curvature and falls."""
    found = nominal(policy, part)
    with torch.no_grad():
        logits = policy(part.x)[:, :CLASSES]
        worst, right = F.cross_entropy(logits, part.y, reduction="none"), logits.argmax(1) == part.y
    for traj in strong_attacks(config, policy, part, seed):
        with torch.no_grad():
            logits = policy(traj.points.flatten(0, 1))[:, :CLASSES]
            target = part.y.repeat(len(traj.points))
            losses = F.cross_entropy(logits, target, reduction="none").unflatten(0, (-1, len(part)))
        worst = torch.maximum(worst, losses.amax(0))
        right &= (logits.argmax(1) == target).unflatten(0, (-1, len(part))).all(0)
    report = _report(policy, part, inner_ascent(config, policy, part, eta))
    assert report.kappa is not None and report.violated is not None
    return found | {
        "robust_loss": worst.mean().item(),
        "robust_accuracy": right.float().mean().item(),
        "falls": report.non_monotone.float().mean().item(),
        "violated": report.violated.float().mean().item(),
        "kappa": report.kappa.max().item(),
    }


def _report(policy: nn.Module, part: Split, traj: aajr.Trajectory) -> aajr.StabilityReport:
    def loss(x: Any) -> Any:
        return F.cross_entropy(policy(x)[:, :CLASSES], part.y, reduction="none")

    return aajr.stability_report(loss, part.x, traj, samples=5, module=policy)


def _by_epoch(values: list[float], per_epoch: int) -> list[float]:
    return [
        sum(values[i : i + per_epoch]) / len(values[i : i + per_epoch])
        for i in range(0, len(values), per_epoch)
    ]
