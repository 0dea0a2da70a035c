"""The page on a shared context, drawn from the rows only."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from common.pages import table
from common.plots import COLOURS, figure, save

from .. import summaries
from ..store import Row

LOSSES = {
    "attack_start": "loss without an attack",
    "adversarial_loss": "loss at the worst point",
    "penalty": "penalty",
}
NAMES = {False: "at every point", True: "context shared"}


def of(rows: list[Row], shared: bool, name: str) -> list[float]:
    """Values of a training, by step."""
    own = [row for row in rows if row["shared"] == shared]
    return [float(row[name]) for row in sorted(own, key=lambda row: row["step"])]


def largest_difference(rows: list[Row], name: str) -> float:
    """Of the two trainings over all steps, relative to the one without sharing."""
    return max(abs(a - b) / abs(b) for a, b in zip(of(rows, True, name), of(rows, False, name)))


def ratio(rows: list[Row], name: str) -> float:
    """Seconds of a step with a shared context over those without: minima over the steps after the first."""
    return min(of(rows, True, name)[1:]) / min(of(rows, False, name)[1:])


def _seconds(rows: list[Row]) -> str:
    lines = []
    for shared, label in NAMES.items():
        cells = []
        for name in ("wall_seconds", "processor_seconds"):
            values = of(rows, shared, name)[1:]
            cells += [f"{min(values):.2f}", f"{statistics.median(values):.2f}"]
        lines.append([label, *cells])
    quotients = [f"**{ratio(rows, name):.2f}**" for name in ("wall_seconds", "processor_seconds")]
    medians = [
        f"{statistics.median(of(rows, True, name)[1:]) / statistics.median(of(rows, False, name)[1:]):.2f}"
        for name in ("wall_seconds", "processor_seconds")
    ]
    lines.append(["shared ÷ at every point", quotients[0], medians[0], quotients[1], medians[1]])
    return table(["", "s, minimum", "s, median", "processor s, minimum", "processor s, median"], lines)


def _losses(rows: list[Row]) -> str:
    lines = []
    for name, label in LOSSES.items():
        values = of(rows, False, name)
        lines.append(
            [label, f"{values[0]:.4g}", f"{values[-1]:.4g}", f"{largest_difference(rows, name):.0e}"]
        )
    return table(["", "first step", "last step", "largest relative difference"], lines)


def report(header: dict[str, Any], rows: list[Row], folder: Path) -> str:
    """The page; draws ``shared-context.png`` into the folder."""
    drawn, panels = figure(2, width=4.0, height=3.0)
    for colour, (shared, label) in zip(COLOURS, NAMES.items()):
        mark = "o-" if shared else "s--"
        for axis, name in zip(panels, ("processor_seconds", "adversarial_loss")):
            values = of(rows, shared, name)
            axis.plot(range(1, len(values) + 1), values, mark, color=colour, label=label, markersize=4)
    panels[0].set(xlabel="step", ylabel="processor seconds", title="time", ylim=(0, None))
    panels[1].set(xlabel="step", ylabel="nats per token", title="loss at the worst point")
    save(drawn, folder / "shared-context.png")
    lengths = sorted({row["length"] for row in rows})
    start, weights = rows[0]["context"], rows[0]["weights"]
    facts = {
        "model": "SmolLM2-135M"
        if header["config"]["model"] == "smollm2"
        else "a small stand-in for SmolLM2-135M",
        "weights": {"pretrained": "its pretrained weights", "random": "random weights, for want of its own"}[
            weights
        ],
        "start": start,
        "lengths": f"{lengths[0]} to {lengths[-1]}" if len(lengths) > 1 else f"{lengths[0]}",
        "share": f"{sum(start / row['length'] for row in rows) / len(rows):.0%}",
    }
    return summaries.page(
        __file__, header, rows, seconds_table=_seconds(rows), losses_table=_losses(rows), **facts
    )
