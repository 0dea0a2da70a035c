"""The page on equal bounds: written before the runs, and drawn from their rows only."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.pages import table
from common.plots import COLOURS, figure, save

from .. import equal, summaries
from ..equal import Primary
from ..statistics import t_interval
from ..store import Row
from ..summaries import entry

#: in the order of the tables, with their names on the page
NAMES = {
    "none": "no bound",
    "aligned": "AAJR",
    "spectral": "global spectral",
    "frobenius": "global Frobenius",
    "layer_product": "layer product",
}
METHODS = tuple(NAMES)
BASELINES = METHODS[2:]
COLOUR = dict(zip(METHODS, ("#444444", *COLOURS)))
PLACES = {"A": "At the same γ", "B": "At the same realised ‖J u‖"}
nominal = entry("test", "nominal")
#: heading -> value, digits
SECONDARY: dict[str, tuple[Callable[[Row], float], int]] = {
    "robust loss": (lambda row: row["test"]["robust_loss"], 3),
    "robust accuracy": (lambda row: row["test"]["robust_accuracy"], 3),
    "κ⁺": (lambda row: row["stability"]["kappa_positive"], 3),
    "κ⁻": (lambda row: row["stability"]["kappa"], 4),
    "1/L_eff": (lambda row: 1 / row["stability"]["smoothness"], 4),
    "expansion": (lambda row: row["stability"]["expansion"], 4),
}


def is_valid(config: dict[str, Any], row: Row) -> bool:
    """Whether a run has the bound that it was given: by the share of validation units above it, or by its product."""
    allowed = config["valid"]
    if row["method"] == "layer_product":
        reached: float = row["validation"]["layer_product"]
        return abs(reached / row["gamma"] - 1) <= allowed["product"]
    return bool(allowed["least"] <= row["violated"] <= allowed["most"])


def of_training(rows: Sequence[Row], training: str) -> list[Row]:
    """Rows of nominal or of minimax training."""
    return [row for row in rows if row["training"] == training]


def binding(config: dict[str, Any], rows: Sequence[Row], training: str) -> list[float]:
    """The bounds below the quantile of ‖J u‖ on validation images without a bound, at every seed: they bind for all."""
    free = [r["validation"]["aligned"] for r in of_training(rows, training) if r["method"] == "none"]
    return [gamma for gamma in config["gammas"] if free and gamma < min(free)]


def primaries(config: dict[str, Any], rows: Sequence[Row]) -> list[Primary]:
    """AAJR − baseline in nominal loss: A at the same bound, B at the same realised ‖J u‖; of both trainings."""
    valid = functools.partial(is_valid, config)
    family = []
    for letter in "AB":
        for training in config["mixes"]:
            own, gammas = of_training(rows, training), binding(config, rows, training)
            for baseline in BASELINES:
                at = (own, "aligned", baseline, _nominal)
                if letter == "A":
                    differences, place = equal.at_equal_bound(*at, gammas, valid), "equal γ"
                else:
                    differences, place = equal.at_equal_realised(*at, gammas), "equal realised ‖J u‖"
                comparison = f"{NAMES['aligned']} − {NAMES[baseline]}"
                of = f"{letter}: {place}, {training} training"
                family.append(Primary(comparison, of, differences, config["margin"]))
    return family


def _nominal(row: Row) -> float:
    value = nominal(row)
    assert value is not None
    return value


def _at(rows: Sequence[Row], method: str, gamma: float | None) -> list[Row]:
    return [row for row in rows if (row["method"], row["gamma"]) == (method, gamma)]


def _losses(config: dict[str, Any], rows: list[Row], training: str) -> str:
    """Nominal loss by method and bound, with what was realised and how many runs are valid."""
    own, lines = of_training(rows, training), []
    bounds = binding(config, rows, training)
    for gamma in (*config["gammas"], None):
        cells = []
        for method in METHODS[1:] if gamma is not None else METHODS[:1]:
            runs = _at(own, method, gamma)
            valid = sum(is_valid(config, row) for row in runs) if gamma is not None else len(runs)
            loss, reached = (np.mean([value(row) for row in runs]) for value in (_nominal, _realised))
            cells.append(f"{loss:.3f} ({reached:.1f}; {valid} of {len(runs)})")
        if gamma is None:
            lines.append(["none", cells[0], *["-"] * (len(METHODS) - 2)])
        else:
            lines.append([f"{gamma:g}" if gamma in bounds else f"{gamma:g}, does not bind", *cells])
    return table(["γ", *(NAMES[method] for method in METHODS[1:])], lines)


def _realised(row: Row) -> float:
    return float(row["realised"])


def _secondary(config: dict[str, Any], rows: list[Row]) -> str:
    valid, lines = functools.partial(is_valid, config), []
    for training in config["mixes"]:
        own, gammas = of_training(rows, training), binding(config, rows, training)
        for baseline in BASELINES:
            cells = []
            for value, digits in SECONDARY.values():
                differences = equal.at_equal_bound(own, "aligned", baseline, value, gammas, valid)
                interval = t_interval(differences) if len(differences) > 1 else None
                cells.append(summaries.interval_text(interval, digits))
            lines.append([f"{NAMES['aligned']} − {NAMES[baseline]}, {training}", *cells])
    return table(["paired difference at equal γ", *SECONDARY], lines)


def _means(config: dict[str, Any], rows: list[Row]) -> str:
    """Of the valid runs at bounds that bind, and of those without a bound."""
    lines = []
    for training in config["mixes"]:
        own, gammas = of_training(rows, training), binding(config, rows, training)
        for method in METHODS:
            runs = [
                row
                for row in own
                if row["method"] == method
                and (method == "none" or (row["gamma"] in gammas and is_valid(config, row)))
            ]
            cells = [
                f"{np.mean([value(r) for r in runs]):.{d}f}" if runs else "-"
                for value, d in SECONDARY.values()
            ]
            lines.append([f"{NAMES[method]}, {training}", len(runs), *cells])
    return table(["method and training", "runs", *SECONDARY], lines)


def _picture(config: dict[str, Any], rows: list[Row], family: Sequence[Primary], path: Path) -> None:
    trainings = list(config["mixes"])
    drawn, (*curves, forest) = figure(len(trainings) + 1, width=4.4, height=3.8)
    ticks = (0.1, 0.2, 0.5, 1, 2)
    for axis, training in zip(curves, trainings):
        own = of_training(rows, training)
        for method in METHODS[1:]:
            losses = [[_nominal(row) for row in _at(own, method, gamma)] for gamma in config["gammas"]]
            means = [float(np.mean(of_gamma)) for of_gamma in losses]
            axis.plot(config["gammas"], means, "o-", color=COLOUR[method], markersize=4, label=NAMES[method])
        free = np.mean([_nominal(row) for row in _at(own, "none", None)])
        axis.axhline(free, color=COLOUR["none"], linewidth=0.9, linestyle="--", label=NAMES["none"])
        axis.set(xscale="log", yscale="log", xlabel="bound γ", ylabel="nominal loss (test)")
        axis.set_xticks(config["gammas"], [f"{gamma:g}" for gamma in config["gammas"]])
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_title(f"{training} training: lower is better")
    outcomes = equal.judged(family)
    for place, (one, outcome) in enumerate(reversed(outcomes)):
        mean, low, high = outcome.interval
        method = next(m for m in BASELINES if one.comparison.endswith(NAMES[m]))
        is_last_of_place = place in (0, len(outcomes) // 2)
        forest.errorbar(
            *(mean, place),
            xerr=[[mean - low], [high - mean]],
            fmt="o" if one.of.startswith("A") else "s",
            color=COLOUR[method],
            capsize=3,
            markersize=4,
            label=one.of.split(", ")[0] if is_last_of_place else None,
        )
    labels = [f"{one.comparison.split(' − ')[1]}, {one.of.split(', ')[-1].split()[0]}" for one, _ in outcomes]
    forest.set_yticks(range(len(labels)), reversed(labels), fontsize=7)
    forest.axvline(0, color="black", linewidth=0.8)
    forest.set_xscale("symlog", linthresh=0.02)
    forest.set(xlabel="AAJR − baseline: nominal loss, 95 % interval")
    forest.set_title("left of 0: AAJR loses less")
    save(drawn, path)


def report(header: dict[str, Any], rows: list[Row], folder: Path) -> str:
    """The page; draws ``equal-bound.png`` into the folder."""
    config = header["config"]
    family = primaries(config, rows)
    _picture(config, rows, family, folder / "equal-bound.png")
    bounds = {training: binding(config, rows, training) for training in config["mixes"]}
    return summaries.page(
        *(__file__, header, rows),
        losses={training: _losses(config, rows, training) for training in config["mixes"]},
        binding={
            name: ", ".join(f"{gamma:g}" for gamma in gammas) or "none" for name, gammas in bounds.items()
        },
        primaries=equal.primary_table(family),
        verdict=equal.verdict(family, PLACES, "AAJR's nominal loss"),
        secondary=_secondary(config, rows),
        means=_means(config, rows),
    )
