"""Minimax training: does a penalty along the ascent steady a policy that is trained on its inner maximiser?

Every method starts from the same unregularised policy, takes inner steps in multiples of the bound 2/κ₀ of that policy,
and is brought to the same nominal loss on the validation part with the same number of runs, seed by seed.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

from ..base import Experiment, Task, configured
from ..digits.data import load
from ..digits.training import nominal, unit_weight
from ..search import interpolated, search
from ..store import Row
from .report import report
from .training import METHODS, curvature, evaluate, inner_ascent, pretrain, tune


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


EXPERIMENT = Experiment("minimax", configured(__file__), tasks, work, report)
