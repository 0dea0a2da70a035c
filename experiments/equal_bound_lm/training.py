"""Training on an adversary of whole sequences with a bound that is held, and what is measured of it afterwards."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

import aajr_kernels as aajr
from aajr_kernels.method import baseline_penalty
from aajr_kernels.method.evaluation import Scene
from aajr_kernels.training import Constraint, Multiplier, policy_of

from ..bounded import quantile_of
from ..language_model.text import scene_of
from ..language_model.training import batches_of


def ascent(config: dict[str, Any], scene: Scene, steps: int) -> aajr.Trajectory:
    """Normalised steps in a ball around the whole row; its radius and γ count in norms of a token."""
    x = scene.x
    radius = config["radius"] * scene.unit
    return aajr.ascend(
        *(scene.loss, x),
        radius=radius,
        steps=steps,
        step_size=config["inner"]["step"] * radius,
        scope="sequence",
        mask=scene.mask,
        module=scene.modules,
    )


def measure(
    scene: Scene, traj: aajr.Trajectory, method: str, iterations: int, gamma: float = 0.0
) -> tuple[Tensor, Tensor]:
    """mean relu(√q − γ) over the rows at the start of every step, and their √q ``[T · B]``, detached.

    √q is the change of the predicted distributions (Fisher metric, summed over scored tokens) per norm of a token:
    along the gradient over the row (``aligned``), or along the direction that moves them most of what is open to
    attack (``spectral``), from below by power iteration that starts from the gradient.
    """
    points, directions = traj.points[:-1].flatten(0, 1), traj.directions.flatten(0, 1)
    repeated = lambda mask: mask.repeat(len(traj.directions), 1)
    unit = scene.unit
    hinge, units = baseline_penalty(
        *(method, scene.policy.forward, points, directions),
        start=directions if method == "spectral" else None,
        iterations=iterations,
        head=scene.policy.described_head(),
        mask=repeated(scene.labels != -100),
        attack_mask=repeated(scene.mask),
        gamma=gamma / unit,
        form="hinge",
        unit="sequence",
        module=scene.modules,
        return_units=True,
    )
    return unit * hinge, unit * units.flatten().sqrt()


def tune(
    config: dict[str, Any],
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    method: str,
    bound: float | None,
) -> dict[str, Any]:
    """Train on the mean of clean and adversarial loss, with √q ≤ γ; the embeddings stay as they are.

    λ follows the units of the training batch: text that was not learnt before.

    Args:
        config: of the experiment.
        model: trained in place.
        batches: one for every step.
        method: ``"aligned"``, ``"spectral"``, ``"none"``, or ``"more"``: none, with more steps of the ascent.
        bound: γ.

    Returns:
        ``seconds_per_step``: median processor time; ``multiplier``: λ at the end, None without a bound.
    """
    policy, multiplier = policy_of(model), None
    optimizer = torch.optim.Adam(model.parameters())
    rate, seconds = config["learning_rate"], []
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(batches))
    if bound is not None:
        multiplier = Multiplier(
            Constraint(gamma=bound, quantile=config["quantile"], unit="sequence", **config["controller"])
        )
    for step, batch in enumerate(batches):
        began = time.process_time()
        scene = scene_of(model, policy, batch)
        traj = ascent(config, scene, config["more" if method == "more" else "inner"]["steps"])
        task = (scene.loss(traj.x).mean() + scene.loss(traj.worst).mean()) / 2
        loss = task
        if multiplier is not None:
            weight, gamma = multiplier.at(step)
            assert gamma is not None
            hinge, roots = measure(scene, traj, method, config["power_iterations"], gamma)
            loss = task + (weight or 0.0) * hinge  # λ is found at the first step
            multiplier.add(step, task, hinge, roots.square(), gamma)
            multiplier.settle()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config["clip"])
        optimizer.step()
        schedule.step()
        seconds.append(time.process_time() - began)
    facts = {} if multiplier is None else multiplier.facts
    return {
        "multiplier": facts.get("multiplier"),
        "seconds_per_step": sorted(seconds)[len(seconds) // 2],
    }


def quantiles(
    config: dict[str, Any], model: nn.Module, source: Tensor, seed: int, bound: float | None
) -> dict[str, float]:
    """Quantiles of √q of both methods over the first steps of ascents on held-out windows, and shares above a bound."""
    settings, policy = config["held_out"], policy_of(model)
    measured: dict[str, list[Tensor]] = {"aligned": [], "spectral": []}
    for batch in batches_of(config, source, settings["batches"], 6000 + seed):
        scene = scene_of(model, policy, batch)
        traj = ascent(config, scene, config["inner"]["steps"])
        with torch.no_grad():
            for method, roots in measured.items():
                roots.append(measure(scene, traj, method, settings["power_iterations"])[1])
    facts = {}
    for method, roots in measured.items():
        values = torch.cat(roots)
        facts[method] = quantile_of(values, config["quantile"])
        if bound is not None:
            facts[f"{method}_above"] = float((values > bound).double().mean())
    return facts


def stability(config: dict[str, Any], model: nn.Module, source: Tensor, seed: int) -> dict[str, float]:
    """Means over steps and rows of κ⁻, κ⁺, L_eff and the expansion, with lengths in norms of a token."""
    (batch,) = batches_of(config, source, 1, 7000 + seed)
    scene = scene_of(model, policy_of(model), batch)
    traj = ascent(config, scene, config["inner"]["steps"])
    unit, scored = scene.unit, scene.labels != -100
    count = scored.sum(-1)
    report = aajr.stability_report(
        *(scene.loss, traj.x, traj),
        samples=config["samples"],
        func=scene.policy.forward,
        head=scene.policy.described_head(),
        output_mask=scored,
        output_bounds=(1 / count, 2**0.5 / count),
        nearby=config["nearby"] * config["radius"] * unit,
        generator=torch.Generator().manual_seed(8000 + seed),
        module=scene.modules,
    )
    summary = report.to_dict()["summary"]
    lengths = {name: summary[name] * unit**2 for name in ("kappa", "kappa_positive", "smoothness")}
    return lengths | {"expansion": summary["expansion"]}
