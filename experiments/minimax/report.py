"""The page on minimax training: written before the runs, and drawn from their rows only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from common.pages import table
from common.plots import figure, save

from .. import summaries
from ..statistics import t_interval
from ..store import Row
from ..summaries import Comparison, Quantity, chosen_runs, entry

BASELINES = ("none", "frobenius", "spectral", "random")
COMPARISON = Comparison(
    names={
        "plain": "plain minimax (not matched)",
        "none": "none (w matched)",
        "frobenius": "global Frobenius",
        "spectral": "global spectral",
        "random": "random direction",
        "aajr-l2": "AAJR, l2",
        "aajr-fisher": "AAJR, Fisher",
    },
    pairs=[
        *(("aajr-l2", baseline) for baseline in BASELINES),
        *(("aajr-fisher", baseline) for baseline in (*BASELINES, "aajr-l2")),
    ],
    quantities={
        "falls": Quantity(
            "non-monotone, %",
            lambda row: 100 * sum(row["falls"]) / max(len(row["falls"]), 1),
            *(2, True, 0.05),
        ),
        "variance": Quantity("variance × 100", entry("variance", factor=100), 2, True, 0.2),
        "jitter": Quantity("jitter × 100", entry("jitter", factor=100), 2),
        "robust_loss": Quantity("robust loss", entry("test", "robust_loss"), primary=True, margin=0.05),
        "robust_accuracy": Quantity("robust accuracy", entry("test", "robust_accuracy")),
        "kappa": Quantity("largest κ", entry("test", "kappa"), 1),
        "nominal": Quantity("nominal loss", entry("test", "nominal")),
    },
    greys=("#bbbbbb", "#444444"),
)
DRAWN = ("falls", "variance", "robust_loss")
#: listed by step size; the last one shows how well the runs are matched on images that were not used for it
LISTED = (*DRAWN, "robust_accuracy", "kappa", "nominal")


def _at(rows: list[Row], factor: float) -> list[Row]:
    return [row for row in rows if row["factor"] == factor]


def _by_factor(rows: list[Row], name: str, factors: list[float]) -> str:
    quantity, lines = COMPARISON.quantities[name], []
    for method, heading in COMPARISON.names.items():
        own = [row for row in rows if row["method"] == method and row["chosen"]]
        lines.append([heading, *(quantity.mean(_at(own, factor)) for factor in factors)])
    return table([quantity.heading, *(f"{factor:g} · 2/κ₀" for factor in factors)], lines)


def _matching(rows: list[Row], factors: list[float]) -> str:
    def away(row: Row) -> float:
        return abs(row["validation"]["nominal"] / row["target"] - 1)

    def matched(own: list[Row], cell: str) -> str:
        return "-" if own[0]["method"] == "plain" else cell

    columns: dict[str, Any] = {
        f"knob at {factor:g}": lambda own, _, factor=factor: summaries.geometric_mean(
            _at(own, factor), "knob"
        )
        for factor in factors
    }
    columns |= {
        "within 2 % of the target": lambda own, _: matched(
            own, summaries.share_of(own, lambda row: away(row) <= 0.02)
        ),
        "furthest off": lambda own, _: matched(own, f"{max(map(away, own)):.1%}"),
        "diverged (chosen)": lambda own, _: summaries.share_of(own, lambda row: row["diverged"]),
        "diverged (all runs)": lambda _, every: summaries.share_of(every, lambda row: row["diverged"]),
    }
    return summaries.by_method(COMPARISON.names, rows, columns)


def _picture(rows: list[Row], factors: list[float], path: Path) -> None:
    drawn, axes = figure(4, width=3.7, height=3.7)
    for number, (method, name) in enumerate(COMPARISON.names.items()):
        shift, colour = 2 ** (0.04 * (number - (len(COMPARISON.names) - 1) / 2)), COMPARISON.colours[method]
        for axis, quantity in zip(axes, DRAWN):
            by_factor = [
                (f, list(COMPARISON.values(_at(rows, f), method, quantity).values())) for f in factors
            ]
            points = [(f * shift, *t_interval(v)) for f, v in by_factor if len(v) > 1]
            if points:
                at, mean, low, high = np.asarray(points).T
                error, label = [mean - low, high - mean], name if axis is axes[0] else None
                axis.errorbar(at, mean, error, fmt="o-", color=colour, ms=3, linewidth=1, label=label)
        ends = [
            row["falls"] for (row,) in chosen_runs(_at(rows, factors[-1]))[method].values() if row["finite"]
        ]
        if ends:
            axes[3].plot(range(1, len(ends[0]) + 1), 100 * np.mean(ends, 0), color=colour)
    for axis, quantity in zip(axes, DRAWN):
        axis.set(xscale="log", xlabel="η · κ₀ / 2", ylabel=COMPARISON.quantities[quantity].heading)
        axis.set_xticks(factors, [f"{factor:g}" for factor in factors])
        axis.minorticks_off()
        axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes[3].set(xlabel="epoch", ylabel="non-monotone, %", title=f"η = {factors[-1]:g} · 2/κ₀")
    save(drawn, path)


def report(header: dict[str, Any], rows: list[Row], folder: Path) -> str:
    """The page; draws ``minimax.png`` into the folder."""
    factors = header["config"]["factors"]
    _picture(rows, factors, folder / "minimax.png")

    def by_factor(quantity: str) -> str:
        columns = {f"{factor:g} · 2/κ₀": (quantity, _at(rows, factor)) for factor in factors}
        return COMPARISON.differences(rows, columns=columns)

    kappas = [row["kappa_0"] for row in rows]
    tested = [row for row in rows if row["chosen"]]
    means = [
        np.mean(list(COMPARISON.values(_at(rows, factor), method, "robust_accuracy").values()))
        for method in COMPARISON.names
        for factor in factors
    ]
    return summaries.page(
        *(__file__, header, rows),
        kappas=(min(kappas), max(kappas)),
        listed="\n\n".join(_by_factor(rows, quantity, factors) for quantity in LISTED),
        differences=COMPARISON.differences(rows),
        primaries=COMPARISON.primary_table(rows),
        robust_accuracy=max(row["test"]["robust_accuracy"] for row in tested),
        mean_robust_accuracy=max(means),
        runs=len(rows),
        diverged=sum(row["diverged"] for row in rows),
        robust_by_factor=by_factor("robust_loss"),
        falls_by_factor=by_factor("falls"),
        matching=_matching(rows, factors),
    )
