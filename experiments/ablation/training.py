"""A training step with the penalty measured in one of several places, and the same for all otherwise."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import aajr_kernels as aajr
from aajr_kernels.method.evaluation import Scene
from aajr_kernels.method.scopes import Groups
from aajr_kernels.training import policy_of

from ..language_model.text import scene_of


def ascent(config: dict[str, Any], scene: Scene, steps: int) -> aajr.Trajectory:
    """The adversary of training: normalised steps in a ball for every open token, from the tokens themselves."""
    x = scene.x
    radius = config["radius"] * scene.unit
    return aajr.ascend(
        *(scene.loss, x),
        radius=radius,
        steps=steps,
        step_size=config["inner"]["step"] * radius,
        scope="token",
        mask=scene.mask,
        module=scene.modules,
    )


def over_rows(traj: aajr.Trajectory) -> aajr.Trajectory:
    """The same points with the gradient of every row scaled to norm 1 over the row, not in every token."""
    gradients = traj.directions * traj.gradient_norms.unsqueeze(-1)
    groups = Groups("sequence", traj.x.shape)
    directions = torch.stack([groups.unit(gradient) for gradient in gradients])
    return replace(traj, directions=directions, scope="sequence")


def measured(scene: Scene, traj: aajr.Trajectory, place: str, *, weight: float | None = None) -> Any:
    """Penalty in the Fisher metric, mean over scored tokens or rows, and the statistics of the measurement.

    Args:
        scene: what was attacked.
        traj: by :func:`ascent`.
        place: ``"end"``: at every row's worst point, along the step that led there; ``"start"``: at the start of every
            step, along its gradient; ``"rows"``: there too, along the gradient over the row.
        weight: λ over the weight of the loss at the worst point, which then comes from the same forward as the penalty
            at the ``"end"``: ``primal`` of the statistics. None: the penalty only.
    """
    options: dict[str, Any] = dict(head=scene.policy.head, mask=scene.labels != -100)
    if place != "end":
        traj = over_rows(traj) if place == "rows" else traj
        options |= dict(steps="all", batch_steps=len(traj))
    else:
        options["steps"] = "worst"
        if weight is not None:
            options |= dict(labels=scene.labels, return_primal=True, penalty_weight=weight)
    return aajr.trajectory_penalty(scene.policy.forward, traj.x, traj, **options)


def penalty_at_start(
    config: dict[str, Any], model: nn.Module, batches: list[dict[str, Tensor]], place: str
) -> float:
    """Mean penalty over the batches, of a model that is not trained on them."""
    policy, values = policy_of(model), []
    for batch in batches:
        scene = scene_of(model, policy, batch)
        with torch.no_grad():
            values.append(measured(scene, ascent(config, scene, config["inner"]["steps"]), place)[0].item())
    return sum(values) / len(values)


def tune(
    config: dict[str, Any],
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    place: str | None,
    *,
    steps: int,
    mix: float,
    weight: float,
) -> dict[str, float]:
    """Train on (clean + w · adversarial) / (1 + w) + λ · penalty; the embeddings stay as they are.

    Args:
        config: of the experiment.
        model: trained in place.
        batches: one for every step.
        place: of :func:`measured`, or None without a penalty.
        steps: of the ascent.
        mix: w.
        weight: λ.

    Returns:
        ``seconds_per_step``: median processor time; ``clean_loss``, ``adversarial_loss``: means over the last fifth.
    """
    policy = policy_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), config["learning_rate"], weight_decay=0.0)
    seconds, losses = [], []
    for batch in batches:
        began = time.process_time()
        scene = scene_of(model, policy, batch)
        traj = ascent(config, scene, steps)
        clean, penalty = scene.loss(traj.x).mean(), torch.zeros(())
        if place == "end":
            penalty, aux = measured(scene, traj, place, weight=weight * (1 + mix) / mix)
            adversarial = aux.primal
        else:
            adversarial = scene.loss(traj.worst).mean()
            if place is not None:
                penalty, _ = measured(scene, traj, place)
        optimizer.zero_grad()
        ((clean + mix * adversarial) / (1 + mix) + weight * penalty).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config["clip"])
        optimizer.step()
        seconds.append(time.process_time() - began)
        losses.append((clean.item(), adversarial.item()))
    tail = losses[-max(len(losses) // 5, 1) :]
    means = [sum(values) / len(tail) for values in zip(*tail)]
    return {
        "clean_loss": means[0],
        "adversarial_loss": means[1],
        "seconds_per_step": sorted(seconds)[len(seconds) // 2],
    }
