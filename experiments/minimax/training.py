"""The policy, its training on the inner maximiser, and what is measured on the way."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import aajr_kernels as aajr

from ..ascents import recorded
from ..digits.data import CLASSES, Split
from ..digits.training import (
    Batches,
    Sine,
    attack,
    make_policy,
    nominal,
    nominal_losses,
    penalty,
    robust,
    train,
)

#: the penalties that are compared; "none" stands for no penalty
METHODS = ("none", "frobenius", "spectral", "random", "aajr-l2", "aajr-fisher")
#: loss of the best policy that does not look at its input: ten classes alike, utilities of variance 1
CONSTANT = math.log(CLASSES) + 1


def pretrain(config: dict[str, Any], seed: int, part: Split) -> nn.Module:
    """The unregularised policy that every run starts from: nominal loss, no adversary."""
    policy = make_policy(config["width"], seed, Sine, config["gain"])
    return train(config | config["pretraining"], seed, part, policy=policy)


def curvature(config: dict[str, Any], policy: nn.Module, part: Split) -> float:
    """κ₀, the largest negative curvature along an ascent with small steps through the ball."""
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

    The batches depend only on the seed, not on the method.

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
    batches = Batches(part, config["batch"], 2000 + seed)
    directions = torch.Generator().manual_seed(3000 + seed)
    optimizer = torch.optim.Adam(policy.parameters(), config["learning_rate"])
    falls, outer, finite = [], [], True
    for batch in batches.epochs(config["epochs"]):
        traj = inner_ascent(config, policy, batch, eta)
        entropy, error, _ = nominal_losses(policy, batch)
        worst_entropy, worst_error, _ = nominal_losses(policy, Split(traj.points[-1], batch.y, batch.u))
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
    """Summary of a run, from the values of its updates; see :func:`tune`."""
    series = torch.tensor(outer, dtype=torch.float64)
    by_epoch = {"falls": _by_epoch(falls, per_epoch), "outer": _by_epoch(outer, per_epoch)}
    return {
        **by_epoch,
        "variance": series[len(series) // 2 :].var().item() if finite else None,
        "jitter": 0.5 * series.diff().square().mean().item() if finite else None,
        "finite": finite,
        "diverged": not finite or by_epoch["outer"][-1] > CONSTANT,
    }


def evaluate(
    config: dict[str, Any], policy: nn.Module, part: Split, seed: int, eta: float
) -> dict[str, float]:
    """Nominal losses; loss and accuracy of the classes under strong attacks; the inner ascent's curvature and falls."""
    report = _report(policy, part, inner_ascent(config, policy, part, eta))
    assert report.kappa is not None and report.violated is not None
    return {
        **nominal(policy, part),
        **robust(config, policy, part, seed),
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
