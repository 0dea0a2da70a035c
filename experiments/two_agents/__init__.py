"""Two language models barter while each perturbs what the other sees: does a penalty steady their training?

Small models from scratch, over seeds; and a single run of a pretrained model with an adapter for each agent.
"""

from __future__ import annotations

from typing import Any

from ..base import Experiment, Task
from .report import report
from .search import work
from .training import METHODS

__all__ = ["EXPERIMENT"]


def config(quick: bool) -> dict[str, Any]:
    """Seeds from 0; the pilot that set learning rate, radius, unit penalties and weights used seeds from 100."""
    full: dict[str, Any] = {
        "seeds": 8,
        "game": {"lots": 4, "counts": 3, "values": 4, "regard": 0.5},
        "games": 96,
        "model": {"width": 32, "layers": 2},
        "batch": 32,
        "updates": 80,
        "learning_rate": 0.01,
        "clip": 0.5,
        "temperature": 0.02,
        "radius": 3.0,
        "inner": {"steps": 2, "step": 1.0},
        "power_iterations": 2,
        "mixes": [1.0, 2.0],
        "weights": [0.003, 0.03],
        "unit_penalties": {
            "frobenius": 1.5,
            "spectral": 1.1,
            "aajr-joint": 1.1,
            "aajr-agents": 0.55,
        },
        "validation_attack": {"steps": 10, "step": [0.25], "restarts": 1},
        "attack": {"steps": 20, "step": [0.25, 0.1], "restarts": 2},
        "stability_games": 64,
        "play_rounds": 8,
        "language_model": {
            "model": "smollm2",
            "rank": 4,
            "methods": ["none", "aajr-joint", "aajr-agents"],
            "game": {"lots": 3, "counts": 3, "values": 4, "regard": 0.5},
            "games": 6,
            "batch": 2,
            "updates": 6,
            "temperature": 0.02,
            "learning_rate": 0.002,
            "clip": 0.5,
            "radius": 1.0,
            "inner": {"steps": 2, "step": 0.5},
            "weight": 0.03,
            "power_iterations": 1,
            "attack": {"steps": 4, "step": [0.25], "restarts": 1},
            "stability_games": 2,
            "play_rounds": 8,
        },
    }
    if quick:
        short = {"steps": 2, "step": [0.5], "restarts": 1}
        small = {"seeds": 2, "games": 4, "model": {"width": 8, "layers": 1}, "batch": 4, "updates": 2}
        small |= {"validation_attack": short, "attack": short, "stability_games": 2, "play_rounds": 1}
        tiny = {"model": "tiny", "games": 4, "batch": 2, "updates": 2, "attack": short, "play_rounds": 1}
        full |= small | {"language_model": full["language_model"] | tiny}
    return full


def tasks(config: dict[str, Any]) -> list[Task]:
    """A task for every method and seed, then the pretrained model's."""
    common = {"config": config}
    found = [
        Task(f"{method}/{seed}", common | {"seed": seed, "method": method, "model": "scratch"})
        for seed in range(config["seeds"])
        for method in METHODS
    ]
    return found + [
        Task(f"language/{method}", common | {"seed": 0, "method": method, "model": "language"})
        for method in config["language_model"]["methods"]
    ]


EXPERIMENT = Experiment("two-agents", config, tasks, work, report)
