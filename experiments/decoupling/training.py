"""Minimax training whose λ follows the smoothness along the ascent, from clean images or with lasting perturbations."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aajr_kernels as aajr
from aajr_kernels.training import Constraint, Multiplier

from ..digits.data import CLASSES, Split
from ..digits.training import Batches, attack, nominal_losses, penalty

#: method -> what lowers the smoothness; "none" leaves it as it is
METHODS = ("none", "frobenius", "spectral", "aajr-l2", "aajr-fisher")


@dataclass(frozen=True)
class Regime:
    """How the inner variable moves.

    Attributes:
        name: ``"fresh"``: every batch is attacked from its clean images, and the policy answers the last point;
            ``"lasting"``: every image keeps its perturbation, which takes one step while the policy takes one,
            simultaneous gradient ascent and descent on all images at once.
        steps: of an ascent.
        radius: of the ball.
        eta: η of the raw steps.
    """

    name: str
    steps: int
    radius: float
    eta: float


def smoothness(policy: nn.Module, traj: aajr.Trajectory, y: Tensor) -> Tensor:
    """L_eff of every realised step of every image, from both its ends: ``[T, B]``, NaN where it did not move."""
    report = aajr.stability_report(
        *(lambda x: _entropies(policy, x, y), traj.x, traj),
        curvature="none",
        samples=2,
        func=lambda x: policy(x)[:, :CLASSES],
        module=policy,
    )
    assert report.smoothness is not None
    return torch.where(report.moved, report.smoothness, math.nan)


def _entropies(policy: nn.Module, x: Any, y: Tensor) -> Any:
    return F.cross_entropy(policy(x)[:, :CLASSES], y, reduction="none")


def fresh(regime: Regime, policy: nn.Module, part: Split) -> aajr.Trajectory:
    """Raw steps from the clean images."""
    return attack(
        *(policy, part, "cross-entropy", torch.Generator()),
        radius=regime.radius,
        steps=regime.steps,
        step="raw",
        step_size=regime.eta,
    )


def going_on(regime: Regime, policy: nn.Module, part: Split, delta: Tensor) -> aajr.Trajectory:
    """One raw step from x + δ, which are the first point; the ball stays that around x."""

    def inside(step: Tensor) -> Tensor:
        moved = delta + step
        return moved * (regime.radius / moved.norm(dim=-1, keepdim=True).clamp(min=regime.radius)) - delta

    return attack(
        *(policy, Split(part.x + delta, part.y, part.u), "cross-entropy", torch.Generator()),
        radius=math.inf,
        project=inside,
        steps=1,
        step="raw",
        step_size=regime.eta,
        evaluate_last=False,
    )


def train(
    config: dict[str, Any], seed: int, start: nn.Module, part: Split, method: str, regime: Regime, unit: float
) -> tuple[nn.Module, dict[str, Any]]:
    """Minimise (nominal + w · adversarial) / (1 + w) + λ · penalty, with λ such that L_eff ≤ 1/η along the steps.

    log λ rises while more of the realised steps than 1 − ``quantile`` have L_eff above 1/η and falls while fewer have:
    the multiplier of a :class:`~aajr_kernels.training.Constraint`, whose units are the steps of the images.

    Args:
        config: of the experiment.
        seed: of batches and random directions.
        start: the policy to begin with; not changed.
        part: the training part.
        method: one of :data:`METHODS`.
        regime: how the inner variable moves.
        unit: 1 over the penalty at the start, in which λ counts.

    Returns:
        The policy, and a dictionary: ``outer``: adversarial loss by update, in means over ``blocks`` blocks;
        ``variance`` of it over the second half of the updates, about its own straight line; ``jitter``: half its mean
        squared change from one update to the next there; ``share`` of the steps with L_eff ≤ 1/η, by block;
        ``within``: the same over the last quarter; ``multiplier``: λ at the end in units, 0 without one; ``finite``: no
        loss or gradient was NaN or infinite, otherwise the run ended before that update; ``outcome``, see
        :func:`outcome_of`.
    """
    policy = copy.deepcopy(start)
    generator = torch.Generator().manual_seed(3000 + seed)
    optimizer = torch.optim.Adam(policy.parameters(), config["learning_rate"])
    constraint = Constraint(
        gamma=1 / math.sqrt(regime.eta),
        quantile=config["quantile"],
        weight=config["weight"],
        **config["controller"],
    )
    multiplier = None if method == "none" else Multiplier(constraint)
    delta = torch.zeros_like(part.x)
    outer: list[float] = []
    shares: list[float] = []
    finite = True
    mix = config["mix"]
    for step, batch in enumerate(_batches(config, seed, part, regime)):
        if regime.name == "fresh":
            traj = fresh(regime, policy, batch)
            attacked = traj.points[-1]
        else:
            traj = going_on(regime, policy, batch, delta)
            attacked = traj.points[0]
            delta = delta + traj.displacements[0]
        entropy, error, _ = nominal_losses(policy, batch)
        worst_entropy, worst_error, _ = nominal_losses(policy, Split(attacked, batch.y, batch.u))
        adversarial = worst_entropy + worst_error
        loss = (entropy + error + mix * adversarial) / (1 + mix)
        curvature = smoothness(policy, traj, batch.y)
        if multiplier is not None:
            weight, bound = multiplier.at(step)
            assert weight is not None
            value = penalty(method, policy, traj, config["power_iterations"], generator)
            loss = loss + weight * unit * value
            multiplier.add(step, loss, value, curvature, bound)
            multiplier.settle()
        optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for p in policy.parameters() if p.grad is not None]
        finite = math.isfinite(loss.item()) and all(bool(g.isfinite().all()) for g in gradients)
        if not finite:
            break
        optimizer.step()
        outer.append(adversarial.item())
        shares.append(float((curvature <= 1 / regime.eta).sum() / (~curvature.isnan()).sum().clamp(min=1)))
    facts = {"multiplier": 0.0, "binding": 0.0} if multiplier is None else multiplier.facts
    summary = history(config, outer, shares, finite)
    outcome = outcome_of(config, summary["within"], bool(facts["binding"]))
    return policy, summary | {"multiplier": facts["multiplier"], "outcome": outcome}


def _batches(config: dict[str, Any], seed: int, part: Split, regime: Regime) -> Iterator[Split]:
    """All images at once where their perturbations last."""
    if regime.name == "lasting":
        yield from (part for _ in range(config["updates"]))
        return
    batches = Batches(part, config["batch"], 2000 + seed)
    epochs = math.ceil(config["updates"] / batches.per_epoch)
    for number, batch in enumerate(batches.epochs(epochs)):
        if number < config["updates"]:
            yield batch


def history(config: dict[str, Any], outer: list[float], shares: list[float], finite: bool) -> dict[str, Any]:
    """Summary of a run, from the values of its updates; see :func:`train`."""
    blocks, half, quarter = config["blocks"], len(outer) // 2, max(len(outer) // 4, 1)
    summary: dict[str, Any] = {
        "outer": _means(outer, blocks),
        "share": _means(shares, blocks),
        "finite": finite,
    }
    if not finite:
        return summary | dict.fromkeys(("variance", "jitter", "within"))
    late = torch.tensor(outer[half:], dtype=torch.float64)
    return summary | {
        "variance": float(residuals(late).square().mean()),
        "jitter": float(0.5 * late.diff().square().mean()),
        "within": sum(shares[-quarter:]) / quarter,
    }


def outcome_of(config: dict[str, Any], within: float | None, is_binding: bool) -> str:
    """``"held"``: the quantile of L_eff is at 1/η, or below it with λ at its floor; ``"infeasible"``; or ``"below"``.

    Args:
        config: ``quantile``, and ``tolerance`` on the share.
        within: share of the steps with L_eff ≤ 1/η at the end; None where the run broke off.
        is_binding: λ is above its floor.
    """
    if within is None or within < config["quantile"] - config["tolerance"]:
        return "infeasible"
    is_below = within > config["quantile"] + config["tolerance"]
    return "below" if is_below and is_binding else "held"


def residuals(series: Tensor) -> Tensor:
    """What a straight line leaves of a series ``[n]``: a trend of the training is no oscillation."""
    line = torch.stack([torch.ones_like(series), torch.arange(len(series), dtype=series.dtype)], 1)
    return series - line @ torch.linalg.lstsq(line, series.unsqueeze(1)).solution.squeeze(1)


def _means(values: list[float], blocks: int) -> list[float]:
    size = max(len(values) // blocks, 1)
    parts = [values[i : i + size] for i in range(0, len(values), size)]
    return [round(sum(part) / len(part), 5) for part in parts[:blocks]]
