"""The page on where the penalty is measured: written before the runs, and drawn from their rows only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from common.plots import figure, save

from .. import summaries
from ..statistics import t_interval
from ..store import Row
from ..summaries import Comparison, Quantity, entry

MEASURES = ("end", "start", "rows")
COMPARISON = Comparison(
    names={
        "none": "none",
        "longer": "none, longer ascent",
        "end": "worst, end, per token",
        "start": "all, start, per token",
        "rows": "all, start, over the row",
    },
    pairs=[
        *((measure, baseline) for baseline in ("none", "longer") for measure in MEASURES),
        ("start", "end"),
        ("rows", "end"),
    ],
    quantities={
        "robust": Quantity("robust loss", entry("test", "embedding", 0), 3, True, 0.02),
        "clean": Quantity("clean loss", entry("test", "clean")),
        "double": Quantity("at twice the radius", entry("test", "embedding", 1)),
        "tokens": Quantity("4 tokens replaced", entry("test", "substitution", -1)),
        "kappa": Quantity("κ⁻", entry("test", "kappa")),
    },
    greys=("#888888", "#444444"),
)


def default_of(rows: list[Row]) -> str:
    """The measurement that training should have by default: ``"end"``, unless another one is confirmed to be better.

    Better than ``"end"`` and not confirmed to be worse than training without a penalty, at the same robust loss.
    """
    primaries = COMPARISON.primaries(rows)

    def verdict(measure: str, baseline: str) -> str:
        return primaries[measure, baseline, "robust"].verdict

    better = [
        measure
        for measure in ("start", "rows")
        if verdict(measure, "end") == "lower" and verdict(measure, "none") != "higher"
    ]
    robust = {
        measure: np.mean(list(COMPARISON.values(rows, measure, "robust").values())) for measure in better
    }
    return min(better, key=lambda measure: robust[measure]) if better else "end"


def _seconds(rows: list[Row]) -> dict[str, list[float]]:
    """Method -> processor time of a step over that without a penalty, of every seed: medians over its runs."""
    times: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        times.setdefault((row["method"], row["seed"]), []).append(row["seconds_per_step"])
    median = {key: float(np.median(values)) for key, values in times.items()}
    return {
        method: [median[method, seed] / median["none", seed] for (name, seed) in median if name == method]
        for method in COMPARISON.names
    }


def _runs(config: dict[str, Any], rows: list[Row]) -> str:
    """What was chosen, how well it is matched, and what a step costs."""
    seconds = _seconds(rows)

    def away(row: Row) -> float:
        return abs(row["validation"]["nominal"] - row["target"])

    def shares(own: list[Row], _: list[Row]) -> str:
        if own[0]["method"] not in MEASURES:
            return "-"
        return ", ".join(f"{w:g} in {sum(row['w'] == w for row in own)}" for w in config["mixes"])

    return summaries.by_method(
        COMPARISON.names,
        rows,
        {
            "w of the chosen runs": shares,
            "w, or λ in units": lambda own, _: summaries.geometric_mean(own, "knob"),
            "mean distance from the target": lambda own, _: f"{np.mean([away(row) for row in own]):.4f}",
            "furthest": lambda own, _: f"{max(away(row) for row in own):.4f}",
            "within the tolerance": lambda own, _: summaries.share_of(
                own, lambda row: away(row) <= config["tolerance"]
            ),
            "time of a step": lambda own, _: summaries.interval_text(
                t_interval(seconds[own[0]["method"]]), 2, sign=False
            ),
        },
    )


def _picture(rows: list[Row], path: Path) -> None:
    drawn, (losses, differences) = figure(2, width=5.2, height=3.2)
    names = list(COMPARISON.names)
    for place, method in enumerate(reversed(names)):
        values = list(COMPARISON.values(rows, method, "robust").values())
        mean, low, high = t_interval(values)
        colour = COMPARISON.colours[method]
        losses.scatter(values, place + np.linspace(-0.2, 0.2, len(values)), s=10, color=colour, alpha=0.5)
        losses.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color=colour, capsize=4)
    losses.set_yticks(range(len(names)), [COMPARISON.names[name] for name in reversed(names)], fontsize=8)
    losses.set(xlabel="robust loss, nats per token (left is better)", title="at the same clean perplexity")
    COMPARISON.forest(differences, rows, ["robust"])
    margin = COMPARISON.quantities["robust"].margin
    assert margin is not None
    differences.axvspan(-margin, margin, color="black", alpha=0.06)
    differences.set(xlabel="difference of robust loss, 95 % interval", title="left: the first one is better")
    save(drawn, path)


def report(header: dict[str, Any], rows: list[Row], folder: Path) -> str:
    """The page; draws ``ablation.png`` into the folder."""
    config = header["config"]
    _picture(rows, folder / "ablation.png")
    means = summaries.by_method(
        COMPARISON.names, rows, {q.heading: q.mean for q in COMPARISON.quantities.values()}
    )
    return summaries.page(
        *(__file__, header, rows),
        open_places=(config["length"] // config["turn"] + 1) // 2 * config["turn"],
        default=COMPARISON.names[default_of(rows)],
        means=means,
        primaries=COMPARISON.primary_table(rows),
        differences=COMPARISON.differences(rows),
        runs=_runs(config, rows),
    )
