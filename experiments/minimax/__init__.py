"""Minimax training: does a penalty along the ascent steady a policy that is trained on its inner maximiser?

Every method starts from the same unregularised policy, takes inner steps in multiples of the bound 2/κ₀ of that policy,
and is brought to the same nominal loss on the validation part with the same number of runs, seed by seed.
"""

from __future__ import annotations

from typing import Any

from ..base import Experiment, Task
from .report import report
from .search import work
from .training import METHODS

__all__ = ["EXPERIMENT"]


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


EXPERIMENT = Experiment("minimax", config, tasks, work, report)
