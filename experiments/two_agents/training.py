"""The adversary, the penalties and the simultaneous training of both policies."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import aajr_kernels as aajr
from aajr_kernels.method import baseline_penalty

from ..ascents import recorded
from .game import Games, Heads, deal, entropy, expected
from .policies import Pair

#: none has no penalty; the others measure the composite policy in the Fisher metric and differ only in direction
METHODS = ("none", "frobenius", "spectral", "aajr-joint", "aajr-agents")
SMOOTHED = 10


def sabotage(pair: Pair, games: Games, honest: tuple[Heads, Heads]) -> Any:
    """The adversaries' objective on ``[n, 2 * length, hidden]``: each agent wants the other to fare badly.

    −payoff_A(o_A + δ_A, o_B) − payoff_B(o_A, o_B + δ_B): only the victim is misled, its partner plays as it does at the
    true observation. So the gradient at o_A is that of A's payoff only and that at o_B that of B's, and yet it is the
    gradient of one function, for which rising and curvature have a meaning.
    """
    a, b = (heads.detach() for heads in honest)
    table_a, table_b = games.payoffs().unbind(1)

    def loss(x: Any) -> Any:
        misled_a, misled_b = pair.heads(x)
        return -expected(misled_a, b, table_a) - expected(a, misled_b, table_b)

    return loss


def attack(
    pair: Pair, games: Games, x: Tensor, honest: tuple[Heads, Heads], **options: Any
) -> aajr.Trajectory:
    """Ascent on :func:`sabotage` in a ball for each agent."""
    return aajr.ascend(
        *(sabotage(pair, games, honest), x),
        scope="agent",
        agents=pair.agents(len(x)),
        module=pair.policies,
        **options,
    )


def inner(config: dict[str, Any], pair: Pair, games: Games, x: Tensor, honest: tuple[Heads, Heads]) -> Any:
    """The ascent of training: from the true observations."""
    options = config["inner"]
    step = options["step"] * config["radius"]
    return attack(pair, games, x, honest, radius=config["radius"], steps=options["steps"], step_size=step)


def penalty(
    method: str, pair: Pair, traj: aajr.Trajectory, iterations: int, generator: torch.Generator
) -> Tensor:
    """Of the composite policy at all points of a trajectory, both agents' outputs summed."""
    steps = len(traj)
    common: dict[str, Any] = dict(metric="fisher", unit="sequence")
    if method in ("aajr-joint", "aajr-agents"):
        each = method == "aajr-agents"
        options = {"per_agent": each, "batch_steps": steps, **common}
        return aajr.trajectory_penalty(pair.composite, traj.x, traj, **options)[0]
    assert traj.agents is not None
    value: Tensor = baseline_penalty(
        *(method, pair.composite, traj.points[:-1].flatten(0, 1)),
        scope="agent",
        agents=traj.agents.repeat(steps, 1),
        iterations=iterations,
        generator=generator,
        module=pair.policies,
        **common,
    )
    return value


