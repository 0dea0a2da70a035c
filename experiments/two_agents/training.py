"""The adversary, the bounds and the simultaneous training of both policies."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import aajr_kernels as aajr
from aajr_kernels.method import baseline_penalty
from aajr_kernels.training import Constraint, Multiplier

from ..ascents import recorded
from ..decoupling.training import residuals
from .game import Games, Heads, deal, entropy, expected
from .policies import Pair

#: none bounds nothing; the others measure the composite policy in the Fisher metric and differ only in direction
METHODS = ("none", "spectral", "aligned")
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


def measure(
    method: str, pair: Pair, traj: aajr.Trajectory, iterations: int, gamma: float = 0.0
) -> tuple[Tensor, Tensor]:
    """mean relu(√q − γ) over games and steps at the start of every step, and √q ``[T · n]``, detached.

    q is of the composite policy, both agents' gifts summed: ``"aligned"``: ‖J u‖² along the joint direction of both
    adversaries, norm 1 per agent; ``"spectral"``: ‖J‖₂² over both observations, from below by power iteration that
    starts at the joint direction.
    """
    assert traj.agents is not None
    points, directions = traj.points[:-1].flatten(0, 1), traj.directions.flatten(0, 1)
    hinge, units = baseline_penalty(
        *(method, pair.composite, points, directions),
        start=directions if method == "spectral" else None,
        iterations=iterations,
        metric="fisher",
        scope="agent",
        agents=traj.agents.repeat(len(traj.directions), 1),
        unit="sequence",
        gamma=gamma,
        form="hinge",
        module=pair.policies,
        return_units=True,
    )
    return hinge, units.flatten().sqrt()


def train(
    config: dict[str, Any], pair: Pair, seed: int, method: str, mix: float, gamma: float | None
) -> dict[str, Any]:
    """Simultaneous gradient ascent of both policies, in place, each on its own payoff; games depend only on the seed.

    A ascends (payoff_A(o_A, o_B) + w payoff_A(o_A + δ_A, o_B)) / (1 + w), with B's policy held fixed, B likewise; both
    keep √q ≤ γ for the share ``quantile`` of the units, with λ times the mean hinge of the composite policy.

    Args:
        config: of the experiment.
        pair: the policies; changed.
        seed: of the games.
        method: one of :data:`METHODS`.
        mix: w, the weight of the payoff under attack.
        gamma: γ; not used by ``"none"``.

    Returns:
        See :func:`history`; ``multiplier``: λ at the end, ``within``: share of the units within γ over the last
        quarter of the updates, None without a bound.
    """
    cards = torch.Generator().manual_seed(1000 + seed)
    trainable = pair.trainable()
    rate = config["learning_rate"]
    optimizer = torch.optim.Adam(trainable, rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=config["updates"])
    multiplier = None
    if method != "none":
        multiplier = Multiplier(
            Constraint(gamma=gamma, quantile=config["quantile"], unit="sequence", **config["controller"])
        )
    columns: dict[str, list[float]] = {"clean": [], "attacked": [], "falls": [], "gradient": []}
    within: list[float] = []
    finite = True
    for step in range(config["updates"]):
        games = deal(config["game"], config["batch"], cards)
        x, tables, best = pair.embed(games), games.payoffs().unbind(1), games.optimum().sum()
        a, b = pair.heads(x)
        still_a, still_b = a.detach(), b.detach()
        traj = inner(config, pair, games, x, (still_a, still_b))
        misled_a, misled_b = pair.heads(traj.worst)
        clean = expected(a, still_b, tables[0]) + expected(still_a, b, tables[1])
        attacked = expected(misled_a, still_b, tables[0]) + expected(still_a, misled_b, tables[1])
        spread = entropy(a, still_b) + entropy(b, still_a)
        loss = task = -((clean + mix * attacked) / (1 + mix) + config["temperature"] * spread).mean()
        if multiplier is not None:
            weight, bound = multiplier.at(step)
            assert weight is not None and bound is not None
            hinge, roots = measure(method, pair, traj, config["power_iterations"], bound)
            loss = task + weight * hinge
            multiplier.add(step, task, hinge, roots.square(), bound)
            within.append((roots <= bound).double().mean().item())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable, config["clip"]).item()
        finite = math.isfinite(loss.item()) and math.isfinite(norm)
        if not finite:
            break
        optimizer.step()
        schedule.step()
        if multiplier is not None:
            multiplier.settle()
        columns["clean"].append((clean.detach().sum() / best).item())
        columns["attacked"].append((attacked.detach().sum() / best).item())
        columns["falls"].append(recorded(traj).non_monotone.float().mean().item())
        columns["gradient"].append(norm)
    last = within[-max(config["updates"] // 4, 1) :]
    held: dict[str, Any] = {"multiplier": None, "within": None}
    if multiplier is not None and last:
        held = {"multiplier": multiplier.facts["multiplier"], "within": sum(last) / len(last)}
    return history(columns, finite, _floor(config)) | held


def history(columns: dict[str, list[float]], finite: bool, floor: float) -> dict[str, Any]:
    """Summary of a run.

    Args:
        columns: by update: ``clean`` and ``attacked``, sum of payoffs as a share of the batch's optimum; ``falls``,
            fraction of inner steps that lowered the loss they climb; ``gradient``, its norm before clipping.
        finite: no loss or gradient was NaN or infinite.
        floor: share of the optimum below which a run counts as collapsed.

    Returns:
        ``clean``, ``attacked``: means over blocks of 10 updates; over the second half of the updates ``falls``, the
        mean, ``variance`` of ``attacked`` about its own straight line, and ``tail``: 99 % quantile of the gradient norm
        over its median; ``collapsed``: not finite, or the clean share there is below the floor. None where the run
        broke off.
    """
    summary: dict[str, Any] = {name: _blocks(columns[name]) for name in ("clean", "attacked")}
    summary["finite"] = finite
    if not finite:
        return summary | dict.fromkeys(("falls", "variance", "tail")) | {"collapsed": True}
    second = {
        name: torch.tensor(values[len(values) // 2 :], dtype=torch.float64)
        for name, values in columns.items()
    }
    return summary | {
        "falls": second["falls"].mean().item(),
        "variance": residuals(second["attacked"]).square().mean().item(),
        "tail": (second["gradient"].quantile(0.99) / second["gradient"].median()).item(),
        "collapsed": second["clean"].mean().item() < floor,
    }


def _floor(config: dict[str, Any]) -> float:
    """Half the share of the optimum that agents get without listening, over 2,000 games."""
    games = deal(config["game"], 2000, torch.Generator().manual_seed(0))
    return 0.5 * (games.unheard().mean() / games.optimum().mean()).item()


def _blocks(values: list[float]) -> list[float]:
    parts = [values[i : i + SMOOTHED] for i in range(0, len(values), SMOOTHED)]
    return [round(sum(part) / len(part), 6) for part in parts]
