"""The penalty on every k-th step with k·λ: losses and processor time at k = 1, 2, 4, 8, beside training without it.

The policy of :mod:`..digits` and the small transformer of :mod:`..language_model`, trained on the clean loss and the
penalty: between the steps of the penalty there is no attack either. All runs of a seed share start and batches.
"""

from __future__ import annotations

import copy
import time
from typing import Any

from ..base import Experiment, by_part, configured
from ..store import Row
from .report import report


def work(config: dict[str, Any], part: str, seed: int) -> list[Row]:
    """Rows of one seed: without a penalty (``every`` None), and at every k of the configuration."""
    run = {"digits": _digits, "language": _language}[part]
    return [{"part": part, "seed": seed, **row} for row in run(config[part], config["every"], seed)]


def _digits(config: dict[str, Any], every: list[int], seed: int) -> list[Row]:
    from ..digits.data import load
    from ..digits.training import inner_ascent, nominal, robust, train, unit_weight

    digits, method = load(seed, tuple(config["sizes"])), config["method"]
    steps = config["epochs"] * (len(digits.train) // config["batch"])

    def row(k: int | None, weight: float) -> tuple[Row, Any]:
        began = time.process_time()
        policy = train(config, seed, digits.train, method if k else "none", weight, every=k or 1)
        seconds = (time.process_time() - began) / steps
        attacked = robust(config, policy, digits.test, seed)
        losses = {"nominal": nominal(policy, digits.test)["cross_entropy"], "robust": attacked["robust_loss"]}
        return {
            "every": k,
            **losses,
            "robust_accuracy": attacked["robust_accuracy"],
            "seconds_per_step": seconds,
        }, policy

    train(config | {"epochs": 1}, seed, digits.train, method)  # imports and allocations of a first step
    without, policy = row(None, 0.0)
    weight = config["weight"] * unit_weight(config, seed, method, policy, digits.train, inner_ascent)
    return [without, *(row(k, weight)[0] for k in every)]


def _language(config: dict[str, Any], every: list[int], seed: int) -> list[Row]:
    from ..language_model import models, text
    from ..language_model.evaluation import evaluate_losses
    from ..language_model.training import batches_of, penalty_at_start, pretrain, tune

    plays, start = text.plays(), models.small(config, seed)
    pretrain(config, start, plays.train, seed)
    state = copy.deepcopy(start.state_dict())
    probe = batches_of(config, plays.train, config["probe"], 500 + seed)
    weight = config["weight"] / penalty_at_start(config, start, probe, seed, "aajr")[0]
    batches = batches_of(config, plays.train, config["steps"], seed)
    rows: list[Row] = []
    for k in (None, *every):
        model = models.small(config, seed)
        model.load_state_dict(state)
        began = time.process_time()
        tune(
            config, model, batches, seed, "aajr" if k else "adversarial", mix=0.0, weight=weight, every=k or 1
        )
        seconds = (time.process_time() - began) / len(batches)
        losses = evaluate_losses(config, model, plays.test, seed)
        rows.append({"every": k, **losses, "seconds_per_step": seconds})
    return rows


EXPERIMENT = Experiment("lazy", configured(__file__), by_part("digits", "language"), work, report)
