"""The page on the constraint: written before the runs, and drawn from their rows only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from common.pages import table
from common.plots import COLOURS, figure, save

from .. import summaries
from ..statistics import t_interval
from ..store import Row


def runs(rows: list[Row], followed: str, gamma: float) -> list[Row]:
    """At one bound, with λ that follows these images."""
    return [row for row in rows if (row["followed"], row["gamma"]) == (followed, gamma)]


def is_met(config: dict[str, Any], rows: list[Row], followed: str, gamma: float) -> bool:
    """Whether the held-out shares within a bound are those of the criterion of the page."""
    return is_as_required(config, runs(rows, followed, gamma), gamma == config["loose"])


def is_as_required(config: dict[str, Any], own: list[Row], is_loose: bool) -> bool:
    """The criterion, for the runs of all seeds under one bound."""
    allowed = config["tolerance"]
    shares = np.array([row["within_held_out"] for row in own])
    if is_loose:
        return all(row["binding"] == 0 for row in own) and bool((shares >= config["quantile"]).all())
    distance = abs(shares - config["quantile"])
    is_near = abs(shares.mean() - config["quantile"]) <= allowed["mean"]
    return bool(is_near and (distance <= allowed["run"]).all())


def _table(config: dict[str, Any], rows: list[Row], followed: str) -> str:
    lines = []
    for gamma in (*config["gammas"], config["loose"]):
        own = runs(rows, followed, gamma)
        shares = [100 * row["within_held_out"] for row in own]
        lines.append(
            [
                f"{gamma:g}",
                summaries.interval_text(t_interval(shares), 1, sign=False),
                f"{min(shares):.1f} to {max(shares):.1f}",
                f"{100 * np.mean([row['within_train'] for row in own]):.1f}",
                f"{np.mean([row['quantile_held_out'] for row in own]):.2f}",
                summaries.geometric_mean(own, "multiplier", ".2g"),
                summaries.share_of(own, lambda row: row["binding"] == 0),
                f"{np.mean([row['nominal'] for row in own]):.3f}",
                "yes" if is_met(config, rows, followed, gamma) else "**no**",
            ]
        )
    quantile = f"{config['quantile']:.0%} quantile of ‖J u‖, held out"
    return table(
        [
            *("γ", "held-out units within γ, %", "single runs, %", "training units within γ, %", quantile),
            *("λ at the end", "λ at its floor", "nominal loss", "as required"),
        ],
        lines,
    )


def _picture(config: dict[str, Any], rows: list[Row], path: Path) -> None:
    drawn, (shares, course) = figure(2, width=4.6, height=3.4)
    gammas, goal = (*config["gammas"], config["loose"]), 100 * config["quantile"]
    for place, (gamma, colour) in enumerate(zip(gammas, COLOURS)):
        for followed, shift, marker in (("validation", -0.2, "o"), ("training", 0.2, "x")):
            within = [100 * row["within_held_out"] for row in runs(rows, followed, gamma)]
            at = place + shift + np.linspace(-0.12, 0.12, len(within))
            label = f"λ follows {followed} images" if place == 0 else None
            shares.scatter(at, within, s=12, color=colour, marker=marker, label=label)
            shares.hlines(np.mean(within), place + shift - 0.17, place + shift + 0.17, color=colour)
        own = runs(rows, "validation", gamma)
        mean = np.mean([[100 * entry["violation"] for entry in row["path"]] for row in own], 0)
        course.plot([entry["step"] for entry in own[0]["path"]], mean, color=colour, label=f"γ = {gamma:g}")
    for half in config["tolerance"].values():
        shares.axhspan(goal - 100 * half, goal + 100 * half, color="black", alpha=0.06)
    shares.axhline(goal, color="black", linewidth=0.8)
    shares.set_xticks(range(len(gammas)), [f"{gamma:g}" for gamma in gammas])
    shares.set(xlabel="γ", ylabel="held-out units within γ, %", title="a point for every seed")
    course.axhline(100 - goal, color="black", linewidth=0.8)
    course.set(xlabel="step", ylabel="validation units above γ, %", title="mean over seeds")
    save(drawn, path)


def report(header: dict[str, Any], rows: list[Row], folder: Path) -> str:
    """The page; draws ``constraint.png`` into the folder."""
    config = header["config"]
    _picture(config, rows, folder / "constraint.png")
    parts, verdicts = {}, []
    for followed in config["followed"]:
        met = [is_met(config, rows, followed, gamma) for gamma in (*config["gammas"], config["loose"])]
        verdicts.append(f"{sum(met)} of {len(met)} bounds where λ follows {followed} images")
        parts[followed] = _table(config, rows, followed)
    return summaries.page(__file__, header, rows, verdict=", and at ".join(verdicts), **parts)
