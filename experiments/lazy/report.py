"""The page on lazy penalties: written before the runs, and drawn from their rows only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from common.pages import table
from common.plots import COLOURS, figure, save

from .. import summaries
from ..statistics import t_interval
from ..store import Row

PARTS = {"digits": "digits", "language": "byte-level language model"}
LOSSES = {"nominal": "nominal loss", "robust": "robust loss"}


def _values(rows: list[Row], part: str, every: int | None, name: str) -> list[float]:
    """Of all seeds, in their order."""
    own = [row for row in rows if (row["part"], row["every"]) == (part, every)]
    return [float(row[name]) for row in sorted(own, key=lambda row: row["seed"])]


def _table(config: dict[str, Any], rows: list[Row], part: str) -> str:
    """Means, paired differences from k = 1, and processor time."""
    at = lambda every, name: np.array(_values(rows, part, every, name))
    lines = []
    for every in (*config["every"], None):
        cells = [f"{at(every, name).mean():.3f}" for name in LOSSES]
        for name in LOSSES:
            difference = t_interval(at(every, name) - at(1, name)) if every != 1 else None
            cells.append(summaries.interval_text(difference))
        ratio = t_interval(at(every, "seconds_per_step") / at(1, "seconds_per_step")) if every != 1 else None
        cells += [
            f"{1000 * at(every, 'seconds_per_step').mean():.1f}",
            "1" if ratio is None else summaries.interval_text(ratio, 2, sign=False),
        ]
        lines.append([every or "no penalty", *cells])
    header = ["k", *LOSSES.values(), *(f"{loss} − that at k = 1" for loss in LOSSES.values())]
    return table([*header, "ms per step", "share of k = 1"], lines)


def _picture(config: dict[str, Any], rows: list[Row], path: Path) -> None:
    drawn, panels = figure(len(PARTS), width=4.4, height=3.4)
    for axis, (part, title) in zip(panels, PARTS.items()):
        for (name, label), colour in zip(LOSSES.items(), COLOURS):
            intervals = [t_interval(_values(rows, part, k, name)) for k in config["every"]]
            means, low, high = np.array(intervals).T
            axis.errorbar(
                config["every"],
                means,
                [means - low, high - means],
                fmt="o-",
                color=colour,
                capsize=3,
                label=label,
            )
            without = float(np.mean(_values(rows, part, None, name)))
            axis.axhline(without, color=colour, linestyle=":", linewidth=1, label=f"{label}, no penalty")
        axis.set_xscale("log", base=2)
        axis.set_xticks(config["every"], [str(k) for k in config["every"]])
        axis.set(xlabel="k, penalty on every k-th step with k·λ", ylabel="nats", title=title)
    save(drawn, path)


def report(header: dict[str, Any], rows: list[Row], folder: Path) -> str:
    """The page; draws ``lazy.png`` into the folder."""
    config = header["config"]
    _picture(config, rows, folder / "lazy.png")
    digits, language = (_table(config, rows, part) for part in PARTS)
    return summaries.page(__file__, header, rows, digits=digits, language=language)
