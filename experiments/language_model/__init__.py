"""Language models: clean and robust perplexity under an adversary of embeddings and one of tokens.

Two parts: a small transformer over bytes, trained here, at matched clean perplexity over several seeds; and
SmolLM2-135M-Instruct with LoRA, one seed, as a check that the method runs on a pretrained model.
"""

from __future__ import annotations

from typing import Any

from ..base import Experiment, Task
from .parts import ADAPTED, SCRATCH, work
from .report import report


def config(quick: bool) -> dict[str, Any]:
    """Seeds from 0; the pilot that set radius, price and search used seeds from 100."""
    evaluation: dict[str, Any] = {
        "clean_rows": 128,
        "rows": 16,
        "radii": [0.5, 1.0, 2.0],
        "attack": {"steps": 20, "step_sizes": [0.25, 0.1], "restarts": 2},
        "substitution": {"budget": 4, "tries": 16},
        "curvature": "exact",
    }
    scratch: dict[str, Any] = {
        "seeds": 6,
        "layers": 2,
        "width": 96,
        "length": 64,
        "turn": 8,
        "batch": 8,
        "pretraining": {"steps": 400, "batch": 16, "learning_rate": 3e-3},
        "steps": 50,
        "learning_rate": 1e-3,
        "radius": 0.3,
        "inner": {"steps": 3, "step": 0.5},
        "power_iterations": 2,
        "price": 1.03,
        "budget": 3,
        "probe": 4,
        "search": {"weighted": [0.5, 0.5]}
        | {method: [-1.0, 0.5] for method in ("random", "frobenius", "spectral", "aajr")},
        "evaluation": evaluation,
    }
    adapted: dict[str, Any] = {
        "model": "smollm2",
        "seeds": 1,
        "rank": 8,
        "characters": 400_000,
        "length": 48,
        "turn": 8,
        "batch": 2,
        "steps": 30,
        "learning_rate": 5e-4,
        "radius": 0.05,
        "inner": {"steps": 2, "step": 0.5},
        "power_iterations": 1,
        "share": 0.1,
        "probe": 2,
        "evaluation": {
            "clean_rows": 16,
            "rows": 4,
            "radii": [1.0],
            "attack": {"steps": 20, "step_sizes": [0.25, 0.1], "restarts": 1},
            "substitution": {"budget": 2, "tries": 8},
            "curvature": "difference",
        },
    }
    if quick:
        small = {"clean_rows": 8, "rows": 2, "substitution": {"budget": 2, "tries": 4}}
        small["attack"] = {"steps": 2, "step_sizes": [0.5], "restarts": 1}
        tiny = {"layers": 1, "width": 32, "length": 32, "batch": 2, "steps": 3, "probe": 1}
        scratch |= tiny | {"seeds": 2, "budget": 1, "evaluation": evaluation | small}
        scratch["pretraining"] = {"steps": 10, "batch": 4, "learning_rate": 3e-3}
        adapted |= tiny | {"model": "stand-in", "rank": 2, "evaluation": adapted["evaluation"] | small}
    return {"scratch": scratch, "adapted": adapted}


def tasks(config: dict[str, Any]) -> list[Task]:
    scratch: list[tuple[str, dict[str, Any]]] = [
        (f"scratch/{seed}/{method}", {"part": "scratch", "seed": seed, "method": method})
        for seed in range(config["scratch"]["seeds"])
        for method in SCRATCH
    ]
    adapted: list[tuple[str, dict[str, Any]]] = [
        (
            f"adapted/{seed}/{method}/{stage}",
            {"part": "adapted", "seed": seed, "method": method, "stage": stage},
        )
        for seed in range(config["adapted"]["seeds"])
        for method in ADAPTED
        for stage in ("training", "evaluation")
        if (method, stage) != ("untouched", "training")
    ]
    return [Task(key, {"config": config, **arguments}) for key, arguments in scratch + adapted]


EXPERIMENT = Experiment("language-model", config, tasks, work, report)
