"""Is the constraint met by a language model? The one over bytes of :mod:`..language_model`, by ``fit(validation=)``."""

from __future__ import annotations

import copy
import functools
import json
import math
from typing import Any

from ..base import Experiment, Task, configured
from ..store import Row
from .report import report


def tasks(config: dict[str, Any]) -> list[Task]:
    """One training each; those of a seed start from the same model."""
    return [
        Task(f"{share:g}/{seed}", {"config": config, "seed": seed, "share": share})
        for seed in range(config["seeds"])
        for share in (*config["shares"], config["loose"])
    ]


def work(config: dict[str, Any], seed: int, share: float) -> list[Row]:
    """The row of a training under a share of the quantile at the start, measured on windows it has not seen."""
    from aajr_kernels.training import Constraint, Cosine, FitConfig, ObjectiveConfig, fit

    from ..language_model.models import small
    from ..language_model.training import batches_of

    text, state, quantile = _start(json.dumps(config, sort_keys=True), seed)
    model: Any = small(config, 0)
    gamma, steps = share * quantile, config["steps"]
    model.load_state_dict(state)
    model.get_input_embeddings().requires_grad_(False)
    constraint = Constraint(
        gamma=gamma,
        quantile=config["quantile"],
        steps="all",
        batch_steps=config["inner"]["steps"],
        follow="validation",
        rate=config["rate"],
    )
    settings = FitConfig(
        steps=steps,
        objective=ObjectiveConfig(
            attack=_attack(config), penalty=constraint, adversarial_weight=0.0, clean_weight=1.0
        ),
        learning_rate=Cosine(config["learning_rate"], 0.0, steps),
        seed=seed,
    )
    learnt, held_out = (
        batches_of(config, part, steps, 10 * seed + i)
        for i, part in ((100_000, text.train), (200_000, text.validation))
    )
    rows = fit(model, learnt, settings, validation=held_out, progress=False).rows
    within = _within(config, model, text.test, 300_000 + seed, gamma)
    measured = {f"{name}_held_out": value for name, value in within.items()}
    names = ("step", "multiplier", "violation", "binding")
    path = [{name: row[name] for name in names} for row in rows if "violation" in row]
    facts = {"seed": seed, "share": share, "gamma": gamma, **path[-1], **measured}
    loss = sum(row["clean_loss"] for row in rows[-10:]) / 10
    return [facts | {"loss": loss, "path": path[:: config["every"]]}]


@functools.lru_cache(maxsize=1)
def _start(key: str, seed: int) -> tuple[Any, dict[str, Any], float]:
    """Text, the trained model that all bounds start from, and its quantile of √q; kept for the tasks of the seed."""
    from ..language_model.models import small
    from ..language_model.text import plays
    from ..language_model.training import pretrain

    config, text = json.loads(key), plays()
    model = small(config, seed)
    pretrain(config, model, text.train, seed)
    quantile = _within(config, model, text.validation, 400_000 + seed)["quantile"]
    return text, copy.deepcopy(model.state_dict()), quantile


def _attack(config: dict[str, Any]) -> Any:
    from aajr_kernels.training import Attack

    return Attack(
        radius=config["radius"],
        steps=config["inner"]["steps"],
        step_size=config["inner"]["step"] * config["radius"],
        scope="sequence",
    )


def _within(
    config: dict[str, Any], model: Any, source: Any, seed: int, gamma: float = math.inf
) -> dict[str, float]:
    """The share of √q within γ and its quantile, over the windows and the steps of their ascents, apart from `fit`."""
    import torch

    import aajr_kernels as aajr
    from aajr_kernels.training import policy_of

    from ..language_model.text import scene_of
    from ..language_model.training import batches_of

    policy, training, units = policy_of(model), model.training, []
    model.eval()
    for batch in batches_of(config, source, config["evaluation"], seed):
        scene = scene_of(model, policy, batch)
        x, unit = scene.x, scene.unit
        radius, inner = unit * config["radius"], config["inner"]
        traj = aajr.ascend(
            *(scene.loss, x),
            radius=radius,
            steps=inner["steps"],
            step_size=inner["step"] * radius,
            scope="sequence",
            mask=scene.mask,
            module=model,
        )
        with torch.no_grad():
            mask = scene.labels != -100
            options: dict[str, Any] = dict(
                head=policy.head, metric="fisher", mask=mask, batch_steps=len(traj)
            )
            _, aux = aajr.trajectory_penalty(policy.forward, x, traj, **options)
        units.append(unit * aux.units.flatten().sqrt())
    model.train(training)
    roots = torch.cat(units).sort().values
    return {
        "within": float((roots <= gamma).double().mean()),
        "quantile": float(roots[math.ceil(config["quantile"] * len(roots)) - 1]),
    }


EXPERIMENT = Experiment("constraint-lm", configured(__file__), tasks, work, report)
