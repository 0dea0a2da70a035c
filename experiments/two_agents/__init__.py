"""Two language models barter while each perturbs what the other sees: does a bound steady their training?

At matched clean payoff, over the weight of the payoff under attack and γ together.
"""

from __future__ import annotations

from typing import Any

from ..base import Experiment, Task, configured
from ..store import Row
from .evaluation import evaluate
from .policies import from_scratch
from .report import report
from .training import METHODS, train


def tasks(config: dict[str, Any]) -> list[Task]:
    """A run each; seed after seed."""
    return [
        Task(
            f"{seed}/{method}/{w:g}" + (f"/{gamma:g}" if gamma is not None else ""),
            {"config": config, "seed": seed, "method": method, "w": w, "gamma": gamma},
        )
        for seed in range(config["seeds"])
        for method in METHODS
        for w, gamma in (((w, None) for w in config["unbounded"]) if method == "none" else config["bounded"])
    ]


def work(config: dict[str, Any], seed: int, method: str, w: float, gamma: float | None) -> list[Row]:
    """The row of one run; what its policies are worth is left out where it broke off."""
    pair = from_scratch(config["game"], config["model"], seed)
    history = train(config, pair, seed, method, w, gamma)
    row: Row = {"seed": seed, "method": method, "w": w, "gamma": gamma, **history}
    return [row | (evaluate(config, pair, seed) if history["finite"] else {})]


EXPERIMENT = Experiment("two-agents", configured(__file__), tasks, work, report)
