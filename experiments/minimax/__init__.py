"""Minimax training: does a penalty along the ascent steady a policy that is trained on its inner maximiser?

Every method starts from the same unregularised policy, takes inner steps in multiples of the bound 2/κ₀ of that policy,
and is brought to the same nominal loss on the validation part with the same number of runs, seed by seed.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

from ..base import Experiment, Task
from ..digits.data import load
from ..digits.training import nominal, unit_weight
from ..search import interpolated, search
from ..store import Row
from .report import report
from .training import METHODS, curvature, evaluate, inner_ascent, pretrain, tune


def config(quick: bool) -> dict[str, Any]:
    """Seeds from 0; the pilot that set radius, frequencies, price and search used seeds from 100."""
    full: dict[str, Any] = {
        "seeds": 10,
        "factors": [0.5, 1.0, 2.0, 4.0, 8.0],
        "sizes": [897, 400, 500],
        "width": 64,
        "gain": 8.0,
        "batch": 128,
        "pretraining": {"epochs": 15, "learning_rate": 0.01},
        "epochs": 8,
        "learning_rate": 0.003,
        "radius": 0.85,
        "inner_steps": 6,
        "curvature_steps": 10,
        "power_iterations": 3,
        "price": 1.1,
        "budget": 4,
        "search": {method: [0.5 if method == "none" else -0.5, 0.5] for method in METHODS},
        "attack": {"steps": 20, "step": [0.25, 0.1], "restarts": 1, "losses": ["cross-entropy", "margin"]},
    }
    if quick:
        small = {"seeds": 2, "factors": [1.0, 8.0], "sizes": [64, 32, 32], "width": 8, "batch": 32}
        small |= {"epochs": 2, "inner_steps": 2, "curvature_steps": 2, "budget": 1}
        short = {"attack": full["attack"] | {"steps": 2, "step": [0.5]}}
        full |= small | short | {"pretraining": full["pretraining"] | {"epochs": 2}}
    return full


def tasks(config: dict[str, Any]) -> list[Task]:
    return [
        Task(f"{seed}/{factor:g}", {"config": config, "seed": seed, "factor": factor})
        for seed in range(config["seeds"])
        for factor in config["factors"]
    ]


def work(config: dict[str, Any], seed: int, factor: float) -> list[Row]:
    """Rows of plain minimax training and of all runs of all methods, at one seed and step size."""
    digits = load(seed, tuple(config["sizes"]))
    start = pretrain(config, seed, digits.train)
    kappa_0 = curvature(config, start, digits.validation)
    eta = factor * 2 / kappa_0
    common: Row = {"seed": seed, "factor": factor, "kappa_0": kappa_0, "eta": eta}

    def run(method: str, unit: float, exponent: float) -> tuple[Row, Any]:
        knob = 10**exponent
        mix, weight = (knob, 0.0) if method == "none" else (1.0, unit * knob)
        policy, history = tune(config, seed, start, digits.train, method, eta, mix=mix, weight=weight)
        row = common | {"method": method, "knob": knob, "unit": unit}
        return row | {"validation": nominal(policy, digits.validation), **history}, policy

    def test(policy: Any) -> dict[str, float]:
        return evaluate(config, policy, digits.test, seed, eta)

    plain, policy = run("none", 1.0, 0.0)
    target = config["price"] * plain["validation"]["nominal"]

    def runs_of(method: str) -> list[Row]:
        unit = 1.0
        if method != "none":
            # 1 over the penalty of the policy that training starts from: λ is counted in these units
            ascent = lambda config, policy, part, _: inner_ascent(config, policy, part, eta)
            unit = unit_weight(config, seed, method, start, digits.train, ascent)

        def propose(rows: list[Row]) -> float:
            tried = [(math.log10(row["knob"]), row["validation"]["nominal"]) for row in rows]
            return interpolated(tried, target, *config["search"][method])

        own = lambda exponent: run(method, unit, exponent)
        return search(config["budget"], propose, own, lambda row: rank(row, target), test)

    rows = [plain | {"method": "plain", "chosen": True, "test": test(policy)}]
    return [row | {"target": target} for row in [*rows, *itertools.chain(*map(runs_of, METHODS))]]


def rank(row: Row, target: float) -> tuple[bool, float]:
    """The finished run whose nominal validation loss is nearest to the target, by ratio."""
    return row["finite"], -abs(math.log(row["validation"]["nominal"] / target))


EXPERIMENT = Experiment("minimax", config, tasks, work, report)
