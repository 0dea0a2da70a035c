"""When is a step of the inner ascent monotone? The general condition, its special cases, and where those fail."""

from __future__ import annotations

from typing import Any

from ..base import Experiment, Task, configured
from ..store import Row
from .closed import FAMILIES, trials
from .networks import network_rows
from .report import report


def tasks(config: dict[str, Any]) -> list[Task]:
    closed, networks = dict(config["closed"]), dict(config["networks"])
    seeds, network_seeds = closed.pop("seeds"), networks.pop("seeds")
    kinds = [(family, range(seeds), closed) for family in FAMILIES]
    kinds.append(("network", range(network_seeds), networks))
    return [
        Task(f"{family}/{seed}", {"family": family, "seed": seed, **options})
        for family, numbers, options in kinds
        for seed in numbers
    ]


def work(family: str, **arguments: Any) -> list[Row]:
    if family == "network":
        return [{"family": family, **row} for row in network_rows(**arguments)]
    return trials(family, **arguments)


EXPERIMENT = Experiment("step-condition", configured(__file__), tasks, work, report)
