"""Price of robustness on digits: a classifier with a utility head, attacked through its classes alone.

Every method gets the same training, the same points of the same kind of ascent, and the same number of weights λ. They
are compared at matched robust accuracy under a strong attack, seed by seed.
"""

from __future__ import annotations

from typing import Any

from ..base import Experiment, Task
from .report import report
from .search import methods, work

__all__ = ["EXPERIMENT"]


def config(quick: bool) -> dict[str, Any]:
    """Seeds from 0; the pilot that set radius, target and range of λ used seeds from 100."""
    full: dict[str, Any] = {
        "seeds": 10,
        "sizes": [897, 400, 500],
        "width": 64,
        "epochs": 25,
        "batch": 128,
        "learning_rate": 0.01,
        "radius": 0.5,
        "inner": {"steps": 3, "step": 0.5},
        "power_iterations": 3,
        "budget": 6,
        "middle": 0.0,
        "half_range": 2.0,
        "target": 0.6,
        "attack": {"steps": 20, "step": [0.25, 0.1], "restarts": 2, "losses": ["cross-entropy", "margin"]},
    }
    if quick:
        small = {"seeds": 2, "sizes": [64, 32, 32], "width": 8, "epochs": 1, "batch": 32, "budget": 2}
        full |= small | {"attack": full["attack"] | {"steps": 2, "step": [0.5], "restarts": 1}}
    return full


def tasks(config: dict[str, Any]) -> list[Task]:
    return [
        Task(f"{method}/{seed}", {"config": config, "seed": seed, "method": method})
        for seed in range(config["seeds"])
        for method in methods()
    ]


EXPERIMENT = Experiment("digits", config, tasks, work, report)
