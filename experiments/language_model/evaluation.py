"""Evaluation of a trained model on held-out text, the same for every method."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import aajr_kernels as aajr
from aajr_kernels.method.evaluation import EmbeddingAttack, Scene, TokenSubstitution
from aajr_kernels.training import Policy, policy_of

from ..ascents import recorded
from .text import Text, in_turns, scene_of, windows


def clean_loss(
    config: dict[str, Any], model: nn.Module, policy: Policy, source: Tensor, seed: int, rows: int
) -> float:
    """Mean cross-entropy of the scored tokens of random windows; perplexity is its exponential."""
    scene = _scene(config, model, policy, source, seed, rows)
    return scene.losses(scene.x).mean().item()


def evaluate_losses(config: dict[str, Any], model: nn.Module, source: Tensor, seed: int) -> dict[str, float]:
    """``nominal``: the clean loss over ``clean_rows`` windows; ``robust``: the largest of the strong attack."""
    policy, settings = policy_of(model), config["evaluation"]
    scene = _scene(config, model, policy, source, seed, settings["rows"])
    generator = torch.Generator().manual_seed(4000 + seed)
    worst = EmbeddingAttack(config["radius"], **settings["attack"]).run(scene, generator).losses
    clean = clean_loss(config, model, policy, source, seed, settings["clean_rows"])
    return {"nominal": clean, "robust": worst.mean().item()}


def evaluate(config: dict[str, Any], model: nn.Module, text: Text, seed: int) -> dict[str, Any]:
    """Losses (nats per scored token) on the test part, clean and under both attacks, and curvature of an ascent.

    Returns:
        ``clean``: over ``clean_rows`` windows. Over the first ``rows`` of them: ``start``, without an attack;
        ``embedding``, under the strong attack at every radius of ``radii`` (in training radii), in that order;
        ``substitution``, after 0, 1, ... replaced tokens; ``falls``, the fraction of the strong attack's steps at the
        training radius that lower the loss. Along the ascent of training on these windows: ``ascent_falls``,
        ``violated``, fractions of steps; ``kappa``, mean over steps and rows of the negative curvature, and
        ``eta_max``, the median of the largest admissible step, None if infinite, both with lengths in norms of a token.
    """
    policy, settings = policy_of(model), config["evaluation"]
    scene = _scene(config, model, policy, text.test, seed, settings["rows"])
    results: dict[str, Any] = {
        "clean": clean_loss(config, model, policy, text.test, seed, settings["clean_rows"]),
        "start": scene.losses(scene.x).mean().item(),
        "embedding": [],
    }
    generator = torch.Generator().manual_seed(4000 + seed)
    for factor in settings["radii"]:
        attack = EmbeddingAttack(factor * config["radius"], **settings["attack"])
        ascents = attack.ascents(scene, generator)
        worst = torch.stack([traj.worst_loss for traj in ascents]).amax(0)
        results["embedding"].append(worst.mean().item())
        if factor == 1:
            results["falls"] = _falls(ascents)
    replaced = TokenSubstitution(**settings["substitution"], candidates=text.candidates).run(scene).curve
    return results | {"substitution": replaced.mean(1).tolist()} | _stability(config, scene)


def _scene(
    config: dict[str, Any], model: nn.Module, policy: Policy, source: Tensor, seed: int, rows: int
) -> Scene:
    """The first windows are the same for every number of rows."""
    drawn = [
        windows(source, 1, config["length"], torch.Generator().manual_seed(10_000 * (3 + seed) + row))
        for row in range(rows)
    ]
    return scene_of(model, policy, in_turns(torch.cat(drawn), config["turn"]))


def _falls(ascents: list[aajr.Trajectory]) -> float:
    reports = [recorded(traj) for traj in ascents]
    moved = sum(report.moved.sum().item() for report in reports)
    return sum(report.non_monotone.sum().item() for report in reports) / max(moved, 1.0)


def _stability(config: dict[str, Any], scene: Scene) -> dict[str, Any]:
    inner = config["inner"]
    attack = EmbeddingAttack(config["radius"], steps=inner["steps"], step_sizes=(inner["step"],))
    (traj,) = attack.ascents(scene, torch.Generator())
    kind = config["evaluation"]["curvature"]
    (model,) = scene.modules
    training = model.training
    model.eval()
    report = aajr.stability_report(scene.loss, traj.x, traj, curvature=kind, samples=3, module=model)
    model.train(training)
    assert report.kappa is not None and report.eta_max is not None and report.violated is not None
    unit = scene.unit
    largest = report.eta_max.median().item() / unit
    return {
        "ascent_falls": report.non_monotone.float().mean().item(),
        "violated": report.violated.float().mean().item(),
        "kappa": report.kappa.mean().item() * unit**2,
        "eta_max": largest if math.isfinite(largest) else None,
    }
