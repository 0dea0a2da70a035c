"""Is the constraint met? The policy of :mod:`..digits` under bounds on ‖J u‖ that bind, and under one that does not."""

from __future__ import annotations

import math
from typing import Any

from ..base import Experiment, Task, configured
from ..store import Row
from .report import report


def tasks(config: dict[str, Any]) -> list[Task]:
    """One training each."""
    return [
        Task(
            f"{followed}/{gamma:g}/{seed}",
            {"config": config, "seed": seed, "gamma": gamma, "followed": followed},
        )
        for seed in range(config["seeds"])
        for followed in config["followed"]
        for gamma in (*config["gammas"], config["loose"])
    ]


def work(config: dict[str, Any], seed: int, gamma: float, followed: str) -> list[Row]:
    """The row of a training: where λ went, and the share of the units within γ on images that it has not seen.

    λ follows the units of the ``"training"`` batch, whose hinge is minimised, or those of a ``"validation"`` batch.
    """
    import torch

    from aajr_kernels import trajectory_penalty
    from aajr_kernels.training import Constraint, Multiplier

    from ..digits.data import load
    from ..digits.training import Batches, inner_ascent, make_policy, nominal, nominal_losses

    digits, policy = load(seed, tuple(config["sizes"])), make_policy(config["width"], seed)
    batches = Batches(digits.train, config["batch"], 1000 + seed)
    starts, others, held_out = (torch.Generator().manual_seed(1000 * i + seed) for i in (2, 3, 4))
    steps = config["epochs"] * batches.per_epoch
    optimizer = torch.optim.Adam(policy.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config["learning_rate"], total_steps=steps)
    multiplier = Multiplier(Constraint(gamma=gamma, quantile=config["quantile"], metric="l2", steps="all"))
    measure: dict[str, Any] = dict(metric="l2", batch_steps=config["inner"]["steps"])
    path: list[dict[str, float]] = []
    validation = Batches(digits.validation, min(config["batch"], len(digits.validation)), 5000 + seed).epochs(
        steps
    )

    def units_of(part: Any, generator: torch.Generator) -> torch.Tensor:
        traj = inner_ascent(config, policy, part, generator, evaluate_last=False)
        with torch.no_grad():
            return trajectory_penalty(policy, part.x, traj, **measure)[1].units

    for step, batch in enumerate(batches.epochs(config["epochs"])):
        entropy, error, _ = nominal_losses(policy, batch)
        traj = inner_ascent(config, policy, batch, starts, evaluate_last=False)
        weight, bound = multiplier.at(step)
        hinge, aux = trajectory_penalty(policy, batch.x, traj, gamma=bound, form="hinge", **measure)
        optimizer.zero_grad()
        (entropy + error + (weight or 0.0) * hinge).backward()
        optimizer.step()
        schedule.step()
        units = aux.units if followed == "training" else units_of(next(validation), others)
        multiplier.add(step, entropy + error, hinge, units, bound)
        multiplier.settle()
        if (step + 1) % config["every"] == 0 and multiplier.facts:
            path.append({"step": step + 1, **multiplier.facts})
    facts: Row = {"seed": seed, "gamma": gamma, "followed": followed, **multiplier.facts}
    for name, part in (("train", digits.train), ("held_out", digits.test)):
        roots = units_of(part, held_out).flatten().sqrt().sort().values
        facts[f"within_{name}"] = float((roots <= gamma).double().mean())
        facts[f"quantile_{name}"] = float(roots[math.ceil(config["quantile"] * len(roots)) - 1])
    return [facts | {"nominal": nominal(policy, digits.test)["nominal"], "path": path}]


EXPERIMENT = Experiment("constraint", configured(__file__), tasks, work, report)
