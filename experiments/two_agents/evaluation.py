"""Evaluation on games not trained on: payoffs, clean and under strong attacks, curvature, sampled play."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

import aajr_kernels as aajr

from .game import Games, Heads, deal, expected
from .policies import Pair
from .training import attack, inner, sabotage


@torch.no_grad()
def clean(pair: Pair, games: Games) -> dict[str, float]:
    """Exact expected payoffs at the true observations, their sum, and that sum as a share of the optimum."""
    a, b = pair.heads(pair.embed(games))
    payoffs = [expected(a, b, table).mean().item() for table in games.payoffs().unbind(1)]
    joint = sum(payoffs)
    return {
        "payoff_a": payoffs[0],
        "payoff_b": payoffs[1],
        "joint": joint,
        "share": joint / games.optimum().mean().item(),
    }


def robust(
    config: dict[str, Any], pair: Pair, games: Games, strong: dict[str, Any], seed: int
) -> dict[str, float]:
    """Mean payoff of each agent at its worst over all points of all attacks on it, the other being undisturbed.

    The attacks start from uniform draws; their objective is separable, so that one ascent attacks both agents apart.
    """
    x = pair.embed(games)
    generator = torch.Generator().manual_seed(4000 + seed)
    with torch.no_grad():
        honest = pair.heads(x)
        worst = torch.stack(_victims(pair, games, x, honest))
    for share, _ in itertools.product(strong["step"], range(strong["restarts"])):
        traj = attack(
            *(pair, games, x, honest),
            radius=config["radius"],
            steps=strong["steps"],
            step_size=share * config["radius"],
            init="uniform",
            generator=generator,
        )
        for point in traj.points:
            with torch.no_grad():
                worst = torch.minimum(worst, torch.stack(_victims(pair, games, point, honest)))
    a, b = worst.mean(1).tolist()
    return {"robust_a": a, "robust_b": b, "robust_joint": a + b}


def _victims(pair: Pair, games: Games, x: Tensor, honest: tuple[Heads, Heads]) -> list[Tensor]:
    """Payoffs of A and of B, with only its own observation attacked."""
    misled_a, misled_b = pair.heads(x)
    table_a, table_b = games.payoffs().unbind(1)
    return [expected(misled_a, honest[1], table_a), expected(honest[0], misled_b, table_b)]


def stability(config: dict[str, Any], pair: Pair, games: Games) -> dict[str, float]:
    """The ascent of training on these games: steps that fall, and the negative curvature that they meet."""
    x = pair.embed(games)
    with torch.no_grad():
        honest = pair.heads(x)
    traj = inner(config, pair, games, x, honest)
    report = aajr.stability_report(sabotage(pair, games, honest), x, traj, samples=3, module=pair.policies)
    assert report.kappa is not None and report.violated is not None
    return {
        "falls": report.non_monotone.float().mean().item(),
        "violated": report.violated.float().mean().item(),
        "kappa": report.kappa.amax(0).mean().item(),
    }


@torch.no_grad()
def play(pair: Pair, games: Games, rounds: int, seed: int) -> dict[str, float]:
    """Sampled play in the environment: the sum of payoffs, what it should be, and its standard error."""
    from .environment import Barter

    a, b = pair.heads(pair.embed(games))
    exact = sum(expected(a, b, table) for table in games.payoffs().unbind(1))
    requests = {name: h.requests.double().softmax(-1).numpy() for name, h in (("A", a), ("B", b))}
    gifts = {name: h.gifts.double().softmax(-1).numpy() for name, h in (("A", a), ("B", b))}
    environment, random = Barter(games), np.random.default_rng(6000 + seed)
    away = []
    for number in range(len(games)):
        for _ in range(rounds):
            environment.reset(options={"game": number})
            draw = lambda chances: int(random.choice(len(chances), p=chances))
            seen, *_ = environment.step({name: draw(requests[name][number]) for name in requests})
            heard = {name: int(seen[name][-1]) - 1 for name in gifts}
            gift = {name: draw(gifts[name][number, heard[name]]) for name in gifts}
            _, rewards, *_ = environment.step(gift)
            away.append(sum(rewards.values()) - float(exact[number]))
    error = float(np.std(away, ddof=1) / len(away) ** 0.5)
    mean = exact.mean().item()
    return {"played": mean + float(np.mean(away)), "expected": mean, "error": error}


def evaluate(config: dict[str, Any], pair: Pair, seed: int) -> dict[str, dict[str, Any]]:
    """Payoffs on the games that the setting is chosen by, and everything on the test games."""
    row: dict[str, dict[str, Any]] = {}
    for part, name in ((7, "validation"), (8, "test")):
        games = deal(config["game"], config[name]["games"], torch.Generator().manual_seed(1000 * part + seed))
        row[name] = clean(pair, games) | robust(config, pair, games, config[name]["attack"], seed)
    some = games[: config["stability_games"]]
    row["test"] |= stability(config, pair, some) | {"play": play(pair, some, config["play_rounds"], seed)}
    return row
