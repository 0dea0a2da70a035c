"""The two pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.plots import COLOURS, figure, save

from .policy import HeldOut, LoraRun, MethodRow
from .scratch import ScratchConfig, ScratchRun

OURS, OTHER = COLOURS[:2]


def policy_picture(
    path: Path, rows: Sequence[MethodRow], before: HeldOut, runs: Sequence[LoraRun], radius: float
) -> None:
    """Price and error of every method; the penalty over the LoRA steps; the held-out loss before and after."""
    drawn, (methods, curve, bars) = figure(3, width=4.3)
    judged = [(row, row.gradient_error) for row in rows if row.gradient_error]
    for place, (row, error) in enumerate(judged):
        colour = OURS if row.method.startswith("ours") else OTHER
        methods.barh(place, error, color=colour, height=0.62)
        label = f" {row.seconds / rows[0].seconds:.1f}x plain"
        methods.text(error * 1.1, place, label, va="center", fontsize=8.5)
    names = [row.method.replace(", streamed", ",\nstreamed head") for row, _ in judged]
    methods.set_yticks(range(len(names)), names, fontsize=8.5)
    errors = [error for _, error in judged]
    methods.set(xscale="log", xlim=(min(errors) / 6, max(errors) * 30), title="Error, and time of one step")
    methods.set_xlabel("relative error of the penalty's gradient")
    methods.invert_yaxis()
    methods.grid(axis="y", visible=False)

    for run in runs:
        if run.weight:
            curve.plot(range(len(run.penalty)), run.penalty, "o-", color=OURS, markersize=4)
    curve.set(
        xlabel="LoRA step", ylabel="Fisher penalty per sequence", title="Penalty on the training prompts"
    )
    curve.set_ylim(bottom=0)

    states = {"before": before, **{run.name: run.after for run in runs}}
    for place, figures in enumerate(states.values()):
        rise, first = figures.attacked_loss - figures.loss, place == 0
        bars.bar(place, figures.loss, color="#8a8a8a", width=0.6, label="clean" if first else None)
        under = f"rise under an ascent step of {radius:g}" if first else None
        bars.bar(place, rise, bottom=figures.loss, color=OTHER, width=0.6, label=under)
        bars.text(place, figures.attacked_loss, f"+{rise:.2f}", ha="center", va="bottom", fontsize=9)
    bars.set_xticks(range(len(states)), list(states), fontsize=8.5)
    bars.set(ylabel="reply loss, nats per token", title="Held-out injections, by LoRA training")
    bars.set_ylim(top=1.3 * max(figures.attacked_loss for figures in states.values()))
    bars.grid(axis="x", visible=False)
    save(drawn, path)


def scratch_picture(path: Path, runs: Sequence[ScratchRun], config: ScratchConfig) -> None:
    """Training loss, sensitivity over training, and the loss under attack against its radius."""
    drawn, (loss, size, attack) = figure(3, width=4.3)
    for run in runs:
        colour, half = OURS if run.weight else OTHER, max(1, len(run.loss) // 50)
        steps = range(1, len(run.loss) + 1)
        windows = [run.loss[max(0, step - 1 - half) : step + half] for step in steps]
        loss.plot(steps, run.loss, color=colour, alpha=0.25, linewidth=0.7)
        loss.plot(steps, [sum(window) / len(window) for window in windows], color=colour, label=run.name)
        size.plot(*zip(*run.sensitivity, strict=True), "o-", color=colour, markersize=3.5)
        attack.plot(config.radii, run.robust_loss, "o-", color=colour, markersize=4, label=run.name)
    loss.set(xlabel="step", ylabel="training loss, nats per byte", title="Training on Shakespeare")
    size.set(xlabel="step", ylabel="Fisher sensitivity, nats per byte", yscale="log")
    size.set_title("Sensitivity along the ascent direction")
    attack.set(xlabel="attack radius / mean embedding norm", ylabel="held-out loss, nats per byte")
    attack.set_title("Held-out loss under attack")
    attack.set_ylim(bottom=0)
    save(drawn, path)
