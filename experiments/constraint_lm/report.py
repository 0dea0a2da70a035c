"""The page on the constraint for a language model: written before the runs, and drawn from their rows only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from common.pages import table
from common.plots import COLOURS, figure, save

from .. import summaries
from ..constraint.report import is_as_required
from ..statistics import t_interval
from ..store import Row


def _runs(rows: list[Row], share: float) -> list[Row]:
    return [row for row in rows if row["share"] == share]


def _table(config: dict[str, Any], rows: list[Row]) -> str:
    lines = []
    for share in (*config["shares"], config["loose"]):
        own = _runs(rows, share)
        within = [100 * row["within_held_out"] for row in own]
        lines.append(
            [
                f"{share:g}",
                f"{np.mean([row['gamma'] for row in own]):.2f}",
                summaries.interval_text(t_interval(within), 1, sign=False),
                f"{min(within):.1f} to {max(within):.1f}",
                f"{np.mean([row['quantile_held_out'] / row['gamma'] for row in own]):.2f}",
                summaries.geometric_mean(own, "multiplier", ".2g"),
                summaries.share_of(own, lambda row: row["binding"] == 0),
                f"{np.mean([row['loss'] for row in own]):.3f}",
                "yes" if is_as_required(config, own, share == config["loose"]) else "**no**",
            ]
        )
    return table(
        [
            *("γ, of the quantile at the start", "γ, mean", "held-out units within γ, %", "single runs, %"),
            *(f"{config['quantile']:.0%} quantile of √q over γ, held out", "λ at the end", "λ at its floor"),
            *("loss of the last ten steps", "as required"),
        ],
        lines,
    )


def _picture(config: dict[str, Any], rows: list[Row], path: Path) -> None:
    drawn, (shares, course) = figure(2, width=4.6, height=3.4)
    bounds, goal = (*config["shares"], config["loose"]), 100 * config["quantile"]
    for place, (share, colour) in enumerate(zip(bounds, COLOURS)):
        own = _runs(rows, share)
        within = [100 * row["within_held_out"] for row in own]
        shares.scatter(place + np.linspace(-0.2, 0.2, len(within)), within, s=12, color=colour)
        shares.hlines(np.mean(within), place - 0.3, place + 0.3, color=colour)
        mean = np.mean([[100 * entry["violation"] for entry in row["path"]] for row in own], 0)
        label = f"γ = {share:g} of the start"
        course.plot([entry["step"] for entry in own[0]["path"]], mean, color=colour, label=label)
    for half in config["tolerance"].values():
        shares.axhspan(goal - 100 * half, goal + 100 * half, color="black", alpha=0.06)
    shares.axhline(goal, color="black", linewidth=0.8)
    shares.set_xticks(range(len(bounds)), [f"{share:g}" for share in bounds])
    shares.set(
        xlabel="γ, of the quantile at the start",
        ylabel="held-out units within γ, %",
        title="a point for every seed",
    )
    course.axhline(100 - goal, color="black", linewidth=0.8)
    course.set(xlabel="step", ylabel="validation units above γ, %", title="mean over seeds")
    course.legend(frameon=False, fontsize="small")
    save(drawn, path)


def report(header: dict[str, Any], rows: list[Row], folder: Path) -> str:
    """The page; draws ``constraint-lm.png`` into the folder."""
    config = header["config"]
    _picture(config, rows, folder / "constraint-lm.png")
    bounds = (*config["shares"], config["loose"])
    met = [is_as_required(config, _runs(rows, share), share == config["loose"]) for share in bounds]
    verdict = f"{sum(met)} of {len(met)} bounds"
    return summaries.page(__file__, header, rows, verdict=verdict, bounds=_table(config, rows))