def train(
    config: dict[str, Any], pair: Pair, seed: int, method: str, *, mix: float, weight: float
) -> dict[str, Any]:
    """Simultaneous gradient ascent of both policies, in place, each on its own payoff; games depend only on the seed.

    A ascends (payoff_A(o_A, o_B) + w payoff_A(o_A + δ_A, o_B)) / (1 + w), with B's policy held fixed, B likewise; both
    descend λ times the penalty of the composite policy.

    Args:
        config: of the experiment.
        pair: the policies; changed.
        seed: of games and random directions.
        method: one of :data:`METHODS`.
        mix: w, the weight of the payoff under attack.
        weight: λ.

    Returns:
        See :func:`history`.
    """
    cards, directions = (torch.Generator().manual_seed(1000 * i + seed) for i in (1, 2))
    trainable = pair.trainable()
    optimizer = torch.optim.Adam(trainable, config["learning_rate"])
    columns: dict[str, list[float]] = {"clean": [], "attacked": [], "falls": [], "gradient": []}
    finite = True
    for _ in range(config["updates"]):
        games = deal(config["game"], config["batch"], cards)
        x, tables, best = pair.embed(games), games.payoffs().unbind(1), games.optimum().sum()
        a, b = pair.heads(x)
        traj = inner(config, pair, games, x, (a, b))
        misled_a, misled_b = pair.heads(traj.worst)
        still_a, still_b = a.detach(), b.detach()
        clean = expected(a, still_b, tables[0]) + expected(still_a, b, tables[1])
        attacked = expected(misled_a, still_b, tables[0]) + expected(still_a, misled_b, tables[1])
        spread = entropy(a, still_b) + entropy(b, still_a)
        loss = -((clean + mix * attacked) / (1 + mix) + config["temperature"] * spread).mean()
        if method != "none":
            loss = loss + weight * penalty(method, pair, traj, config["power_iterations"], directions)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable, config["clip"]).item()
        finite = math.isfinite(loss.item()) and math.isfinite(norm)
        if not finite:
            break
        optimizer.step()
        columns["clean"].append((clean.detach().sum() / best).item())
        columns["attacked"].append((attacked.detach().sum() / best).item())
        columns["falls"].append(recorded(traj).non_monotone.float().mean().item())
        columns["gradient"].append(norm)
    return history(columns, finite, _floor(config))


def history(columns: dict[str, list[float]], finite: bool, floor: float) -> dict[str, Any]:
    """Summary of a run.

    Args:
        columns: by update: ``clean`` and ``attacked``, sum of payoffs as a share of the batch's optimum; ``falls``,
            fraction of inner steps that lowered the loss they climb; ``gradient``, its norm before clipping.
        finite: no loss or gradient was NaN or infinite.
        floor: share of the optimum below which a run counts as collapsed.

    Returns:
        ``clean``, ``attacked``: means over blocks of 10 updates; ``falls``: mean; ``variance`` of ``attacked`` over the
        last third; ``jitter``: half its mean squared change there, in which trends hardly enter; ``drop``: how far the
        mean of 10 updates fell below an earlier one; ``tail``: 99 % quantile of the gradient norm over its median;
        ``collapsed``: not finite, or the clean share of the last third is below the floor. None where the run broke
        off.
    """
    series = torch.tensor(columns["attacked"], dtype=torch.float64)
    norms = torch.tensor(columns["gradient"], dtype=torch.float64)
    summary: dict[str, Any] = {name: _blocks(columns[name]) for name in ("clean", "attacked")}
    summary["finite"] = finite
    if not finite:
        broken = dict.fromkeys(("falls", "variance", "jitter", "drop", "tail"))
        return summary | broken | {"collapsed": True}
    last = series[-max(len(series) // 3, 2) :]
    smooth = series.unfold(0, min(SMOOTHED, len(series)), 1).mean(-1)
    clean = columns["clean"][-len(last) :]
    return summary | {
        "falls": sum(columns["falls"]) / len(series),
        "variance": last.var().item(),
        "jitter": 0.5 * last.diff().square().mean().item(),
        "drop": (smooth.cummax(0).values - smooth).amax().item(),
        "tail": (norms.quantile(0.99) / norms.median()).item(),
        "collapsed": sum(clean) / len(clean) < floor,
    }


def _floor(config: dict[str, Any]) -> float:
    """Half the share of the optimum that agents get without listening, over 2,000 games."""
    games = deal(config["game"], 2000, torch.Generator().manual_seed(0))
    return 0.5 * (games.unheard().mean() / games.optimum().mean()).item()


def _blocks(values: list[float]) -> list[float]:
    parts = [values[i : i + SMOOTHED] for i in range(0, len(values), SMOOTHED)]
    return [round(sum(part) / len(part), 6) for part in parts]
