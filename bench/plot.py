"""Pictures from rows: the time of a step against the length, and the errors of its gradients."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aajr_kernels.files import replace

from .case import LIMITS
from .roofline import MethodStep, flops_of
from .row import Row, latest

#: variant -> colour, the same in every picture; each has a contrast of at least 3 on white and on a dark page
COLOURS = {
    "exact, fused": "#0f8a63",
    "exact": "#4f9d2f",
    "plain": "#7c828c",
    "finite differences": "#c9555c",
    "torch.func.jvp": "#9467c0",
    "double backward": "#b07a12",
    "exact, compiled": "#0f8a63",
    "exact, compiled reference": "#1b8a9e",
    "jvp-flash-attention": "#b5498f",
    "dual": "#0f8a63",
    "dual, reference": "#4f9d2f",
}
#: for variants without a colour of their own, in the order of their names
FURTHER = ("#c2571a", "#6477d6", "#8a7a3a", "#a0522d", "#4a8fa8", "#a8567f")
#: bases: lines at one, which the axis has already
BASES = ("plain", "plain, eager attention", "plain, compiled", "plain, keys repeated", "plain, written out")
#: variants of older rows that can no longer be measured
GONE = ("plain, our primal ops",)
GREY = "#777777"
NAMES = {"llama": "Llama", "gpt2": "GPT-2", "bert": "BERT", "smollm2": "SmolLM2-135M"}


def colours(variants: Iterable[str]) -> dict[str, str]:
    """A colour for every variant."""
    names = dict.fromkeys(variants)
    further = sorted(name for name in names if name not in COLOURS)
    rest = {name: FURTHER[i % len(FURTHER)] for i, name in enumerate(further)}
    return {name: COLOURS.get(name) or rest[name] for name in names}


def is_whole_step(row: Row) -> bool:
    """Whether its time is compared with a plain step of a whole model."""
    return (
        row.suite == "step"
        and finite(row.ratio) is not None
        and (row.base or "").startswith("plain")
        and row.family != "memory"
        and "part" not in row.config
        and row.variant not in GONE
    )


def finite(value: float | None) -> float | None:
    """The number, or None if it cannot be drawn."""
    return value if value is not None and math.isfinite(value) else None


def model_name(row: Row) -> str:
    """The model of a step, in words."""
    kind, _, size = str(row.config.get("model", row.family)).partition("-")
    name = f"{NAMES.get(kind, kind)} {size}".strip()
    words = row.config.get("V")
    return f"{name}, vocabulary of {words:,}" if isinstance(words, int) else name


def rank(row: Row) -> tuple[int, ...]:
    """Where a step stands among others: by dtype, without a head and with one, by architecture and size."""
    kind, _, size = str(row.config.get("model", row.family)).partition("-")
    order = [(row.dtype, list(LIMITS)), (kind, list(NAMES)), (size, ["tiny", "", "base"])]
    dtype, model, place = (names.index(name) if name in names else len(names) for name, names in order)
    return dtype, "V" in row.config, model, place


def plot_steps(rows: Sequence[Row], path: Path) -> None:
    """Ratio to the plain step against S, one panel per model, dtype and machine.

    Args:
        rows: of suite `step`; among those that measure the same the last counts. Models at a single length are left
            out where others have several.
        path: picture to write; its suffix decides the format.

    Raises:
        ValueError: there is no step ratio among the rows.
    """
    groups: dict[str, list[Row]] = {}
    steps = sorted(filter(is_whole_step, latest(rows)), key=rank)
    several = len({row.cpu for row in steps if row.device == "cpu"}) > 1
    for row in steps:
        where = row.torch_capability if row.device == "cpu" else row.device_name or row.device
        if several and row.device == "cpu":
            where += f"\n{row.cpu}"
        groups.setdefault(f"{model_name(row)} {row.dtype} {where}", []).append(row)
    groups = {k: v for k, v in groups.items() if len({r.length for r in v}) > 1} or groups
    if not groups:
        raise ValueError("no row has the ratio of a step: run `python -m bench step --rows FILE` first.")
    drawn = [row for group in groups.values() for row in group]
    variants = {row.variant for row in drawn if row.variant not in BASES}
    columns = 3 if len(groups) > 4 and len(groups) % 3 == 0 else min(len(groups), 4)
    figure, axes = _figure(columns, math.ceil(len(groups) / columns))
    hues = {v: c for v, c in colours([*COLOURS, *sorted(variants)]).items() if v in variants}
    keys: dict[str, Any] = {}
    for axis, (title, group) in zip(axes, groups.items()):
        for variant, colour in hues.items():
            line = sorted((r.length, r.ratio) for r in group if r.variant == variant and r.ratio is not None)
            if line:
                (keys[variant],) = axis.plot(*zip(*line), "o-", color=colour, linewidth=1.6, markersize=4)
        axis.axhline(1.0, color=GREY, linewidth=0.8)
        lengths = sorted({r.length for r in group})
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [str(n) for n in lengths])
        axis.minorticks_off()
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("S")
    axes[0].set_ylim(bottom=0)  # shared, and only now known at the top
    for axis in axes[::columns]:
        axis.set_ylabel("time ÷ plain step")
    _save(figure, axes, path, drawn, {variant: keys[variant] for variant in hues if variant in keys})


def plot_errors(rows: Sequence[Row], path: Path) -> None:
    """Error of a step's gradients against float64, on a logarithmic scale: one panel per dtype, a line per variant.

    Args:
        rows: of suite `step`; among those that measure the same the last counts.
        path: picture to write; its suffix decides the format.

    Raises:
        ValueError: no row of a step has a gradient error.
    """
    rows = [
        r
        for r in sorted(filter(is_whole_step, latest(rows)), key=rank)
        if (finite(r.gradient_error) or 0) > 0
    ]
    rows = [r for r in rows if r.variant not in BASES or r.variant == "plain"]
    if not rows:
        raise ValueError(
            "no row has the gradient error of a step: run `python -m bench step --rows FILE` first."
        )
    measured = {r.dtype for r in rows}
    dtypes = [d for d in LIMITS if d in measured] + sorted(measured - set(LIMITS))
    hues = colours([*COLOURS, *(r.variant for r in rows)])
    variants = [v for v in hues if any(r.variant == v for r in rows)]
    models = dict.fromkeys(model_name(r) for r in rows)
    marks = dict(zip(models, "osD^vP*X<>hd" * (1 + len(models) // 12)))
    figure, axes = _figure(len(dtypes), 1, height=1.3 + 0.26 * len(variants), sharex=True)
    for axis, dtype in zip(axes, dtypes):
        for row in rows:
            if row.dtype == dtype:
                place = row.gradient_error, variants.index(row.variant)
                style = {"marker": marks[model_name(row)], "edgecolors": hues[row.variant]}
                axis.scatter(*place, s=30, facecolors="none", zorder=3, **style)
        if dtype in LIMITS:
            axis.axvline(LIMITS[dtype], color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.set_yticks(range(len(variants)), variants)
        axis.grid(axis="y", alpha=0.25, linewidth=0.6)
        axis.set_title(dtype, fontsize=9)
        axis.set_xlabel("relative error of all gradients")
    axes[0].set_ylim(len(variants) - 0.5, -0.5)
    from matplotlib.lines import Line2D

    form: Any = {"color": GREY, "linestyle": "", "markersize": 5, "markerfacecolor": "none"}
    keys = {model: Line2D([], [], marker=mark, **form) for model, mark in marks.items()}
    keys["limit for exact ones"] = Line2D([], [], color=GREY, linestyle=(0, (4, 3)), linewidth=0.9)
    _save(figure, axes, path, rows, keys)


def plot_contexts(rows: Sequence[Row], path: Path) -> None:
    """Time of a step of the method over the one that computes its context at every point, by the open share.

    Points are measured, lines are counted: :class:`.roofline.MethodStep` of the same sizes.

    Args:
        rows: of suite `method`, families ``context*``; among those that measure the same the last counts.
        path: picture to write; its suffix decides the format.

    Raises:
        ValueError: there is no such row.
    """
    from .suites import method, models, step

    drawn = [
        r
        for r in latest(rows)
        if r.suite == "method" and r.family in method.CONTEXTS and finite(r.ratio) and r.dtype == "float32"
    ]
    if not drawn:
        raise ValueError(
            "no row has a step with a shared context: run `python -m bench method:context --rows FILE` first."
        )
    length = drawn[0].length
    shares = [2**-i for i in range(5)]
    counted: dict[str, list[float]] = {}
    for share in shares:
        sizes = (models.sizes("llama", length), step.words("llama"), length, int(length * share))
        steps = MethodStep(*sizes, method.STEPS, 4)
        flops = {
            "with penalty": flops_of(steps.penalty(shared=False)),
            "with penalty, shared context": flops_of(steps.penalty(shared=True)),
            method.OURS: flops_of(steps.adversarial()),
            method.USUAL: flops_of(steps.usual()),
        }
        for name, value in flops.items():
            counted.setdefault(name, []).append(value / flops["with penalty"])
    figure, (axis,) = _figure(1, 1)
    hues = {
        "with penalty": COLOURS["plain"],
        "with penalty, shared context": COLOURS["exact, fused"],
        method.OURS: COLOURS["exact, compiled reference"],
        method.USUAL: COLOURS["finite differences"],
    }
    keys: dict[str, Any] = {}
    for name, hue in hues.items():
        axis.plot(shares, counted[name], "--", color=hue, linewidth=1.2)
        points = [(1 / method.CONTEXTS[r.family][0], r.ratio) for r in drawn if r.variant == name]
        (keys[name],) = axis.plot(*zip(*points), "o", color=hue, markersize=5) if points else (None,)
    from matplotlib.lines import Line2D

    keys = {name: key for name, key in keys.items() if key is not None}
    keys["by count of products"] = Line2D([], [], color=GREY, linestyle="--", linewidth=1.2)
    axis.set_xscale("log", base=2)
    axis.set_xticks(shares, ["all", "1/2", "1/4", "1/8", "1/16"])
    axis.minorticks_off()
    axis.invert_xaxis()
    axis.set_ylim(bottom=0)
    axis.set_xlabel(f"tokens open to attack, of {length:,}")
    axis.set_ylabel("time ÷ whole at every point")
    _save(figure, [axis], path, drawn, keys)


def _figure(columns: int, lines: int, height: float = 3.4, **options: Any) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 + 3.1 * columns, height * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False, **({"sharey": True} | options)).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, axes: list[Any], path: Path, rows: Sequence[Row], keys: Mapping[str, Any]) -> None:
    """Write the picture; the metadata of a PNG name its rows, not the time and the program."""
    for axis in axes:
        if not axis.has_data():
            axis.set_visible(False)
    figure.legend(keys.values(), keys.keys(), loc="outside right center", frameon=False, fontsize=8)
    metadata = {"Software": None, "Source": fingerprint(rows)} if path.suffix.lower() == ".png" else None
    replace(path, lambda file: figure.savefig(file, dpi=160, metadata=metadata))


def fingerprint(rows: Iterable[Row]) -> str:
    """A hash of the drawn numbers of rows, in any order."""
    lines = sorted(f"{row.key} {row.ratio} {row.gradient_error}" for row in rows)
    return "rows " + hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
