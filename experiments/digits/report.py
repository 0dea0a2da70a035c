"""The page on digits: written before the runs, and drawn from their rows only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from common.plots import figure, save

from .. import summaries
from ..statistics import t_interval
from ..store import Row
from ..summaries import Comparison, Quantity, chosen_runs, entry

#: the global penalties in the Fisher metric tell direction and metric apart
BASELINES = {
    "aajr-l2": ("frobenius", "spectral", "random"),
    "aajr-fisher": ("frobenius", "spectral", "random", "frobenius-fisher", "spectral-fisher", "aajr-l2"),
}
COMPARISON = Comparison(
    names={
        "none": "none",
        "frobenius": "global Frobenius",
        "spectral": "global spectral",
        "random": "random direction",
        "frobenius-fisher": "Frobenius, Fisher",
        "spectral-fisher": "spectral, Fisher",
        "aajr-l2": "AAJR, l2",
        "aajr-fisher": "AAJR, Fisher",
    },
    pairs=[(ours, baseline) for ours, baselines in BASELINES.items() for baseline in baselines],
    quantities={
        "nominal": Quantity("nominal loss", entry("test", "nominal"), primary=True, margin=0.01),
        "cross_entropy": Quantity("cross-entropy", entry("test", "cross_entropy")),
        "utility_error": Quantity("utility error", entry("test", "utility_error")),
        "accuracy": Quantity("accuracy", entry("test", "accuracy")),
        "robust_accuracy": Quantity("robust accuracy", entry("test", "robust_accuracy")),
    },
    greys=("#888888",),
)


def _means(config: dict[str, Any], rows: list[Row]) -> str:
    cost = {seed: row["test"]["nominal"] for seed, (row,) in chosen_runs(rows)["none"].items()}

    def reached(own: list[Row], _: list[Row]) -> str:
        return summaries.share_of(own, lambda row: row["validation"]["robust_accuracy"] >= config["target"])

    def price(own: list[Row], _: list[Row]) -> str:
        return summaries.interval_text(
            t_interval([row["test"]["nominal"] - cost[row["seed"]] for row in own])
        )

    columns = {
        "λ (units)": lambda own, _: summaries.geometric_mean(own, "weight", ".2f"),
        "target reached": lambda own, every: "-" if own[0]["method"] == "none" else reached(own, every),
        **{quantity.heading: quantity.mean for quantity in COMPARISON.quantities.values()},
        "price of robustness": lambda own, every: "0" if own[0]["method"] == "none" else price(own, every),
    }
    return summaries.by_method(COMPARISON.names, rows, columns)


def _picture(config: dict[str, Any], rows: list[Row], path: Path) -> None:
    drawn, (front, forest) = figure(2, width=5.0, height=4.4)
    for method, name in COMPARISON.names.items():
        colour = COMPARISON.colours[method]
        own = [row for row in rows if row["method"] == method]
        validated = [row["validation"] for row in own]
        tested = [row["test"] for row in own if row["chosen"]]
        x, y = ([result[axis] for result in validated] for axis in ("robust_accuracy", "nominal"))
        front.scatter(x, y, 12, colour, alpha=0.35, linewidths=0)
        x, y = (np.mean([result[axis] for result in tested]) for axis in ("robust_accuracy", "nominal"))
        front.scatter(x, y, 70, colour, label=name, edgecolors="white", zorder=3)
    front.axvline(config["target"], color="black", linewidth=0.8, linestyle=":")
    title = "every run (validation); large: tested, mean"
    front.set(xlabel="robust accuracy", ylabel="nominal loss", yscale="log", title=title)
    COMPARISON.forest(forest, rows, ["nominal"])
    forest.set(xlabel="difference of nominal loss (test), 95 % interval", title="negative: AAJR pays less")
    save(drawn, path)


def report(header: dict[str, Any], rows: list[Row], folder: Path) -> str:
    """The page; draws ``digits.png`` into the folder."""
    _picture(header["config"], rows, folder / "digits.png")
    return summaries.page(
        *(__file__, header, rows),
        means=_means(header["config"], rows),
        differences=COMPARISON.differences(rows),
        primaries=COMPARISON.primary_table(rows),
    )
