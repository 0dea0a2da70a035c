"""One seed at one step size: every method is brought to the same nominal loss with the same number of runs."""

from __future__ import annotations

import math
from typing import Any

from ..digits.data import load
from ..store import Row
from .training import METHODS, curvature, evaluate, nominal, pretrain, tune, unit_weight

__all__ = ["nearest", "propose", "work"]


def propose(tried: list[tuple[float, float]], target: float, middle: float, stride: float) -> float:
    """The next exponent: a stride up or down until the target is bracketed, then linear interpolation between.

    Args:
        tried: exponents and the nominal losses that they gave.
        target: nominal loss.
        middle: the first exponent.
        stride: of the way to a bracket.
    """
    below = [pair for pair in tried if pair[1] <= target]
    above = [pair for pair in tried if pair[1] > target]
    if not tried:
        return middle
    if not above:
        return max(below)[0] + stride
    if not below:
        return min(above)[0] - stride
    (low, low_loss), (high, high_loss) = max(below), min(above)
    share = (target - low_loss) / (high_loss - low_loss)
    return low + min(max(share, 0.1), 0.9) * (high - low)


def nearest(rows: list[Row], target: float) -> int:
    """Index of the row whose nominal validation loss is nearest to the target, by ratio; of finished runs if any is."""

    def rank(index: int) -> tuple[bool, float]:
        return not rows[index]["finite"], abs(math.log(rows[index]["validation"]["nominal"] / target))

    return min(range(len(rows)), key=rank)


def work(config: dict[str, Any], seed: int, factor: float) -> list[Row]:
    """Rows of plain minimax training and of all runs of all methods; the chosen ones have what the test part says."""
    digits = load(seed, tuple(config["sizes"]))
    start = pretrain(config, seed, digits.train)
    kappa_0 = curvature(config, start, digits.validation)
    eta = factor * 2 / kappa_0
    common: Row = {"seed": seed, "factor": factor, "kappa_0": kappa_0, "eta": eta}

    def run(method: str, unit: float, exponent: float) -> tuple[Row, Any]:
        knob = 10**exponent
        given = {"mix": knob, "weight": 0.0} if method == "none" else {"mix": 1.0, "weight": unit * knob}
        policy, history = tune(config, seed, start, digits.train, method, eta, **given)
        row = common | {"method": method, "knob": knob, "unit": unit, "chosen": False}
        return row | {"validation": nominal(policy, digits.validation), **history}, policy

    plain, policy = run("none", 1.0, 0.0)
    target = config["price"] * plain["validation"]["nominal"]
    plain |= {"method": "plain", "chosen": True, "test": evaluate(config, policy, digits.test, seed, eta)}
    found = [plain]
    for method in METHODS:
        unit = unit_weight(config, seed, start, digits.train, eta, method)
        runs: list[tuple[Row, Any]] = []
        for _ in range(config["budget"]):
            tried = [(math.log10(row["knob"]), row["validation"]["nominal"]) for row, _ in runs]
            exponent = propose(tried, target, *config["search"][method])
            runs.append(run(method, unit, exponent))
        rows = [row for row, _ in runs]
        best = nearest(rows, target)
        rows[best] |= {"chosen": True, "test": evaluate(config, runs[best][1], digits.test, seed, eta)}
        found += rows
    for row in found:
        row["target"] = target
    return found
