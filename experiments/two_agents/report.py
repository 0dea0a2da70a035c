"""The page on two agents: written before the runs, and drawn from their rows only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from common.pages import table
from common.plots import figure, save

from ..store import Row
from ..summaries import (
    Comparison,
    Quantity,
    by_method,
    chosen_runs,
    entry,
    geometric_mean,
    interval_text,
    page,
    share_of,
)
from .training import SMOOTHED

COMPARISON = Comparison(
    names={
        "none": "none (w chosen)",
        "frobenius": "global Frobenius",
        "spectral": "global spectral",
        "aajr-joint": "AAJR, joint",
        "aajr-agents": "AAJR, per agent",
    },
    pairs=[
        *(
            (ours, base)
            for ours in ("aajr-joint", "aajr-agents")
            for base in ("none", "frobenius", "spectral")
        ),
        ("aajr-agents", "aajr-joint"),
    ],
    quantities={
        "variance": Quantity("variance × 100", entry("variance", factor=100), 2, True, 0.1),
        "falls": Quantity("non-monotone, %", entry("falls", factor=100), 2, True, 0.25),
        "robust": Quantity("robust joint payoff", entry("test", "robust_joint"), primary=True, margin=0.016),
        "joint": Quantity("clean joint payoff", entry("test", "joint")),
        "damage": Quantity(
            "lost to the attack", lambda row: row["test"]["joint"] - row["test"]["robust_joint"]
        ),
        "share": Quantity("share of the optimum", entry("test", "share")),
        "jitter": Quantity("jitter × 100", entry("jitter", factor=100), 2),
        "drop": Quantity("largest drop", entry("drop")),
        "tail": Quantity("gradient tail", entry("tail"), 1),
        "falls_after": Quantity("non-monotone after, %", entry("test", "falls", factor=100), 2),
        "kappa": Quantity("κ after", entry("test", "kappa")),
    },
)


def _language(rows: list[Row]) -> str:
    columns = {
        "share before": entry("before", "share"),
        "share after": entry("test", "share"),
        "clean joint payoff": entry("test", "joint"),
        "robust joint payoff": entry("test", "robust_joint"),
        "variance × 100": entry("variance", factor=100),
        "gradient tail": entry("tail"),
        "κ after": entry("test", "kappa"),
    }
    quantities = [Quantity(heading, value) for heading, value in columns.items()]
    quantities += [Quantity("non-monotone, %", entry("falls", factor=100), 1)]
    quantities += [Quantity("minutes", entry("seconds", factor=1 / 60), 1)]
    lines = [
        [COMPARISON.names[row["method"]].split(" (")[0], *(quantity.mean([row]) for quantity in quantities)]
        for row in rows
    ]
    return table(["method", *(quantity.heading for quantity in quantities)], lines)


def _play(rows: list[Row]) -> str:
    """How far sampled play was from the exact expectation, in standard errors."""
    plays = [row["test"]["play"] for row in rows if row["chosen"]]
    away = [abs(p["played"] - p["expected"]) / p["error"] for p in plays if p["error"] > 0]
    return (
        f"In the environment the mean sum of payoffs of the {len(away)} tested pairs was "
        f"{np.mean(away):.2f} standard errors from the exact expectation on average ({np.sqrt(2 / np.pi):.2f} is the "
        f"mean of a normal variable's size), at most {max(away):.2f}."
    )


def _parts(rows: list[Row]) -> str:
    """The differences of the robust payoff from no penalty, split into clean payoff and damage."""
    sentences = []
    for ours in ("aajr-joint", "aajr-agents"):
        robust, clean, damage = (
            interval_text(COMPARISON.difference(rows, ours, "none", name))
            for name in ("robust", "joint", "damage")
        )
        sentences.append(
            f"{COMPARISON.names[ours]}: {robust} in robust payoff, {clean} in clean payoff, {damage} in what the "
            "attack takes of it."
        )
    return " ".join(sentences)


def _ends(rows: list[Row]) -> str:
    """How often every weight was chosen."""
    counts = []
    for method in list(COMPARISON.names)[1:]:
        weights = [row["knob"] for row in rows if row["method"] == method and row["chosen"]]
        each = ", ".join(f"{weight:g} in {weights.count(weight)}" for weight in sorted(set(weights)))
        counts.append(f"{COMPARISON.names[method]} {each}")
    return "; ".join(counts)


def _picture(rows: list[Row], path: Path) -> None:
    drawn, (curves, front, forest) = figure(3, width=4.4, height=4.0)
    for method, name in COMPARISON.names.items():
        own, colour = [row for (row,) in chosen_runs(rows)[method].values()], COMPARISON.colours[method]
        whole = [row["attacked"] for row in own if row["finite"]]
        if whole:
            at = SMOOTHED * (np.arange(len(whole[0])) + 0.5)
            curves.plot(at, np.mean(whole, 0), color=colour, linewidth=1.4)
        payoffs = np.asarray([(row["test"]["joint"], row["test"]["robust_joint"]) for row in own])
        front.scatter(*payoffs.T, s=12, color=colour, alpha=0.35, linewidths=0)
        front.scatter(*payoffs.mean(0), s=70, color=colour, edgecolors="white", zorder=3, label=name)
    curves.set(xlabel="update", ylabel="payoff under attack, share of the optimum")
    front.set(xlabel="clean joint payoff", ylabel="robust joint payoff", title="test games; large: means")
    COMPARISON.forest(forest, rows, ["robust"])
    forest.set(xlabel="difference of robust joint payoff", title="positive: AAJR keeps more")
    save(drawn, path)


def report(header: dict[str, Any], rows: list[Row], folder: Path) -> str:
    """The page; draws ``two-agents.png`` into the folder."""
    config = header["config"]
    scratch, language = ([row for row in rows if row["model"] == model] for model in ("scratch", "language"))
    _picture(scratch, folder / "two-agents.png")
    columns = {
        "w or λ": lambda own, _: geometric_mean(own, "knob"),
        **{quantity.heading: quantity.mean for quantity in COMPARISON.quantities.values()},
        "collapsed (chosen)": lambda own, _: share_of(own, lambda row: row["collapsed"]),
        "collapsed (all)": lambda _, every: share_of(every, lambda row: row["collapsed"]),
        "not finite (all)": lambda _, every: share_of(every, lambda row: not row["finite"]),
    }
    return page(
        *(__file__, header, rows),
        total=1 + config["game"]["regard"],
        token=config["model"]["width"] ** 0.5,
        means=by_method(COMPARISON.names, scratch, columns),
        differences=COMPARISON.differences(scratch),
        primaries=COMPARISON.primary_table(scratch),
        parts=_parts(scratch),
        ends=_ends(scratch),
        language_table=_language(language),
        play=_play(rows),
    )
