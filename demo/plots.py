"""The two pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.texts import require

from .policy import HeldOut, LoraRun, MethodRow
from .scratch import ScratchConfig, ScratchRun

OURS, OTHER, THIRD = "#0b6e99", "#c8553d", "#8a8a8a"


def _figure(panels: int) -> tuple[Any, Any]:
    require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.3 * panels, 3.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def _smooth(values: Sequence[float], half: int) -> list[float]:
    """Mean over a window centred on each step."""
    spans = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(span) / len(span) for span in spans]


def policy_picture(
    path: Path, rows: Sequence[MethodRow], before: HeldOut, runs: Sequence[LoraRun], radius: float
) -> None:
    """Price and error of every method; the penalty over the LoRA steps; the held-out loss before and after."""
    figure, (methods, curve, bars) = _figure(3)
    plain = rows[0].seconds
    ticks = []
    for row in rows:
        if row.gradient_error is None:
            continue
        ours = row.method.startswith("ours")
        ticks.append(row.method.replace(", streamed", ",\nstreamed head"))
        methods.barh(len(ticks) - 1, row.gradient_error, color=OURS if ours else OTHER, height=0.62)
        label = f" {row.seconds / plain:.1f}x plain"
        methods.text(row.gradient_error * 1.1, len(ticks) - 1, label, va="center", fontsize=8.5)
    errors = [row.gradient_error for row in rows if row.gradient_error]
    methods.set(
        xscale="log",
        xlim=(min(errors) / 6, max(errors) * 30),
        xlabel="relative error of the penalty's gradient",
        title="Error, and time of one step",
    )
    methods.set_yticks(range(len(ticks)), ticks, fontsize=8.5)
    methods.invert_yaxis()
    methods.grid(axis="y", visible=False)

    for run in runs:
        if run.weight:
            curve.plot(range(len(run.penalty)), run.penalty, "o-", color=OURS, markersize=4)
    curve.set(
        xlabel="LoRA step", ylabel="Fisher penalty per sequence", title="Penalty on the training prompts"
    )
    curve.set_ylim(bottom=0)

    states = [("before", before)]
    states += [("replies and\npenalty" if run.weight else "replies\nalone", run.after) for run in runs]
    for i, (_, figures) in enumerate(states):
        rise = figures.attacked_loss - figures.loss
        bars.bar(i, figures.loss, color=THIRD, width=0.6, label="clean" if i == 0 else None)
        bars.bar(
            i,
            rise,
            bottom=figures.loss,
            color=OTHER,
            width=0.6,
            label=None if i else f"rise under an ascent step of {radius:g}",
        )
        bars.text(i, figures.attacked_loss, f"+{rise:.2f}", ha="center", va="bottom", fontsize=9)
    bars.set_xticks(range(len(states)), [name for name, _ in states])
    bars.set(ylabel="reply loss, nats per token", title="Held-out injections, by LoRA training")
    bars.set_ylim(top=1.3 * max(figures.attacked_loss for _, figures in states))
    bars.grid(axis="x", visible=False)
    bars.legend(frameon=False, fontsize=8.5, loc="upper right")
    figure.savefig(path)


def scratch_picture(path: Path, runs: Sequence[ScratchRun], config: ScratchConfig) -> None:
    """Training loss, sensitivity over training, and the loss under attack against its radius."""
    figure, (loss, size, attack) = _figure(3)
    for run in runs:
        color = OURS if run.weight else OTHER
        label = f"penalty, weight {run.weight:g}" if run.weight else "no penalty"
        loss.plot(range(1, len(run.loss) + 1), run.loss, color=color, alpha=0.25, linewidth=0.7)
        half = max(1, len(run.loss) // 50)
        loss.plot(range(1, len(run.loss) + 1), _smooth(run.loss, half), color=color, label=label)
        size.plot(*zip(*run.sensitivity, strict=True), "o-", color=color, markersize=3.5, label=label)
        attack.plot(config.radii, run.robust_loss, "o-", color=color, markersize=4, label=label)
    loss.set(xlabel="step", ylabel="training loss, nats per byte", title="Training on Shakespeare")
    size.set(
        xlabel="step",
        ylabel="Fisher sensitivity, nats per byte",
        yscale="log",
        title="Sensitivity along the ascent direction",
    )
    attack.set(
        xlabel="attack radius / mean embedding norm",
        ylabel="held-out loss, nats per byte",
        title="Held-out loss under attack",
    )
    attack.set_ylim(bottom=0)
    for axis in (loss, attack):
        axis.legend(frameon=False, fontsize=8.5)
    figure.savefig(path)
