"""The page on equal bounds of a language model: written before the runs, and drawn from their rows only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.pages import table
from common.plots import COLOURS, figure, save

from .. import equal, summaries
from ..equal import Primary
from ..statistics import Interval, t_interval
from ..store import Row

NAMES = {
    "none": "no bound",
    "more": "no bound, more ascent steps",
    "aligned": "AAJR",
    "spectral": "global spectral",
}
BOUNDED = ("aligned", "spectral")
COLOUR = dict(zip(NAMES, ("#444444", "#999999", *COLOURS)))
PLACES = {"A": "At the same γ", "B": "At the same realised ‖J u‖"}
#: heading -> value, digits
QUANTITIES: dict[str, tuple[Callable[[Row], float], int]] = {
    "clean loss": (lambda row: row["test"]["nominal"], 3),
    "robust loss": (lambda row: row["test"]["robust"], 3),
    "κ⁺": (lambda row: row["stability"]["kappa_positive"], 4),
    "κ⁻": (lambda row: row["stability"]["kappa"], 4),
    "1/L_eff": (lambda row: 1 / row["stability"]["smoothness"], 3),
    "expansion": (lambda row: row["stability"]["expansion"], 4),
}
clean = QUANTITIES["clean loss"][0]


def is_valid(config: dict[str, Any], row: Row) -> bool:
    """Whether the share of validation units above its bound is near the one that is allowed."""
    above: float = row["validation"][f"{row['method']}_above"]
    return bool(config["valid"]["least"] <= above <= config["valid"]["most"])


def binding(config: dict[str, Any], rows: Sequence[Row]) -> list[float]:
    """The bounds below the quantile of ‖J u‖ on validation text after training without a bound, at every seed."""
    free = [row["validation"]["aligned"] / row["at_start"] for row in rows if row["method"] == "none"]
    return [gamma for gamma in config["gammas"] if free and gamma < min(free)]


def primaries(config: dict[str, Any], rows: Sequence[Row]) -> list[Primary]:
    """AAJR − global spectral in clean loss: A at the same bound, B at the same realised ‖J u‖."""
    gammas, at = binding(config, rows), (rows, "aligned", "spectral", clean)
    comparison = f"{NAMES['aligned']} − {NAMES['spectral']}"
    differences = {
        "A: equal γ": equal.at_equal_bound(*at, gammas, lambda row: is_valid(config, row)),
        "B: equal realised ‖J u‖": equal.at_equal_realised(*at, gammas),
    }
    return [Primary(comparison, of, values, config["margin"]) for of, values in differences.items()]


def _runs(rows: Sequence[Row], method: str, gamma: float | None) -> list[Row]:
    return [row for row in rows if (row["method"], row["gamma"]) == (method, gamma)]


def _settings(config: dict[str, Any]) -> list[tuple[str, float | None]]:
    """Method and bound of every line."""
    return [("none", None), ("more", None), *((m, gamma) for m in BOUNDED for gamma in config["gammas"])]


def _name(method: str, gamma: float | None) -> str:
    return NAMES[method] if gamma is None else f"{NAMES[method]}, γ = {gamma:g}"


def _means(config: dict[str, Any], rows: Sequence[Row]) -> str:
    lines, plain = [], np.mean([row["seconds_per_step"] for row in _runs(rows, "none", None)])
    for method, gamma in _settings(config):
        runs = _runs(rows, method, gamma)
        cells = [
            f"{np.mean([value(row) for row in runs]):.{digits}f}" for value, digits in QUANTITIES.values()
        ]
        reached = np.mean([row["realised"] / row["at_start"] for row in runs])
        valid = "-" if gamma is None else summaries.share_of(runs, lambda row: is_valid(config, row))
        seconds = np.mean([row["seconds_per_step"] for row in runs]) / plain
        lines.append([_name(method, gamma), f"{reached:.2f}", valid, f"{seconds:.2f}", *cells])
    columns = ["run", "realised ‖J u‖, of the start's", "valid", "time of a step", *QUANTITIES]
    return table(columns, lines)


def paired(rows: Sequence[Row], ours: Any, baseline: Any, value: Callable[[Row], float]) -> Interval | None:
    """Mean of ours − baseline, both of a method and a bound, over the seeds that have both; None below two."""
    a, b = ({row["seed"]: value(row) for row in _runs(rows, *setting)} for setting in (ours, baseline))
    differences = [a[seed] - b[seed] for seed in sorted(a) if seed in b]
    return t_interval(differences) if len(differences) > 1 else None


def _differences(config: dict[str, Any], rows: Sequence[Row], pairs: Sequence[tuple[Any, Any]]) -> str:
    lines = []
    for ours, baseline in pairs:
        cells = [
            summaries.interval_text(paired(rows, ours, baseline, value), digits)
            for value, digits in QUANTITIES.values()
        ]
        lines.append([f"{_name(*ours)} − {_name(*baseline)}", *cells])
    return table(["paired difference", *QUANTITIES], lines)


def pairs_of(config: dict[str, Any], baseline: str) -> list[tuple[Any, Any]]:
    """AAJR at every bound against a run without a bound, or against a method at the same one."""
    at = lambda gamma: (baseline, gamma if baseline in BOUNDED else None)
    return [(("aligned", gamma), at(gamma)) for gamma in config["gammas"]]


def _picture(config: dict[str, Any], rows: Sequence[Row], path: Path) -> None:
    drawn, (losses, forest) = figure(2, width=5.0, height=3.8)
    for method in NAMES:
        settings = [setting for setting in _settings(config) if setting[0] == method]
        at = [
            [
                float(np.mean([QUANTITIES[name][0](row) for row in _runs(rows, *setting)]))
                for setting in settings
            ]
            for name in ("clean loss", "robust loss")
        ]
        losses.plot(*at, "o-", color=COLOUR[method], markersize=6, label=NAMES[method])
        for x, y, (_, gamma) in zip(*at, settings):
            if gamma is not None:
                losses.annotate(f"γ = {gamma:g}", (x, y), (5, 4), textcoords="offset points", fontsize=7)
    losses.set(xlabel="clean loss (test)", ylabel="loss under attack (test)")
    losses.set_title("mean over seeds; left and below is better")
    pairs = [pair for baseline in ("spectral", "more", "none") for pair in pairs_of(config, baseline)]
    for shift, name, marker in ((0.15, "clean loss", "o"), (-0.15, "robust loss", "s")):
        for place, (ours, baseline) in enumerate(reversed(pairs)):
            interval = paired(rows, ours, baseline, QUANTITIES[name][0])
            if interval is not None:
                mean, low, high = interval
                forest.errorbar(
                    *(mean, place + shift),
                    xerr=[[mean - low], [high - mean]],
                    fmt=marker,
                    color=COLOUR[baseline[0]],
                    capsize=3,
                    markersize=4,
                    label=name if place == 0 else None,
                )
    labels = [f"γ = {ours[1]:g} against\n{NAMES[baseline[0]]}" for ours, baseline in reversed(pairs)]
    forest.set_yticks(range(len(labels)), labels, fontsize=7)
    forest.axvline(0, color="black", linewidth=0.8)
    forest.set(xlabel="AAJR − the other, 95 % interval", title="left of 0: AAJR is better")
    save(drawn, path)


def report(header: dict[str, Any], rows: list[Row], folder: Path) -> str:
    """The page; draws ``equal-bound-lm.png`` into the folder."""
    config = header["config"]
    _picture(config, rows, folder / "equal-bound-lm.png")
    family = primaries(config, rows)
    return summaries.page(
        *(__file__, header, rows),
        binding=", ".join(f"{gamma:g}" for gamma in binding(config, rows)) or "none of them",
        primaries=equal.primary_table(family),
        verdict=equal.verdict(family, PLACES, "AAJR's clean loss"),
        means=_means(config, rows),
        same_bound=_differences(config, rows, pairs_of(config, "spectral")),
        same_seconds=_differences(config, rows, [*pairs_of(config, "more"), *pairs_of(config, "none")]),
    )
