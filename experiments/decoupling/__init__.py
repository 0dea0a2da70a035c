"""At a given step size every method holds the smoothness along its own ascent at 1/η: what does that cost, and steady?

The sine policy of :mod:`..minimax`, trained on its inner maximiser: attacked from its clean images, and with
perturbations that last, a regime in which plain training oscillates.
"""

from __future__ import annotations

from typing import Any

from ..base import Experiment, Task, configured
from ..store import Row
from .report import report


def tasks(config: dict[str, Any]) -> list[Task]:
    """All methods of one setting at one seed: they start from the same policy."""
    return [
        Task(f"{seed}/{setting}", {"config": config, "seed": seed, "setting": setting})
        for seed in range(config["seeds"])
        for setting in config["settings"]
    ]


def work(config: dict[str, Any], seed: int, setting: str) -> list[Row]:
    """A row for every method."""
    from ..digits.data import load
    from ..digits.training import nominal, robust, unit_weight
    from ..minimax.training import curvature, pretrain
    from .training import METHODS, Regime, fresh, train

    config = config | config["settings"][setting]
    digits = load(seed, tuple(config["sizes"]))
    start = pretrain(config, seed, digits.train)
    kappa_0 = curvature(config, start, digits.validation)
    regime = Regime(config["kind"], config["inner_steps"], config["radius"], config["factor"] * 2 / kappa_0)
    common = {"seed": seed, "setting": setting, "kappa_0": kappa_0, "eta": regime.eta}
    rows = []
    for method in METHODS:
        unit = 0.0
        if method != "none":
            ascent = lambda config, policy, part, _: fresh(regime, policy, part)
            unit = unit_weight(config, seed, method, start, digits.train, ascent)
        policy, history = train(config, seed, start, digits.train, method, regime, unit)
        row = common | {"method": method, **history}
        if history["finite"]:
            attacked = robust(config, policy, digits.test, seed)
            row |= {"nominal": nominal(policy, digits.test)["nominal"], **attacked}
        rows.append(row)
    return rows


EXPERIMENT = Experiment("decoupling", configured(__file__), tasks, work, report)
