"""The page on curvature, drawn from the rows only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from common.pages import table
from common.plots import COLOURS, figure, save

from ..statistics import t_interval
from ..store import Row
from ..summaries import interval_text, page

NAMES = {
    "none": "none",
    "frobenius": "global Frobenius",
    "spectral": "global spectral",
    "aajr-l2": "AAJR, l2",
    "aajr-fisher": "AAJR, Fisher",
}
#: quantity of a report -> its heading
COLUMNS = {
    "kappa_positive": "κ⁺",
    "kappa": "κ⁻",
    "kappa_positive_max": "largest κ⁺",
    "kappa_max": "largest κ⁻",
    "gauss_newton": "first term",
    "second_order": "second term",
    "smoothness": "L_eff",
    "expansion": "expansion",
}


def _values(rows: list[Row], name: str) -> list[float]:
    return [row[name] for row in rows]


def _interval(values: list[float]) -> str:
    low, high = (f"{value:.3g}" for value in t_interval(values)[1:])
    return f"{np.mean(values):.3g} [{low}, {high}]".replace("-", "−")


def _digits(rows: list[Row]) -> str:
    lines = []
    for method, name in NAMES.items():
        own = [row for row in rows if row["method"] == method]
        cells = [_interval(_values(own, column)) for column in COLUMNS]
        lines.append([name, f"{np.mean(_values(own, 'nominal')):.3f}", *cells])
    return table(["method", "nominal loss", *COLUMNS.values()], lines)


def _language(rows: list[Row]) -> str:
    """Curvatures for lengths in norms of a token."""
    scaled = {
        name: [row[name] * (1 if name == "expansion" else row["token_norm"] ** 2) for row in rows]
        for name in COLUMNS
    }
    return table(list(COLUMNS.values()), [[_interval(scaled[name]) for name in COLUMNS]])


def _sensitivities(rows: list[Row]) -> str:
    """For lengths in norms of a token, and as shares of the last one."""
    names = {
        "q_taken": 'of the step that led there, per token (`steps="worst"`)',
        "q_token": "the gradient at the point, per token",
        "q_sequence": "the gradient at the point, over the sequence",
    }
    lines = []
    for name, heading in names.items():
        values = [row[name] * row["token_norm"] ** 2 for row in rows]
        shares = [row[name] / row["q_sequence"] for row in rows]
        lines.append([heading, _interval(values), interval_text(t_interval(shares), 2, sign=False)])
    return table(["direction v at the worst point", "‖Jv‖², ‖v‖ = 1", "share of the last"], lines)


def _picture(rows: list[Row], path: Path) -> None:
    drawn, (axis,) = figure(1, width=5.6, height=3.4)
    for place, (name, label) in enumerate((("kappa_positive", "κ⁺"), ("kappa", "κ⁻"))):
        means = [np.mean([row[name] for row in rows if row["method"] == method]) for method in NAMES]
        at = np.arange(len(NAMES)) + 0.38 * (place - 0.5)
        axis.bar(at, means, 0.36, color=COLOURS[place], label=f"{label}, mean over steps and images")
        for x, mean in zip(at, means):
            axis.text(x, mean, f"{mean:.2g}", ha="center", va="bottom", fontsize=7)
    axis.set_xticks(range(len(NAMES)), [name.replace(" ", "\n") for name in NAMES.values()], fontsize=8)
    axis.set(ylabel="curvature along the ascent", yscale="log")
    save(drawn, path)


def report(header: dict[str, Any], rows: list[Row], folder: Path) -> str:
    """The page; draws ``curvature.png`` into the folder."""
    digits, language = ([row for row in rows if row["part"] == part] for part in ("digits", "language"))
    _picture(digits, folder / "curvature.png")
    return page(
        *(__file__, header, rows),
        digits=_digits(digits),
        language=_language(language),
        sensitivities=_sensitivities(language),
        cost=_interval(_values(language, "cost")),
    )
