"""Quantities of the tested runs and their paired differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import summaries
from ..store import Row
from ..summaries import bootstrap_interval, interval_text

__all__ = [
    "AFTERWARDS",
    "NAMES",
    "PAIRS",
    "PRIMARY",
    "Value",
    "chosen",
    "compare",
    "perplexity",
    "quantities",
    "verdict",
]

NAMES = {
    "untouched": "not trained",
    "plain": "none (clean training)",
    "adversarial": "adversarial, w = 1",
    "weighted": "adversarial, w matched",
    "random": "random direction",
    "frobenius": "global Frobenius",
    "spectral": "global spectral",
    "aajr": "AAJR",
}
PAIRS = [("aajr", other) for other in ("weighted", "random", "frobenius", "spectral")]
#: looked at after the runs: does what is gained over clean training hold against tokens?
AFTERWARDS = [(ours, "plain") for ours in ("adversarial", "weighted", "aajr")]
PRIMARY = ("embedding", "substitution")

Value = Callable[[Row], float | None]


def quantities(config: dict[str, Any]) -> dict[str, tuple[str, int, Value]]:
    """Quantity -> (heading, digits, its value for a tested row) of a part; losses in nats per scored token."""
    evaluation = config["evaluation"]
    budget, radii = evaluation["substitution"]["budget"], evaluation["radii"]
    found: dict[str, tuple[str, int, Value]] = {
        "clean": ("clean loss", 3, _test("clean")),
        "embedding": (
            f"loss, embeddings within {config['radius']:g}",
            3,
            _at("embedding", radii.index(1.0)),
        ),
        "substitution": (f"loss, {budget} tokens replaced", 3, _at("substitution", budget)),
    }
    for place, factor in enumerate(radii):
        if factor != 1:
            heading = f"loss, embeddings within {factor * config['radius']:g}"
            found[f"embedding at {factor:g}"] = (heading, 3, _at("embedding", place))
    return found | {
        "rise in embeddings": ("rise by embeddings", 3, _rise("embedding", radii.index(1.0))),
        "rise": (f"rise by {budget} tokens", 3, _rise("substitution", budget)),
        "kappa": ("κ", 3, _test("kappa")),
        "falls": ("non-monotone, %", 2, lambda row: 100 * float(row["test"]["falls"])),
    }


def _test(name: str) -> Value:
    return lambda row: float(row["test"][name])


def _at(name: str, place: int) -> Value:
    return lambda row: float(row["test"][name][place])


def _rise(name: str, place: int) -> Value:
    return lambda row: float(row["test"][name][place] - row["test"]["start"])


def chosen(rows: list[Row], part: str) -> dict[str, dict[int, Row]]:
    """method -> seed -> the row of a part that was tested."""
    return summaries.chosen([row for row in rows if row["part"] == part])


def compare(rows: list[Row], ours: str, other: str, value: Value) -> tuple[float, float, float]:
    """Mean over seeds of ours − other in the part from scratch, and its 95 % bootstrap interval; paired by seed."""
    tested = chosen(rows, "scratch")
    differences = []
    for seed in sorted(set(tested[ours]) & set(tested[other])):
        a, b = value(tested[ours][seed]), value(tested[other][seed])
        if a is not None and b is not None:
            differences.append(a - b)
    return bootstrap_interval(differences)


def cell(rows: list[Row], ours: str, other: str, digits: int, value: Value) -> str:
    """The paired difference as text."""
    return interval_text(compare(rows, ours, other, value), digits)


def verdict(config: dict[str, Any], rows: list[Row], ours: str, other: str) -> str:
    """One sentence on the primary quantities and on how well the two are matched."""
    known, parts = quantities(config), []
    for name, words in zip(PRIMARY, ("embedding attack", "substitution attack")):
        mean, low, high = compare(rows, ours, other, known[name][2])
        if low > 0 or high < 0:
            parts.append(f"loss under the {words} **{'lower' if mean < 0 else 'higher'}** by {abs(mean):.3f}")
        else:
            parts.append(f"loss under the {words} cannot be told from the other's")
    _, low, high = compare(rows, ours, other, known["clean"][2])
    match = "does not differ" if low <= 0 <= high else f"is {'higher' if low > 0 else 'lower'}"
    return f"- {NAMES[ours]} against {NAMES[other]}: {parts[0]}; {parts[1]}; the clean loss on the test part {match}."


def perplexity(found: list[float]) -> str:
    """Exponential of the mean of losses (a geometric mean over seeds)."""
    return f"{math.exp(float(np.mean(found))):.2f}"
