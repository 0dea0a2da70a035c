"""The page on smoothness that is held at 1/η: written before the runs, and drawn from their rows only."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from common.pages import table
from common.plots import figure, save

from .. import summaries
from ..statistics import t_interval
from ..store import Row
from ..summaries import Comparison, Quantity

NAMES = {
    "none": "none, not held",
    "frobenius": "global Frobenius",
    "spectral": "global spectral",
    "aajr-l2": "AAJR, l2",
    "aajr-fisher": "AAJR, Fisher",
}
OUTCOMES = ("held", "below", "infeasible")
LASTING = "lasting"


def _value(setting: str, name: str) -> Any:
    """From a row of :func:`by_seed`; the nominal loss only where the smoothness was held."""

    def value(row: Row) -> float | None:
        run = row["runs"].get(setting)
        if run is None or not run["finite"] or (name == "nominal" and run["outcome"] != "held"):
            return None
        return math.log10(run[name]) if name in ("variance", "jitter") else float(run[name])

    return value


def comparison(config: dict[str, Any]) -> Comparison:
    """Nominal loss in every setting at equal L_eff, and the variance where plain training oscillates."""
    quantities = {
        f"nominal {setting}": Quantity(f"nominal loss, {setting}", _value(setting, "nominal"), 3, True, 0.02)
        for setting in config["settings"]
    }
    quantities["variance"] = Quantity(
        f"log₁₀ outer variance, {LASTING}", _value(LASTING, "variance"), 2, True, 0.1
    )
    return Comparison(
        names=NAMES,
        pairs=[("aajr-l2", baseline) for baseline in ("none", "frobenius", "spectral")],
        quantities=quantities,
        greys=("#888888",),
    )


def by_seed(rows: list[Row]) -> list[Row]:
    """A row for every method and seed, with its runs by setting."""
    merged: dict[tuple[str, int], Row] = {}
    for row in rows:
        key = row["method"], row["seed"]
        one = merged.setdefault(key, {"method": key[0], "seed": key[1], "chosen": True, "runs": {}})
        one["runs"][row["setting"]] = row
    return list(merged.values())


def _table(rows: list[Row], setting: str) -> str:
    lines = []
    for method, name in NAMES.items():
        own = [row for row in rows if (row["method"], row["setting"]) == (method, setting)]
        whole = [row for row in own if row["finite"]]
        counts = [sum(row["outcome"] == outcome for row in own) for outcome in OUTCOMES]

        def mean(key: str, whole: list[Row] = whole) -> str:
            if len(whole) < 2:
                return "-"
            return summaries.interval_text(t_interval([row[key] for row in whole]), 3, sign=False)

        variance = summaries.geometric_mean(whole, "variance", ".2g") if whole else "-"
        cells = [mean(key) for key in ("within", "nominal", "robust_loss", "robust_accuracy")]
        knob = "-" if method == "none" else summaries.geometric_mean(whole, "multiplier", ".2g")
        lines.append([name, *counts, *cells, variance, knob])
    heads = [
        "share with L_eff ≤ 1/η",
        "nominal loss",
        "robust loss",
        "robust accuracy",
        "outer variance",
        "λ",
    ]
    return table(["method", *OUTCOMES, *heads], lines)


def _picture(config: dict[str, Any], rows: list[Row], path: Path) -> None:
    """Nominal loss by method and setting, and the adversarial loss in the course of an oscillating training."""
    settings, colours = list(config["settings"]), comparison(config).colours
    drawn, axes = figure(len(settings) + 1, width=3.4, height=3.4)
    for axis, setting in zip(axes, settings):
        for place, method in enumerate(NAMES):
            own = [
                row for row in rows if (row["method"], row["setting"]) == (method, setting) and row["finite"]
            ]
            shift = np.linspace(-0.2, 0.2, max(len(own), 1))
            for row, at in zip(own, place + shift):
                filled = colours[method] if row["outcome"] == "held" else "none"
                axis.scatter(at, row["nominal"], s=16, edgecolors=colours[method], facecolors=filled)
        axis.set_xticks(range(len(NAMES)), [name.replace(" ", "\n") for name in NAMES.values()], fontsize=6)
        axis.set(ylabel="nominal loss", title=f"{setting}; filled: 1/η is held")
    for method, name in NAMES.items():
        own = [row for row in rows if (row["method"], row["setting"]) == (method, LASTING) and row["finite"]]
        if own:
            axes[-1].plot(own[0]["outer"], color=colours[method], label=name, linewidth=1)
    axes[-1].set(xlabel="block of updates", ylabel="adversarial loss", title=f"{LASTING}, first seed")
    save(drawn, path)


def report(header: dict[str, Any], rows: list[Row], folder: Path) -> str:
    """The page; draws ``decoupling.png`` into the folder."""
    config = header["config"]
    _picture(config, rows, folder / "decoupling.png")
    compared, merged = comparison(config), by_seed(rows)
    bounds = {
        setting: [1 / row["eta"] for row in rows if row["setting"] == setting]
        for setting in config["settings"]
    }
    ranges = [f"{setting}: {min(values):.1f} to {max(values):.1f}" for setting, values in bounds.items()]
    return summaries.page(
        *(__file__, header, rows),
        ranges="; ".join(ranges),
        violations=1 - config["quantile"],
        tables="\n\n".join(f"*{setting}*:\n\n{_table(rows, setting)}" for setting in config["settings"]),
        primaries=compared.primary_table(merged),
    )
