"""Runs of a method at a seed: w and λ together, one of which is tested."""

from __future__ import annotations

import copy
import functools
import json
import math
from typing import Any

from torch import Tensor, nn

from ..language_model.evaluation import evaluate, evaluate_losses
from ..language_model.models import small
from ..language_model.text import Text, plays
from ..language_model.training import batches_of, pretrain
from ..search import best, interpolated
from ..store import Row
from .training import penalty_at_start, tune

#: method -> where its penalty is measured; the first two have none, and "longer" more steps of ascent
METHODS = {"none": None, "longer": None, "end": "end", "start": "start", "rows": "rows"}

State = dict[str, Tensor]


def work(config: dict[str, Any], seed: int, method: str) -> list[Row]:
    """Rows of all runs of one method at one seed.

    With a penalty λ is searched at every w of ``mixes``, without one w: always for the target. Of the runs that are
    nearest to it, one for every w, that of the smallest robust validation loss is tested.
    """
    key = json.dumps(config, sort_keys=True)
    text, state, target = _start(key, seed)
    place = METHODS[method]
    unit = 1.0
    if place is not None:
        probe = batches_of(config, text.train, config["probe"], 500 + seed)
        unit = 1 / penalty_at_start(config, _copy(config, state), probe, place)
    rows: list[Row] = []
    models = []
    for mix in config["mixes"] if place else (None,):
        first, stride = config["search"][method if mix is None else f"{method}/{mix:g}"]
        own: list[Row] = []
        for _ in range(config["budget"][method]):
            tried = [(math.log10(row["knob"]), row["validation"]["nominal"]) for row in own]
            knob = 10 ** interpolated(tried, target, first, stride)
            w, weight = (knob, 0.0) if mix is None else (mix, unit * knob)
            model, row = _run(key, seed, method, w, weight)
            own.append(
                {"seed": seed, "method": method, "knob": knob, "target": target, "chosen": False, **row}
            )
            models.append(model)
        rows += own
    tested = chosen(rows, target, config["tolerance"])
    rows[tested] |= {"chosen": True, "test": evaluate(config, models[tested], text, seed)}
    return rows


def chosen(rows: list[Row], target: float, tolerance: float) -> int:
    """Of the runs nearest to the target, one for every w that has any within the tolerance, the most robust one.

    If there is none within it, the nearest run of all.

    Args:
        rows: of one method and seed; where λ is searched, of several w.
        target: clean loss.
        tolerance: on the difference of losses, that is on the logarithm of the perplexity.
    """

    def away(row: Row) -> float:
        return abs(row["validation"]["nominal"] - target)

    groups: dict[float | None, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row["w"] if row["weight"] else None, []).append(index)
    nearest = [min(group, key=lambda index: away(rows[index])) for group in groups.values()]
    within = [index for index in nearest if away(rows[index]) <= tolerance]
    if not within:
        return min(nearest, key=lambda index: away(rows[index]))
    return within[best([rows[index] for index in within], lambda row: -row["validation"]["robust"])]


@functools.lru_cache(maxsize=1)
def _start(key: str, seed: int) -> tuple[Text, State, float]:
    """Text, the model that all methods start from, and the target; kept for the tasks of the same seed."""
    config, text = json.loads(key), plays()
    model = small(config, seed)
    pretrain(config, model, text.train, seed)
    state = copy.deepcopy(model.state_dict())
    mix = max(config["mixes"])
    _, row = _train(config, seed, text, state, "none", mix, 0.0)
    return text, state, math.log(config["price"]) + row["validation"]["nominal"]


def _run(key: str, seed: int, method: str, mix: float, weight: float) -> tuple[nn.Module, Row]:
    text, state, _ = _start(key, seed)
    return _train(json.loads(key), seed, text, state, method, mix, weight)


def _train(
    config: dict[str, Any], seed: int, text: Text, state: State, method: str, mix: float, weight: float
) -> tuple[nn.Module, Row]:
    model = _copy(config, state)
    steps = config["longer"] if method == "longer" else config["inner"]["steps"]
    batches = batches_of(config, text.train, config["steps"], seed)
    history = tune(config, model, batches, METHODS[method], steps=steps, mix=mix, weight=weight)
    held_out = config | {"evaluation": config["validation"]}
    losses = evaluate_losses(held_out, model, text.validation, seed)
    return model, {"w": mix, "weight": weight, "validation": losses, **history}


def _copy(config: dict[str, Any], state: State) -> nn.Module:
    model = small(config, 0)
    model.load_state_dict(state)
    return model
