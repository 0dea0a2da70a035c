"""Two language models barter while each perturbs what the other sees: does a penalty steady their training?

Small models from scratch, over seeds; and a single run of a pretrained model with an adapter for each agent.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from ..base import Experiment, Task, configured
from ..search import search
from ..store import Row
from .evaluation import clean, evaluate, robust
from .game import Games, deal
from .policies import Pair, adapted, from_scratch
from .report import report
from .training import METHODS, inner, penalty, train


def tasks(config: dict[str, Any]) -> list[Task]:
    """A task for every method and seed, then the pretrained model's."""
    scratch = [("scratch", *pair) for pair in itertools.product(range(config["seeds"]), METHODS)]
    language = [("language", 0, method) for method in config["language_model"]["methods"]]
    return [
        Task(
            f"{method}/{seed}" if model == "scratch" else f"language/{method}",
            {"config": config, "seed": seed, "method": method, "model": model},
        )
        for model, seed, method in scratch + language
    ]


def work(config: dict[str, Any], seed: int, method: str, model: str) -> list[Row]:
    """Rows of all weights of a method, the chosen one with what the test games say; or of the pretrained model."""
    return _scratch(config, seed, method) if model == "scratch" else _pretrained(config, seed, method)


def games_of(config: dict[str, Any], part: int, seed: int) -> Games:
    """Games that no policy is trained on: part 7 validates, part 8 tests."""
    return deal(config["game"], config["games"], torch.Generator().manual_seed(1000 * part + seed))


def _scratch(config: dict[str, Any], seed: int, method: str) -> list[Row]:
    """As many runs for every method: of w without a penalty, of λ at w = 1 with one."""
    validation, test = (games_of(config, part, seed) for part in (7, 8))
    knobs = config["mixes" if method == "none" else "weights"]

    def run(knob: float) -> tuple[Row, Pair]:
        pair = from_scratch(config["game"], config["model"], seed)
        mix, weight = (knob, 0.0) if method == "none" else (1.0, knob / config["unit_penalties"][method])
        history = train(config, pair, seed, method, mix=mix, weight=weight)
        short = config | {"attack": config["validation_attack"]}
        payoffs = clean(pair, validation) | robust(short, pair, validation, seed)
        row: Row = {"model": "scratch", "seed": seed, "method": method, "knob": knob}
        return row | history | {"validation": payoffs}, pair

    return search(
        len(knobs), lambda rows: knobs[len(rows)], run, rank, lambda pair: evaluate(config, pair, test, seed)
    )


def rank(row: Row) -> tuple[bool, float]:
    """The finished run with the largest clean plus robust joint validation payoff."""
    return row["finite"], row["validation"]["joint"] + row["validation"]["robust_joint"]


def _pretrained(config: dict[str, Any], seed: int, method: str) -> list[Row]:
    """One run of the pretrained model with adapters; its configuration lies under ``language_model``."""
    config = config["language_model"]
    pair = adapted(config, config["game"], seed)
    games = games_of(config, 8, seed)
    # the radius is in units of the length of an observed token's embedding
    config = config | {"radius": config["radius"] * pair.embed(games).norm(dim=-1).mean().item()}
    row: Row = {"model": "language", "seed": seed, "method": method, "radius": config["radius"]}
    before = clean(pair, games)
    weight = 0.0 if method == "none" else config["weight"] / _size(config, pair, method, games, seed)
    history = train(config, pair, seed, method, mix=1.0, weight=weight)
    test = evaluate(config, pair, games, seed)
    return [row | {"weight": weight, "chosen": True, "before": before, "test": test} | history]


def unit_penalties(config: dict[str, Any], seeds: list[int]) -> dict[str, float]:
    """Penalties of policies trained without one, geometric means over seeds: λ is counted in units of 1 over them."""
    means = dict.fromkeys(METHODS[1:], 1.0)
    for seed in seeds:
        pair = from_scratch(config["game"], config["model"], seed)
        train(config, pair, seed, "none", mix=1.0, weight=0.0)
        for method in means:
            means[method] *= _size(config, pair, method, games_of(config, 7, seed), seed) ** (1 / len(seeds))
    return means


def _size(config: dict[str, Any], pair: Pair, method: str, games: Games, seed: int) -> float:
    """The penalty of a method at the points of training's ascent."""
    x = pair.embed(games)
    with torch.no_grad():
        honest = pair.heads(x)
    traj = inner(config, pair, games, x, honest)
    generator = torch.Generator().manual_seed(5000 + seed)
    with torch.no_grad():
        return penalty(method, pair, traj, 5 * config["power_iterations"], generator).item()


EXPERIMENT = Experiment("two-agents", configured(__file__), tasks, work, report)
