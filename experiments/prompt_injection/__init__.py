"""SmolLM2-135M-Instruct against prompt injections: plain LoRA, adversarial training and AAJR at matched clean loss.

An assistant has to do what its system prompt asks, whatever the retrieved text says; an attacker moves that text.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from ..base import Experiment, Task, configured
from ..search import best
from ..store import Row
from .report import METHODS, rank, report


def tasks(config: dict[str, Any]) -> list[Task]:
    """All runs of a method at a seed, and the test of one; the longest first, so that processes end together."""
    return [
        Task(f"{seed}/{method}", {"config": config, "seed": seed, "method": method})
        for seed in range(config["seeds"])
        for method in reversed(METHODS)
    ]


def work(config: dict[str, Any], seed: int, method: str) -> list[Row]:
    """A row for every run; the one that is chosen on validation dialogues has been tested.

    Raises:
        MissingPackage: bastioncorpus, transformers, peft or what the weights come from is not installed.
    """
    from .dialogues import batch_of
    from .evaluation import clean_loss, losses_under_attack, short_attack
    from .training import put, state_of, tune

    model, encode, data, start, reference = _start(json.dumps(config, sort_keys=True), seed)
    validation = batch_of(encode, data.validation)
    attacked = batch_of(encode, data.validation[: config["selection"]["rows"]])
    rows: list[Row] = []
    states = []
    for knobs in config["runs"][method]:
        put(model, start)
        history = tune(config, model, encode, data.train, seed, **knobs)
        losses = {
            "clean": clean_loss(model, validation),
            "robust": short_attack(config, model, attacked, seed),
        }
        row = {"seed": seed, "method": method, **knobs, "reference": reference, "validation": losses}
        rows.append(row | history | {"chosen": False})
        states.append(state_of(model))
    chosen = best(rows, functools.partial(rank, config))
    put(model, states[chosen])
    rows[chosen] |= {"chosen": True, "test": losses_under_attack(config, model, encode, data, seed)}
    return rows


@functools.lru_cache(maxsize=1)
def _start(key: str, seed: int) -> tuple[Any, Any, Any, Any, float]:
    """Model, its tokens, the dialogues, the adapters that all runs start from, and their clean validation loss.

    They are learnt on the replies, without an adversary; kept for the tasks of the seed.
    """
    from .dialogues import batch_of, data_of
    from .evaluation import clean_loss
    from .training import model_of, state_of, tune

    config = json.loads(key)
    data = data_of(config, seed)
    model, encode = model_of(config, seed)
    tune(config | config["start"], model, encode, data.start, seed, mix=0.0)
    reference = clean_loss(model, batch_of(encode, data.validation))
    return model, encode, data, state_of(model), reference


EXPERIMENT = Experiment("prompt-injection", configured(__file__), tasks, work, report)
