"""Figures without a display, in one style."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aajr_kernels.files import replace

#: distinguishable with colour blindness (Okabe and Ito)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def figure(panels: int = 1, width: float = 4.6, height: float = 3.6) -> tuple[Any, list[Any]]:
    """A figure of matplotlib with panels side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width * panels, height), layout="constrained", dpi=150)
    FigureCanvasAgg(made)
    axes = list(made.subplots(1, panels, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
    return made, axes


def save(made: Any, path: Path) -> None:
    """Write a PNG, with a legend wherever something has a label.

    Without the date and the version, so that the same rows give the same file.
    """
    for axis in made.axes:
        axis.title.set_fontsize(9)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, frameon=False)
    replace(path, lambda file: made.savefig(file, metadata={"Software": None}))
