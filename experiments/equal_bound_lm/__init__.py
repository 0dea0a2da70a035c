"""Clean loss of a small language model, trained on an adversary, at the same bound and the same realised sensitivity.

Against what the same time buys without a bound too: more steps of the adversary.
"""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

from ..base import Experiment, Task, configured
from ..store import Row
from .report import BOUNDED, report


def tasks(config: dict[str, Any]) -> list[Task]:
    """One training each; those of a seed together, as they share what they start from."""
    runs: list[tuple[str, float | None]] = [("none", None), ("more", None)]
    runs += [(method, gamma) for gamma in config["gammas"] for method in BOUNDED]
    return [
        Task(
            f"{method}/{'-' if gamma is None else format(gamma, 'g')}/{seed}",
            {"config": config, "seed": seed, "method": method, "gamma": gamma},
        )
        for seed in range(config["seeds"])
        for method, gamma in runs
    ]


def work(config: dict[str, Any], seed: int, method: str, gamma: float | None) -> list[Row]:
    """The row of a training; `gamma` is a share of the quantile of ‖J u‖ at the start."""
    from ..language_model import models
    from ..language_model.evaluation import evaluate_losses
    from ..language_model.training import batches_of
    from .training import quantiles, stability, tune

    text, state, at_start = _start(json.dumps(config, sort_keys=True), seed)
    model = models.small(config, seed)
    model.load_state_dict(state)
    bound = None if gamma is None else gamma * at_start
    batches = batches_of(config, text.train, config["steps"], seed)
    course = tune(config, model, batches, method, bound)
    held_out = {
        part: quantiles(config, model, source, seed, bound)
        for part, source in (("validation", text.validation), ("test", text.test))
    }
    row: Row = {
        "seed": seed,
        "method": method,
        "gamma": gamma,
        "bound": bound,
        "at_start": at_start,
        **course,
    }
    row["validation"], row["realised"] = held_out["validation"], held_out["test"]["aligned"]
    row["test"] = evaluate_losses(config, model, text.test, seed)
    return [row | {"stability": stability(config, model, text.test, seed)}]


@functools.lru_cache(maxsize=1)
def _start(key: str, seed: int) -> tuple[Any, Any, float]:
    """Text, the model that all runs of a seed start from, and its quantile of ‖J u‖ on validation text."""
    from ..language_model import models, text
    from ..language_model.training import pretrain
    from .training import quantiles

    config, plays = json.loads(key), text.plays()
    model = models.small(config, seed)
    pretrain(config, model, plays.train, seed)
    at_start = quantiles(config, model, plays.validation, seed, None)["aligned"]
    return plays, copy.deepcopy(model.state_dict()), at_start


EXPERIMENT = Experiment("equal-bound-lm", configured(__file__), tasks, work, report)
