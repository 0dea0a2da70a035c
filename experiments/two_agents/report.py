"""The page on two agents: written before the runs, and drawn from their rows only."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common.pages import table
from common.plots import figure, save

from .. import summaries
from ..store import Row
from ..summaries import Comparison, Quantity, entry
from .training import METHODS

#: w and γ; γ is None without a bound
Setting = tuple[float, float | None]


def damage(part: str) -> Callable[[Row], float]:
    """The clean payoff less the robust one, on ``"validation"`` or ``"test"`` games: what the attack takes."""
    return lambda row: row[part]["joint"] - row[part]["robust_joint"]


COMPARISON = Comparison(
    names={"none": "none", "spectral": "global spectral", "aligned": "AAJR, joint"},
    pairs=[("aligned", "none"), ("aligned", "spectral")],
    quantities={
        "falls": Quantity("falling inner steps, %", entry("falls", factor=100), 2, True, 0.25),
        "damage": Quantity("damage", damage("test"), 4, True, 0.005),
        "joint": Quantity("clean joint payoff", entry("test", "joint")),
        "robust": Quantity("robust joint payoff", entry("test", "robust_joint")),
        "share": Quantity("share of the optimum", entry("test", "share")),
        "falls_after": Quantity("falling after, %", entry("test", "falls", factor=100), 2),
        "kappa": Quantity("κ after", entry("test", "kappa"), 4),
        "variance": Quantity("variance × 100", entry("variance", factor=100)),
        "tail": Quantity("gradient tail", entry("tail"), 1),
    },
)


def settings(rows: list[Row], method: str) -> dict[Setting, list[Row]]:
    """The runs of every w and γ, from the loosest bound to the tightest."""
    own: dict[Setting, list[Row]] = {}
    for row in rows:
        if row["method"] == method:
            own.setdefault((row["w"], row["gamma"]), []).append(row)
    return dict(sorted(own.items(), key=lambda pair: (pair[0][0], -(pair[0][1] or math.inf))))


def mean_of(own: list[Row], value: Callable[[Row], float | None]) -> float:
    """Over seeds; NaN where a run broke off."""
    return (
        float(np.mean([value(row) or 0.0 for row in own])) if all(row["finite"] for row in own) else math.nan
    )


def away(config: dict[str, Any], rows: list[Row], own: list[Row]) -> float:
    """The mean clean validation payoff of a setting over the target, less 1.

    The target is that of training without a bound at the largest w.
    """
    clean = entry("validation", "joint")
    target = mean_of(settings(rows, "none")[max(config["unbounded"]), None], clean)
    return mean_of(own, clean) / target - 1


def chosen(config: dict[str, Any], rows: list[Row], method: str) -> Setting:
    """w and γ of a method: of those that match the target within ``tolerance``, the one of the least validation damage.

    If none matches, the nearest one. Means over seeds; a setting with a run that broke off is left out.
    """
    distances = {
        setting: distance
        for setting, own in settings(rows, method).items()
        if not math.isnan(distance := abs(away(config, rows, own)))
    }
    matched = [setting for setting, distance in distances.items() if distance <= config["tolerance"]]
    if not matched:
        return min(distances, key=lambda setting: distances[setting])
    own = settings(rows, method)
    return min(matched, key=lambda setting: mean_of(own[setting], damage("validation")))


def with_choice(config: dict[str, Any], rows: list[Row]) -> list[Row]:
    """The rows, those of the chosen settings marked."""
    picked = {method: chosen(config, rows, method) for method in METHODS}
    return [row | {"chosen": (row["w"], row["gamma"]) == picked[row["method"]]} for row in rows]


def _settings_table(config: dict[str, Any], rows: list[Row]) -> str:
    lines = []
    for method, name in COMPARISON.names.items():
        picked = chosen(config, rows, method)
        for (w, gamma), own in settings(rows, method).items():
            bounded = gamma is not None and all(row["finite"] for row in own)
            lines.append(
                [
                    name,
                    f"{w:g}",
                    "-" if gamma is None else f"{gamma:g}",
                    f"{mean_of(own, entry('validation', 'joint')):.3f}",
                    f"{away(config, rows, own):+.1%}".replace("-", "−"),
                    f"{mean_of(own, damage('validation')):.4f}",
                    f"{mean_of(own, entry('falls', factor=100)):.2f}",
                    f"{mean_of(own, entry('within')):.1%}" if bounded else "-",
                    summaries.geometric_mean(own, "multiplier", ".2g") if bounded else "-",
                    summaries.share_of(own, lambda row: row["collapsed"]),
                    "**chosen**" if (w, gamma) == picked else "",
                ]
            )
    heads = ["clean payoff", "against the target", "damage", "falling inner steps, %", "within γ", "λ"]
    return table(["method", "w", "γ", *heads, "collapsed", ""], lines)


def matching(config: dict[str, Any], rows: list[Row]) -> str:
    """Whether the payoffs are matched and γ is bracketed, in words."""
    sentences = []
    for method, name in COMPARISON.names.items():
        w, gamma = chosen(config, rows, method)
        own = settings(rows, method)
        distance = away(config, rows, own[w, gamma])
        is_matched = abs(distance) <= config["tolerance"]
        sentence = f"{name}: w = {w:g}" + ("" if gamma is None else f", γ = {gamma:g}")
        sentence += f", {distance:+.1%} of the target{'' if is_matched else ' (**not matched**)'}"
        if gamma is not None:
            tighter = [away(config, rows, own[key]) for key in own if key[0] == w and (key[1] or 0) < gamma]
            is_inside = any(value < -config["tolerance"] for value in tighter)
            sentence += (
                ", a tighter γ costs more" if is_inside else ", no tighter γ that was tried costs more"
            )
        sentences.append(sentence.replace("-", "−"))
    return "; ".join(sentences) + "."


def _play(rows: list[Row]) -> str:
    """How far sampled play was from the exact expectation, in standard errors."""
    plays = [row["test"]["play"] for row in rows if row["finite"]]
    distances = [abs(p["played"] - p["expected"]) / p["error"] for p in plays if p["error"] > 0]
    return (
        f"In the environment the mean sum of payoffs of {len(distances)} pairs was {np.mean(distances):.2f} standard "
        f"errors from the exact expectation on average ({np.sqrt(2 / np.pi):.2f} is the mean of a normal variable's "
        f"size), at most {max(distances):.2f}."
    )


def _picture(config: dict[str, Any], rows: list[Row], marked: list[Row], path: Path) -> None:
    """Damage against clean payoff of all settings, and both primary differences."""
    drawn, axes = figure(3, width=4.2, height=3.4)
    for method, name in COMPARISON.names.items():
        own, picked = settings(rows, method), chosen(config, rows, method)
        for setting, runs in own.items():
            at = [100 * away(config, rows, runs), mean_of(runs, damage("validation"))]
            is_picked = setting == picked
            axes[0].scatter(
                *at,
                s=90 if is_picked else 30,
                color=COMPARISON.colours[method],
                edgecolors="black" if is_picked else "none",
                label=name if is_picked else None,
                zorder=3 if is_picked else 2,
            )
    tolerance = 100 * config["tolerance"]
    axes[0].axvspan(-tolerance, tolerance, color="black", alpha=0.06)
    axes[0].set(
        xlabel="clean payoff against the target, %",
        ylabel="damage: payoff that the attack takes",
        title="all w and γ; outlined: compared",
    )
    for axis, name in zip(axes[1:], ("damage", "falls")):
        quantity = COMPARISON.quantities[name]
        assert quantity.margin is not None
        axis.axvspan(-quantity.margin, quantity.margin, color="black", alpha=0.06)
        COMPARISON.forest(axis, marked, [name])
        axis.locator_params(axis="x", nbins=5)
        axis.set(xlabel=f"difference of {quantity.heading}", title="95 % intervals; left: AAJR is better")
    save(drawn, path)


def report(header: dict[str, Any], rows: list[Row], folder: Path) -> str:
    """The page; draws ``two-agents.png`` into the folder."""
    config = header["config"]
    marked = with_choice(config, rows)
    _picture(config, rows, marked, folder / "two-agents.png")
    columns = {quantity.heading: quantity.mean for quantity in COMPARISON.quantities.values()}
    return summaries.page(
        *(__file__, header, rows),
        total=1 + config["game"]["regard"],
        token=config["model"]["width"] ** 0.5,
        percent=100 * config["tolerance"],
        pairs=", ".join(f"({w:g}, {gamma:g})" for w, gamma in config["bounded"]),
        matching=matching(config, rows),
        settings=_settings_table(config, rows),
        means=summaries.by_method(COMPARISON.names, marked, columns),
        primaries=COMPARISON.primary_table(marked),
        differences=COMPARISON.differences(marked),
        play=_play(rows),
    )
