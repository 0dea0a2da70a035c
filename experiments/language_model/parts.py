"""The two parts: a small transformer at matched clean perplexity, and a pretrained one with adapters."""

from __future__ import annotations

import copy
import functools
import json
import math
from typing import Any

from torch import Tensor, nn

from aajr_kernels.training import policy_of

from ..search import interpolated, search
from ..store import Row
from .evaluation import clean_loss, evaluate
from .models import adapted, small
from .text import Text, plays
from .training import batches_of, penalty_at_start, pretrain, tune

#: of either part, in order; "weighted" is adversarial training whose weight is matched as the λ of the others are
SCRATCH = ("reference", "weighted", "random", "frobenius", "spectral", "aajr")
ADAPTED = ("untouched", "adversarial", "random", "aajr")

State = dict[str, Tensor]


def work(config: dict[str, Any], part: str, seed: int, method: str, stage: str = "") -> list[Row]:
    """Rows of one method at one seed of one part; of the adapted part, of its training or its evaluation."""
    key = json.dumps(config[part], sort_keys=True)
    rows = _scratch(key, seed, method) if part == "scratch" else _adapted(key, seed, method, stage)
    return [{"part": part, "seed": seed, **row} for row in rows]


def rank(row: Row, target: float) -> float:
    """The run whose clean validation perplexity is nearest to the target, by ratio."""
    return -abs(row["validation"] - math.log(target))


# -- from scratch -----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _start(key: str, seed: int) -> tuple[Text, State, float]:
    """Text, the model that all methods start from, and the target; kept for the tasks of the same seed."""
    config, text = json.loads(key), plays()
    model = small(config, seed)
    pretrain(config, model, text.train, seed)
    state = copy.deepcopy(model.state_dict())
    _, row = _run(key, seed, (text, state), "adversarial", 1.0, 0.0)
    return text, state, config["price"] * math.exp(row["validation"])


def _scratch(key: str, seed: int, method: str) -> list[Row]:
    config = json.loads(key)
    text, state, target = _start(key, seed)

    def test(model: nn.Module) -> dict[str, Any]:
        return evaluate(config, model, text, seed)

    if method == "reference":
        rows = []
        for name, mix in (("plain", 0.0), ("adversarial", 1.0)):
            model, row = _run(key, seed, (text, state), "adversarial", mix, 0.0)
            rows.append(row | {"method": name, "knob": mix, "chosen": True, "test": test(model)})
        return [row | {"target": target} for row in rows]
    unit = 1.0
    if method != "weighted":
        probe = batches_of(config, text.train, config["probe"], 500 + seed)
        unit = 1 / penalty_at_start(config, _copy(config, state), probe, seed, method)[0]

    def propose(rows: list[Row]) -> float:
        tried = [(math.log10(row["knob"]), row["validation"]) for row in rows]
        return interpolated(tried, math.log(target), *config["search"][method])

    def run(exponent: float) -> tuple[Row, nn.Module]:
        knob = 10**exponent
        options = ("adversarial", knob, 0.0) if method == "weighted" else (method, 1.0, unit * knob)
        model, row = _run(key, seed, (text, state), *options)
        return row | {"method": method, "knob": knob, "target": target}, model

    return search(config["budget"], propose, run, lambda row: rank(row, target), test)


def _copy(config: dict[str, Any], state: State) -> nn.Module:
    model = small(config, 0)
    model.load_state_dict(state)
    return model


def _run(
    key: str, seed: int, start: tuple[Text, State], method: str, mix: float, weight: float
) -> tuple[nn.Module, Row]:
    config, (text, state) = json.loads(key), start
    model = _copy(config, state)
    batches = batches_of(config, text.train, config["steps"], seed)
    history = tune(config, model, batches, seed, method, mix=mix, weight=weight)
    rows = config["evaluation"]["clean_rows"]
    loss = clean_loss(config, model, policy_of(model), text.validation, seed, rows)
    return model, {"weight": weight, "validation": loss, **history}


# -- adapters ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _tuned(key: str, seed: int, method: str) -> tuple[nn.Module, Text, Row]:
    """Kept for the task that evaluates what another one has trained."""
    config = json.loads(key)
    model, text = adapted(config, seed)
    if method == "untouched":
        return model, text, {}
    weight, unit = 0.0, None
    if method != "adversarial":
        probe = batches_of(config, text.train, config["probe"], 500 + seed)
        penalty, loss = penalty_at_start(config, model, probe, seed, method)
        weight, unit = config["share"] * loss / penalty, 1 / penalty
    batches = batches_of(config, text.train, config["steps"], seed)
    history = tune(config, model, batches, seed, method, mix=1.0, weight=weight)
    return model, text, {"weight": weight, "unit": unit, **history}


def _adapted(key: str, seed: int, method: str, stage: str) -> list[Row]:
    config = json.loads(key)
    model, text, history = _tuned(key, seed, method)
    if stage == "training":
        return [{"method": method, "stage": stage, **history}]
    return [{"method": method, "stage": stage, "chosen": True, "test": evaluate(config, model, text, seed)}]
