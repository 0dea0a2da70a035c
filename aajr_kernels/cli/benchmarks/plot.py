"""Pictures from rows: what a step costs against the length of the sequence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .row import Row

#: variant -> colour; a picture holds those of them that the rows have
COLOURS = {
    "exact, fused": "#0b6e4f",
    "exact": "#6fb98f",
    "plain, our primal ops": "#3a6ea5",
    "finite differences": "#c1666b",
    "torch.func.jvp": "#8d6a9f",
}


def latest(rows: Sequence[Row]) -> list[Row]:
    """Of rows that measure the same, the last one."""
    newest = {
        (row.suite, row.family, row.dtype, row.length, row.variant, row.device, row.torch_capability): row
        for row in rows
    }
    return list(newest.values())


def plot_steps(rows: Sequence[Row], path: Path) -> None:
    """Ratio to the plain step against S, one panel per model and dtype.

    Args:
        rows: of suite `step`; among those that measure the same the last counts.
        path: picture to write; its suffix decides the format.

    Raises:
        ValueError: there is no step ratio among the rows.
    """
    chosen = [
        r for r in latest(rows) if r.suite == "step" and r.family in ("llama", "gpt2") and r.ratio is not None
    ]
    panels = sorted(
        {(r.family, r.dtype, r.torch_capability) for r in chosen}, key=lambda p: (p[0] != "llama", p)
    )
    if not panels:
        raise ValueError("no row has the ratio of a step: run `aajr bench step --rows FILE` first.")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.6 + 3.4 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, panel in zip(axes, panels):
        inside = [r for r in chosen if (r.family, r.dtype, r.torch_capability) == panel]
        for variant, colour in COLOURS.items():
            line = sorted((r.length, r.ratio) for r in inside if r.variant == variant and r.ratio is not None)
            if line:
                axis.plot(*zip(*line), "o-", color=colour, label=variant, linewidth=1.6, markersize=4)
        axis.axhline(1.0, color="#777777", linewidth=0.8)
        lengths = sorted({r.length for r in inside})
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [str(n) for n in lengths])
        axis.minorticks_off()
        axis.set_title(" ".join(panel), fontsize=9)
        axis.set_xlabel("S")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("time ÷ plain step")
    found = dict(reversed(pair) for a in axes for pair in zip(*a.get_legend_handles_labels()))
    figure.legend(found.values(), found.keys(), loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=160)
