"""Picture of an evaluation; the only module of this package that needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...files import one_line, replace

__all__ = ["draw"]

#: distinguishable with colour blindness (Okabe and Ito)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def draw(evaluation: Any, path: Path, level: float) -> None:
    """Write the picture of an :class:`Evaluation` to `path`, in the format of its ending."""
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}):  # names of attacks are no formulas
        _draw(evaluation, path, level)


def _draw(evaluation: Any, path: Path, level: float) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    bars, lines = figure.subplots(1, 2)
    entries = evaluation.summary(level)
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(evaluation.attacked)}
    for place, entry in enumerate(reversed(entries)):
        mean, low, high = entry["loss"]
        bars.barh(place, mean, color=colours.get(entry["name"], "#888888"), height=0.6)
        if low is not None:
            bars.plot([low, high], [place, place], color="black", linewidth=1.2)
    bars.set_yticks(range(len(entries)), [one_line(entry["name"]) for entry in reversed(entries)])
    interval = f", {level:.0%} intervals" if len(evaluation.clean) > 1 else ""
    bars.set(xlabel="mean loss", title=f"{len(evaluation.clean)} rows{interval}")
    for name, curve in evaluation.curves.items():
        means = curve.mean(-1).tolist()
        steps = [step / max(len(means) - 1, 1) for step in range(len(means))]
        label = f"{one_line(name)} ({len(means) - 1})"
        lines.plot(steps, means, marker="o", markersize=3, color=colours[name], label=label)
    lines.set(
        xlabel="share of the steps or replacements (their number)",
        ylabel="mean loss",
        title="Along the attacks",
    )
    for axis in (bars, lines):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.title.set_fontsize(9)
    if evaluation.curves:
        lines.legend(fontsize=7, frameon=False)
    # without date and version: the same numbers give the same file
    options: dict[str, Any] = {"metadata": {"Software": None}} if path.suffix == ".png" else {}
    replace(path, lambda file: figure.savefig(file, **options))
