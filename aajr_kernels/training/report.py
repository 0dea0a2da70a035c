"""The end of a training: one page, one figure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import files
from .record import Row

__all__ = ["write_report"]

#: panels of the figure: title, unit, series
PANELS = (
    ("loss", "nats per token", ("clean_loss", "attack_start", "adversarial_loss", "attack_worst")),
    ("anchor", "nats per token", ("anchor",)),
    ("penalty", "mean q", ("penalty",)),
    ("units above γ", "share", ("violation",)),
    ("multiplier", "λ", ("multiplier",)),
    ("attack", "gain in nats", ("gain",)),
    ("gradient", "norm", ("gradient_norm",)),
)
#: parts of the work that are left out where they do not count, as rows name them after ``computed_``
PARTS = {
    "tokens": "the tokens in the head",
    "positions": "the positions of these forwards",
    "arithmetic": "the forward arithmetic of all of them",
}
#: by how much the share of units above γ may exceed what is allowed in a constraint that counts as met
TOLERANCE = 0.02
#: numbers of the first table
NUMBERS = (
    "loss clean_loss attack_start adversarial_loss anchor gain penalty active q_max multiplier violation binding "
    "second_order infeasible"
).split()


def write_report(
    folder: Path, rows: list[Row], config: Mapping[str, Any], unshared: str | None = None
) -> Path:
    """Write ``report.md``, and ``report.png`` if matplotlib is there; the path of the page.

    Args:
        folder: of the training.
        rows: of ``metrics.jsonl``.
        config: described.
        unshared: why a context was not shared, or None.
    """
    train = [_with_gain(row) for row in rows if "loss" in row]
    evaluations = [row for row in rows if any(name.startswith("eval/") for name in row)]
    lines = ["# Training", ""]
    if train:
        lines += [*_numbers(train), "", *_computed(train, config, unshared)]
        if _figure(train, folder / "report.png", _allowed(config)):
            lines += ["", "![Losses, penalty, attack and gradient over the steps](report.png)"]
        else:
            lines += ["", "No figure: `pip install 'aajr_kernels[train]'` brings matplotlib."]
    if evaluations:
        names = sorted({name for row in evaluations for name in row if name.startswith("eval/")})
        table = [[str(row["step"]), *(_short(row.get(name)) for name in names)] for row in evaluations]
        lines += ["", "## Evaluations", "", *_table(["step", *(name[5:] for name in names)], table)]
    lines += ["", "## Configuration", "", "```json", json.dumps(config, indent=1), "```", ""]
    page = folder / "report.md"
    files.write_text(page, "\n".join(lines))
    return page


def _numbers(train: list[Row]) -> list[str]:
    """First, last and mean of what is worth a line; the tenth at either end, for single steps are noisy."""
    tenth = max(len(train) // 10, 1)
    seconds = [row["seconds"] for row in train]
    table = [
        [name, _mean(train[:tenth], name), _mean(train[-tenth:], name)]
        for name in NUMBERS
        if any(row.get(name) is not None for row in train)
    ]
    return [
        f"{train[-1]['step']} steps, {train[-1]['skipped']} of them skipped because something was not finite; "
        f"{sorted(seconds)[len(seconds) // 2]:.3g} seconds per step (median), {sum(r['tokens'] for r in train)} tokens "
        f"in {len(train)} logged steps.",
        "",
        *_table(["", f"first {tenth}", f"last {tenth}"], table),
    ]


def _computed(train: list[Row], config: Mapping[str, Any], unshared: str | None) -> list[str]:
    """Which steps and positions the attack and the penalty computed."""
    attacked = [row for row in train if row.get("attack_start") is not None]
    penalised = sum(row.get("penalty") is not None for row in train)
    settings = config.get("objective", {}).get("penalty", {})
    lines = [
        f"Of {len(train)} logged steps {len(attacked)} had an attack and {penalised} a penalty"
        + (
            f", on {settings['rows']:.0%} of the rows drawn at random."
            if settings.get("rows", 1) < 1
            else "."
        )
    ]
    if seconds := _lazy_seconds(train, settings.get("every", 1)):
        lines.append(seconds)
    shares = [row.get("shared") or 0.0 for row in attacked]
    if any(shares):
        mean = math.fsum(shares) / len(shares)
        lines.append(
            f"A shared context: {mean:.1%} of the positions (mean of the attacked steps) were computed once, the other "
            f"{1 - mean:.1%} at every forward of the attack and for the penalty."
        )
    parts = [
        f"{_mean_share(attacked, f'computed_{part}')} of {words}"
        for part, words in PARTS.items()
        if any((row.get(f"computed_{part}") or 1.0) < 1.0 for row in attacked)
    ]
    if parts:
        lines.append(
            f"Computed in the attacked steps (mean): {', '.join(parts)}. Arithmetic is modelled by count; no step was "
            "timed without these savings."
        )
    allowed = _allowed(config)
    if allowed is not None:
        lines.append(_constraint(train, config, allowed))
    if unshared is not None:
        lines.append(f"A context was not shared: {files.markdown(unshared)}")
    return lines


def _lazy_seconds(train: list[Row], every: int) -> str | None:
    """Measured seconds of a penalty on every k-th step, where rows of both kinds of steps were logged."""
    kinds: tuple[list[float], list[float]] = ([], [])
    for row in train:
        if row["radius"] > 0:  # before, no step is attacked
            kinds[row.get("penalty") is not None].append(row["seconds"])
    if every == 1 or not all(kinds):
        return None
    without, with_it = (sorted(seconds)[len(seconds) // 2] for seconds in kinds)
    mean = (with_it + (every - 1) * without) / every
    return (
        f"A step with the penalty took {with_it:.3g} seconds, one without {without:.3g} (medians): with every={every} "
        f"{mean / with_it:.2f} of the time of a penalty on all steps."
    )


def _mean_share(rows: list[Row], name: str) -> str:
    values = [row[name] for row in rows if row.get(name) is not None]
    return f"{math.fsum(values) / len(values):.1%}"


def _allowed(config: Mapping[str, Any]) -> float | None:
    """Share of the units that may be above γ; None without a constraint."""
    quantile = config.get("objective", {}).get("penalty", {}).get("quantile")
    return None if quantile is None else 1 - quantile


def _constraint(train: list[Row], config: Mapping[str, Any], allowed: float) -> str:
    """Whether it was met, in the last row that says so."""
    last = next((row for row in reversed(train) if row.get("violation") is not None), None)
    if last is None:
        return "The constraint was never measured: γ or the first loss was not found."
    state = "above its floor: γ binds" if last["binding"] else "at its floor: γ does not bind"
    met = "met" if last["violation"] <= allowed + TOLERANCE else "not met"
    penalty = config["objective"]["penalty"]
    units, step_size = "units were above γ", penalty.get("step_size")
    if step_size:
        units = f"steps of the ascents had a smoothness above 1/η = {1 / step_size:.4g}"
    where = "held-out rows" if penalty.get("follow") == "validation" else "training"
    sentence = (
        f"The constraint, as sampled in {where}, was {met} at step {last['step']}: {last['violation']:.1%} of the "
        f"{units} where {allowed:.1%} may be; λ = {last['multiplier']:.3g}, {state}."
    )
    infeasible = sum(bool(row.get("infeasible")) for row in train)
    if infeasible:
        sentence += f" It was infeasible in {infeasible} of {len(train)} logged steps: C left nothing of 1/η."
    return sentence


def _table(names: list[str], rows: list[list[str]]) -> list[str]:
    heads = [files.markdown(name) for name in names]
    return ["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(names), *rows)]


def _figure(train: list[Row], path: Path, allowed: float | None = None) -> bool:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    # without pyplot: no global state, no display
    panels = [p for p in PANELS if any(row.get(name) is not None for row in train for name in p[2])]
    figure = Figure(figsize=(3.6 * len(panels), 3.0), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, unit, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for name in names:
            points = [(row["step"], row[name]) for row in train if row.get(name) is not None]
            if points:
                axes.plot(*zip(*points), label=name.replace("_", " "), linewidth=1)
        axes.set(title=title, xlabel="step", ylabel=unit)
        if names == ("violation",) and allowed is not None:
            axes.axhline(allowed, color="black", linestyle=":", linewidth=1)
        elif names == ("multiplier",) and any(row.get("multiplier") for row in train):
            axes.set_yscale("log")
        if len(names) > 1:
            axes.legend(frameon=False, fontsize="small")
    files.replace(path, lambda made: figure.savefig(made, dpi=130))
    return True


def _with_gain(row: Row) -> Row:
    start, worst = row.get("attack_start"), row.get("attack_worst")
    return row if start is None or worst is None else {**row, "gain": worst - start}


def _mean(rows: list[Row], name: str) -> str:
    values = [row[name] for row in rows if row.get(name) is not None]
    return _short(math.fsum(values) / len(values)) if values else "-"


def _short(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"
