"""When is a step of the inner ascent monotone? The general condition, its special cases, and where those fail."""

from __future__ import annotations

from typing import Any

from ..base import Experiment, Task
from ..store import Row
from .closed import FAMILIES, trials
from .networks import network_rows
from .report import report


def config(quick: bool) -> dict[str, Any]:
    networks = {
        "width": 32,
        "epochs": 15,
        "steps": 6,
        "samples": 9,
        "factors": [0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64],
        "shares": [0.05, 0.1, 0.25, 0.5, 1.0, 2.0],
    }
    if quick:
        networks |= {"epochs": 2, "steps": 2, "samples": 3, "factors": [1, 64], "shares": [1.0]}
    return {
        "closed": {"seeds": 1 if quick else 2, "rows": 32 if quick else 256, "steps": 2 if quick else 4},
        "networks": {"seeds": 1 if quick else 5, **networks},
    }


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


EXPERIMENT = Experiment("step-condition", config, tasks, work, report)
