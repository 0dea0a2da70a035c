"""Positive and negative curvature along an ascent, with what each is made of, and where `fit` measures its penalty.

The policy of :mod:`..digits` without and with penalties, and the small transformer of :mod:`..language_model` after
plain training, whose numbers come from the diagnostics of a training step.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
import torch.nn.functional as F

import aajr_kernels as aajr

from ..base import Experiment, by_part, configured
from ..store import Row
from .report import report


def work(config: dict[str, Any], part: str, seed: int) -> list[Row]:
    """Rows of one seed: one for every method on digits, one of the language model."""
    run = {"digits": _digits, "language": _language}[part]
    return [{"part": part, "seed": seed, **row} for row in run(config[part], seed)]


def _digits(config: dict[str, Any], seed: int) -> list[Row]:
    from ..digits.data import CLASSES, load
    from ..digits.training import inner_ascent, nominal, train, unit_weight

    digits = load(seed, tuple(config["sizes"]))
    images = digits.test[: config["images"]]
    without = train(config, seed, digits.train)
    rows = []
    for method, units in config["weights"].items():
        policy = without
        if method != "none":
            weight = units * unit_weight(config, seed, method, without, digits.train, inner_ascent)
            policy = train(config, seed, digits.train, method, weight)
        traj = inner_ascent(config, policy, images, torch.Generator().manual_seed(4000 + seed))
        classes = lambda x, policy=policy: policy(x)[:, :CLASSES]
        loss_fn = lambda x, classes=classes: F.cross_entropy(classes(x), images.y, reduction="none")
        stability = aajr.stability_report(
            *(loss_fn, images.x, traj),
            samples=config["samples"],
            func=classes,
            nearby=config["nearby"] * config["radius"],
            generator=torch.Generator().manual_seed(5000 + seed),
            module=policy,
        )
        losses = {"nominal": nominal(policy, digits.test)["nominal"]}
        rows.append({"method": method, **losses, **stability.to_dict()["summary"]})
    return rows


def _language(config: dict[str, Any], seed: int) -> list[Row]:
    from aajr_kernels.training import Attack, Diagnostics, Objective, ObjectiveConfig, Penalty

    from ..language_model import models, text
    from ..language_model.training import batches_of, pretrain

    plays, model = text.plays(), models.small(config, seed)
    pretrain(config, model, plays.train, seed)
    (batch,) = batches_of(config, plays.test, 1, 3000 + seed)
    attack = Attack(
        radius=config["radius"],
        relative=True,
        steps=config["inner"]["steps"],
        step_size=config["inner"]["step"] * config["radius"],
    )
    diagnostics = Diagnostics(1, samples=config["samples"], smoothness=True, nearby=config["nearby"])
    penalty = Penalty(weight=0.1, steps="worst")
    objective = Objective(model, ObjectiveConfig(attack, penalty, diagnostics=diagnostics))
    reports: list[aajr.StabilityReport] = []

    def seconds(on_report: Any) -> float:
        began = time.process_time()
        objective(batch, on_report=on_report).total.backward()
        model.zero_grad()
        return time.process_time() - began

    pairs = [(seconds(None), seconds(reports.append)) for _ in range(config["timed"] + 1)]
    plain, whole = (min(times) for times in zip(*pairs[1:]))
    summary = reports[0].to_dict()["summary"]
    lengths = _sensitivities(config, objective, batch)
    return [{"method": "none", **summary, **lengths, "cost": (whole - plain) / plain}]


def _sensitivities(config: dict[str, Any], objective: Any, batch: Any) -> dict[str, float]:
    """‖J v‖² of a row for ‖v‖ = 1, mean over rows, along three directions at the worst point of every row.

    ``taken``: that of the step that led there, of norm 1 in every token, which ``steps="worst"`` measures; ``token``
    and ``sequence``: the gradient at the point itself, of norm 1 in every token, and over the row.
    """
    prepared, policy = objective.prepared(batch), objective.policy
    x = prepared.embedded(policy).detach()
    unit = x.square().sum(-1).mean().sqrt().item()
    loss_fn = policy.loss_fn(prepared.inputs, prepared.labels, "mean")
    traj = aajr.ascend(
        *(loss_fn, x),
        radius=config["radius"] * unit,
        steps=config["inner"]["steps"],
        step_size=config["inner"]["step"] * config["radius"] * unit,
        scope="token",
        mask=prepared.attackable,
        module=objective.module,
    )
    point = traj.worst.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_fn(point).sum(), point)
    steps = traj.worst_steps
    allowed = {} if prepared.attackable is None else {"mask": prepared.attackable}
    directions = {
        "taken": traj.directions[steps, torch.arange(len(steps))],
        "token": aajr.normalize(gradient, scope="token", **allowed),
        "sequence": aajr.normalize(gradient, scope="sequence", **allowed),
    }
    q = {
        name: aajr.aligned_penalty(
            functools.partial(policy.forward, **prepared.inputs),
            *(point.detach(), aajr.normalize(v, scope="sequence")),
            head=policy.described_head(),
            mask=prepared.tokens("loss"),
            unit="sequence",
        ).item()
        for name, v in directions.items()
    }
    return {f"q_{name}": value for name, value in q.items()} | {"token_norm": unit}


EXPERIMENT = Experiment("curvature", configured(__file__), by_part("digits", "language"), work, report)
