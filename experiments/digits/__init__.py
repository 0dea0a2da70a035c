"""Price of robustness on digits: a classifier with a utility head, attacked only through its classes.

Every method gets the same training, the same points of the same kind of ascent, and the same number of weights λ. They
are compared at matched robust accuracy under a strong attack, seed by seed.
"""

from __future__ import annotations

from typing import Any

from ..base import Experiment, Task, configured
from ..search import bisected, search
from ..store import Row
from .data import load
from .report import report
from .training import METHODS, evaluate, inner_ascent, train, unit_weight


def tasks(config: dict[str, Any]) -> list[Task]:
    return [
        Task(f"{method}/{seed}", {"config": config, "seed": seed, "method": method})
        for seed in range(config["seeds"])
        for method in ("none", *METHODS)
    ]


def work(config: dict[str, Any], seed: int, method: str) -> list[Row]:
    """Rows of all weights of one method at one seed: a bisection of log λ towards the target."""
    digits = load(seed, tuple(config["sizes"]))
    unit = 0.0
    if method != "none":
        # 1 over the penalty of the policy trained without one: λ is counted in these units, whatever the metric
        unit = unit_weight(
            config, seed, method, train(config, seed, digits.train), digits.train, inner_ascent
        )

    def run(exponent: float) -> tuple[Row, Any]:
        weight = 10**exponent if unit else 0.0
        policy = train(config, seed, digits.train, method, unit * weight)
        row: Row = {"seed": seed, "method": method, "weight": weight}
        row |= {"unit": unit} if unit else {}
        return row | {"validation": evaluate(config, policy, digits.validation, seed)}, policy

    def propose(rows: list[Row]) -> float:
        reached = [row["validation"]["robust_accuracy"] >= config["target"] for row in rows]
        return bisected(reached, config["middle"], config["half_range"])

    return search(
        config["budget"] if unit else 1,
        propose,
        run,
        lambda row: rank(row, config["target"]),
        lambda policy: evaluate(config, policy, digits.test, seed),
    )


def rank(row: Row, target: float) -> tuple[bool, float]:
    """Of the runs that reach the target the one with the smallest nominal loss; otherwise the most robust one."""
    result = row["validation"]
    reached = result["robust_accuracy"] >= target
    return reached, -result["nominal"] if reached else result["robust_accuracy"]


EXPERIMENT = Experiment("digits", configured(__file__), tasks, work, report)
