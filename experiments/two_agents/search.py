"""One seed of one method: the same number of weights for every method, chosen on validation games."""

from __future__ import annotations

from typing import Any

import torch

from ..store import Row
from .evaluate import clean, evaluate, play, robust, stability
from .game import deal
from .policies import Pair, adapted, from_scratch
from .training import METHODS, inner, penalty, train

__all__ = ["best", "unit_penalties", "work"]


def work(config: dict[str, Any], seed: int, method: str, model: str) -> list[Row]:
    """Rows of all weights of a method, the chosen one with what the test games say; or of the pretrained model."""
    return scratch(config, seed, method) if model == "scratch" else pretrained(config, seed, method)


def scratch(config: dict[str, Any], seed: int, method: str) -> list[Row]:
    """As many runs for every method: of w without a penalty, of λ at w = 1 with one."""
    validation, test = (
        deal(config["game"], config["games"], torch.Generator().manual_seed(1000 * i + seed)) for i in (7, 8)
    )
    quick = config | {"attack": config["validation_attack"]}
    found: list[tuple[Row, Pair]] = []
    for knob in config["mixes" if method == "none" else "weights"]:
        pair = from_scratch(config["game"], config["model"], seed)
        history = train(config, pair, seed, method, **_given(config, method, knob))
        row: Row = {"model": "scratch", "seed": seed, "method": method, "knob": knob, "chosen": False}
        seen = clean(pair, validation) | robust(quick, pair, validation, seed)
        found.append((row | history | {"validation": seen}, pair))
    chosen, pair = found[best([row for row, _ in found])]
    chosen |= {"chosen": True, "test": evaluate(config, pair, test, seed)}
    return [row for row, _ in found]


def best(rows: list[Row]) -> int:
    """Index of the run to be tested: of the finished ones, the largest clean plus robust joint validation payoff."""

    def rank(index: int) -> tuple[bool, float]:
        seen = rows[index]["validation"]
        return rows[index]["finite"], seen["joint"] + seen["robust_joint"]

    return max(range(len(rows)), key=rank)


def pretrained(config: dict[str, Any], seed: int, method: str) -> list[Row]:
    """One run of the pretrained model with adapters; its configuration lies under ``language_model``."""
    config = config["language_model"]
    pair = adapted(config, config["game"], seed)
    # the radius is in units of the length of an observed token's embedding
    games = deal(config["game"], config["games"], torch.Generator().manual_seed(8000 + seed))
    x = pair.embed(games)
    config = config | {"radius": config["radius"] * x.norm(dim=-1).mean().item()}
    row: Row = {"model": "language", "seed": seed, "method": method, "radius": config["radius"]}
    before = clean(pair, games)
    weight = 0.0
    if method != "none":
        with torch.no_grad():
            honest = pair.heads(x)
        weight = config["weight"] / _size(config, pair, method, games, x, honest, seed)
    history = train(config, pair, seed, method, mix=1.0, weight=weight)
    some = games[: config["stability_games"]]
    after: Row = clean(pair, games) | robust(config, pair, games, seed) | stability(config, pair, some)
    after |= {"play": play(pair, games, config["play_rounds"], seed)}
    return [row | {"weight": weight, "chosen": True, "before": before, "test": after} | history]


def unit_penalties(config: dict[str, Any], seeds: list[int]) -> dict[str, float]:
    """Penalties of policies trained without one, geometric means over seeds: λ is counted in units of 1 over them."""
    found: dict[str, float] = dict.fromkeys(METHODS[1:], 1.0)
    for seed in seeds:
        pair = from_scratch(config["game"], config["model"], seed)
        train(config, pair, seed, "none", mix=1.0, weight=0.0)
        games = deal(config["game"], config["games"], torch.Generator().manual_seed(7000 + seed))
        x = pair.embed(games)
        with torch.no_grad():
            honest = pair.heads(x)
        for method in found:
            found[method] *= _size(config, pair, method, games, x, honest, seed) ** (1 / len(seeds))
    return found


def _size(
    config: dict[str, Any], pair: Pair, method: str, games: Any, x: Any, honest: Any, seed: int
) -> float:
    traj = inner(config, pair, games, x, honest)
    generator = torch.Generator().manual_seed(5000 + seed)
    with torch.no_grad():
        return penalty(method, pair, traj, 5 * config["power_iterations"], generator).item()


def _given(config: dict[str, Any], method: str, knob: float) -> dict[str, float]:
    if method == "none":
        return {"mix": knob, "weight": 0.0}
    return {"mix": 1.0, "weight": knob / config["unit_penalties"][method]}
