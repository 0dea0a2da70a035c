"""One seed of one method: the same number of weights λ for every method, chosen on the validation part."""

from __future__ import annotations

from typing import Any

import torch

from ..store import Row
from .data import Digits, load
from .training import METHODS, attack, evaluate, penalty, train

__all__ = ["work"]


def unit_weight(config: dict[str, Any], seed: int, digits: Digits, method: str) -> float:
    """1 over the penalty of the policy trained without one: λ is counted in these units, whatever the metric."""
    policy = train(config, seed, digits.train, None, 0.0)
    generator = torch.Generator().manual_seed(5000 + seed)
    inner = config["inner"]
    traj = attack(
        *(policy, digits.train, "cross-entropy", generator),
        radius=config["radius"],
        steps=inner["steps"],
        step_size=config["radius"] * inner["step"],
        init="uniform",
    )
    with torch.no_grad():
        size = penalty(method, policy, traj, 10 * config["power_iterations"], generator)
    return 1.0 / size.item()


def work(config: dict[str, Any], seed: int, method: str) -> list[Row]:
    """Rows of all weights that were tried; the chosen one also has what the test part says.

    The search starts at the middle of the range of λ, on a logarithmic scale, and moves up while the robust accuracy on
    the validation part is below the target, else down, by half the distance each time. Chosen is, of those that reach
    the target on the validation part, the one with the smallest nominal loss there; where none does, the most robust.
    """
    digits = load(seed, tuple(config["sizes"]))
    if method == "none":
        policy = train(config, seed, digits.train, None, 0.0)
        return [_row(config, seed, method, 0.0, policy, digits, test=True)]
    unit = unit_weight(config, seed, digits, method)
    exponent, stride = config["middle"], config["half_range"] / 2
    found: list[tuple[Row, torch.nn.Module]] = []
    for _ in range(config["budget"]):
        policy = train(config, seed, digits.train, method, unit * 10**exponent)
        row = _row(config, seed, method, 10**exponent, policy, digits)
        found.append((row, policy))
        reached = row["validation"]["robust_accuracy"] >= config["target"]
        exponent += -stride if reached else stride
        stride /= 2
    best = choose([row for row, _ in found], config["target"])
    row, policy = found[best]
    found[best] = (_row(config, seed, method, row["weight"], policy, digits, test=True), policy)
    for row, _ in found:
        row["unit"] = unit
    return [row for row, _ in found]


def choose(rows: list[Row], target: float) -> int:
    """Index of the row to be tested, from validation results alone."""

    def rank(index: int) -> tuple[bool, float]:
        seen = rows[index]["validation"]
        reached = seen["robust_accuracy"] >= target
        return reached, -seen["nominal"] if reached else seen["robust_accuracy"]

    return max(range(len(rows)), key=rank)


def _row(
    config: dict[str, Any],
    seed: int,
    method: str,
    weight: float,
    policy: torch.nn.Module,
    digits: Digits,
    test: bool = False,
) -> Row:
    seen = evaluate(config, policy, digits.validation, seed)
    row: Row = {"seed": seed, "method": method, "weight": weight, "chosen": test, "validation": seen}
    if test:
        row["test"] = evaluate(config, policy, digits.test, seed)
    return row


def methods() -> list[str]:
    """Every method, the unregularised one first."""
    return ["none", *METHODS]
