"""The sections of a page: time and memory against S, ratios, rates against ceilings, errors of gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..case import LIMITS
from ..plot import colours
from .panels import (
    SYMBOLS,
    Panel,
    Section,
    by_variant,
    dots,
    failures,
    figure,
    grouped,
    in_words,
    lengths_axis,
    lines,
    megabytes,
    names_axis,
    number,
    plain_text,
)
from .rooflines import on_roofline, rooflines
from .sources import Entry, configuration, latest, machine
from .sweeps import SUITE, sweeps

#: dtype -> colour and symbol where colours stand for dtypes, and for lengths
DTYPES = {
    "float32": ("#3a78c2", "circle"),
    "bfloat16": ("#c2571a", "diamond"),
    "float16": ("#8a7a3a", "square"),
}
#: suites of whole steps come before those of single ops
FIRST = ("step", "method")
SIZES = ("#3a78c2", "#c2571a", "#0f8a63", "#9467c0", "#8a7a3a", "#b5498f")


def sections(entries: Sequence[Entry]) -> list[Section]:
    """All sections, drawn from the latest rows."""
    newest = sorted(latest(entries), key=lambda entry: entry.row.suite not in FIRST)
    hues = colours(sorted(entry.row.variant for entry in newest))
    swept, roofs, plain = sweeps(newest, hues), rooflines(newest, hues), rates(newest, hues)
    return [
        against_length(newest, hues),
        *([swept] if swept.panels else []),
        memory(newest, hues),
        ratios([entry for entry in newest if entry.row.suite != SUITE]),
        *([roofs] if roofs.panels else []),
        *([plain] if plain.panels or not roofs.panels else []),
        errors(newest),
    ]


def _case(entry: Entry) -> tuple[str, ...]:
    row = entry.row
    return row.suite, row.family, row.dtype, machine(row), configuration(row.config)


def _title(entry: Entry) -> tuple[str, str]:
    row = entry.row
    return f"{row.suite} {row.family}, {row.dtype}", f"{configuration(row.config)} · {machine(row)}"


def _over_lengths(
    entries: Sequence[Entry],
    hues: dict[str, str],
    value: Callable[[Entry], float | None],
    what: str,
    unit: str,
    form: str,
    columns: Sequence[str],
    base: float | None = None,
) -> Panel:
    groups = by_variant(entries)
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "line": {"color": "#7c828c", "width": 1}}
    shapes = [] if base is None else [line | {"y0": base, "y1": base}]
    data, layout = figure(
        lines(groups, hues, value, form),
        xaxis=lengths_axis(entries),
        yaxis={"title": {"text": unit}, "rangemode": "tozero"},
        shapes=shapes,
        height=300,
    )
    title, subtitle = _title(entries[0])
    said = in_words(groups, lambda entry: number(value(entry), form))
    return Panel(
        title, subtitle, data, layout, f"{what}, {title}. {said}", entries, columns, failures(entries)
    )


def against_length(entries: Sequence[Entry], hues: dict[str, str]) -> Section:
    """Time over that of the base, for every case that was measured at several lengths."""
    panels = []
    for group in grouped(entries, _case):
        if len({e.row.length for e in group if e.number("ratio") is not None}) > 1:
            columns = ("variant", "S", "min ms", "median ms", "ratio", "by round", "of", "rows")
            panels.append(
                _over_lengths(
                    group,
                    hues,
                    lambda e: e.number("ratio"),
                    "Time over that of the base against S",
                    "time ÷ base",
                    ".2f",
                    columns,
                    1.0,
                )
            )
    return Section(
        "time",
        "Time against S",
        "Minimum over interleaved runs in one process, divided by that of the base, which is the faster of the plain "
        "variants. Lower is faster; the line at 1 is the base.",
        panels,
        "No case was measured at more than one length.",
    )


def memory(entries: Sequence[Entry], hues: dict[str, str]) -> Section:
    """Peak memory, for every case that has any."""
    panels = [
        _over_lengths(
            group, hues, megabytes, "Peak memory against S", "peak MB", ".0f",
            ("variant", "S", "peak MB", "peak ratio", "of", "rows"),
        )
        for group in grouped([e for e in entries if megabytes(e) is not None], _case)
    ]  # fmt: skip
    return Section(
        "memory",
        "Memory against S",
        "Highest resident memory of one call in a fresh process, above that of inputs and parameters. Only some cases "
        "are measured, some of them at one length: a single point is no line.",
        panels,
        "No row has a peak of memory.",
    )


def ratios(entries: Sequence[Entry]) -> Section:
    """Bars of every case: all its variants, one colour per length."""
    panels = []
    timed = [e for e in entries if e.number("ratio") is not None or e.row.failure]
    for group in grouped(timed, lambda e: (e.row.suite, e.row.family, e.row.dtype, machine(e.row))):
        groups = by_variant(group)
        sizes = grouped(group, lambda e: (e.row.length, configuration(e.row.config)))
        same = len({configuration(e.row.config) for e in group}) == 1
        traces = []
        for i, inside in enumerate(sorted(sizes, key=lambda part: part[0].row.length)):
            row = inside[0].row
            bars = [e for e in inside if e.number("ratio") is not None]
            traces.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "name": plain_text(
                        f"S {row.length}" + ("" if same else f", {configuration(row.config)}")
                    ),
                    "x": [e.number("ratio") for e in bars],
                    "y": [plain_text(e.row.variant) for e in bars],
                    "text": [number(e.number("ratio"), ".2f") for e in bars],
                    "textposition": "auto",
                    "customdata": [plain_text(e.where) for e in bars],
                    "hovertemplate": "%{y}: %{x:.3f}<br>%{customdata}",
                    "marker": {"color": SIZES[i % len(SIZES)]},
                }
            )
        data, layout = figure(
            traces,
            xaxis={"title": {"text": "time ÷ base"}, "rangemode": "tozero"},
            yaxis=names_axis(list(groups)),
            barmode="group",
            bargap=0.25,
            height=70 + 22 * max(len(groups) * len(sizes), 3),
        )
        row = group[0].row
        title = f"{row.suite} {row.family}, {row.dtype}"
        alt = f"Time over that of the base, {title}. {in_words(groups, lambda e: number(e.number('ratio'), '.2f'))}"
        subtitle = (f"{configuration(row.config)} · " if same else "") + machine(row)
        columns = ("variant", "S", "backend", "min ms", "ratio", "by round", "of", "bounds", "note", "rows")
        panels.append(Panel(title, subtitle, data, layout, alt, group, columns, failures(group)))
    return Section(
        "ratios",
        "Ratios of all variants",
        "The same ratio for every variant of every case, by model or op, dtype and instruction set. The "
        "table of each plot says what the base is, and between what ratios the middle half of the rounds lay.",
        panels,
        "No row has a ratio.",
    )


def rates(entries: Sequence[Entry], hues: dict[str, str]) -> Section:
    """Arithmetic or traffic of ops that have no place on a roofline."""
    panels = []
    for field, unit in (("gflop_per_s", "GFLOP/s"), ("gb_per_s", "GB/s")):
        some = [e for e in entries if e.number(field) is not None and not on_roofline(e)]
        for group in grouped(some, lambda e: (e.row.dtype, machine(e.row))):
            panels.append(_rates(group, hues, field, unit))
    without = dict.fromkeys(
        machine(entry.row) for panel in panels for entry in panel.entries if not entry.row.ceilings
    )
    notes = [
        f"The rows of {name} carry no measured ceilings. Their rates stand alone: no share of a peak is claimed."
        for name in without
    ]
    return Section(
        "rates",
        "Rates against the machine's ceilings",
        "What has to be computed or moved, divided by the time: arithmetic for products and attention, traffic for "
        "element-wise ops. A bar | marks the ceiling measured in the same run: a large product, or a copy.",
        panels,
        "No row has a rate.",
        notes,
    )


def _rates(entries: Sequence[Entry], hues: dict[str, str], field: str, unit: str) -> Panel:
    def line(entry: Entry) -> str:
        return f"{entry.row.suite} {entry.row.family}, S {entry.row.length}"

    groups = by_variant(entries)
    traces = []
    for i, (variant, inside) in enumerate(groups.items()):
        points = [(e.number(field) or 0.0, line(e), e.where) for e in inside]
        traces.append(dots(variant, points, hues[variant], SYMBOLS[i % len(SYMBOLS)], ".4g"))
    ceilings = [(e.row.ceilings[field], line(e), e.where) for e in entries if field in e.row.ceilings]
    if ceilings:
        traces.append(dots("ceiling", ceilings, "#7c828c", "line-ns-open", ".4g"))
    names = list(dict.fromkeys(line(entry) for entry in entries))
    data, layout = figure(
        traces,
        xaxis={"title": {"text": unit}, "rangemode": "tozero"},
        yaxis=names_axis(names),
        height=90 + 24 * len(names),
    )
    row = entries[0].row
    title = f"{unit}, {row.dtype}"
    said = "; ".join(
        f"{line(e)}, {e.row.variant}: {number(e.number(field), '.4g')}"
        + (f" of {e.row.ceilings[field]:.4g}" if field in e.row.ceilings else "")
        for e in entries
    )
    columns = ("suite", "family", "S", "variant", unit, "of ceiling", "rows")
    alt = f"Rates in {unit}, {row.dtype}, {machine(row)}. {said}."
    return Panel(title, machine(row), data, layout, alt, entries, columns)


def errors(entries: Sequence[Entry]) -> Section:
    """Relative error of all gradients against float64 on a logarithmic scale, by dtype and variant."""
    panels = []
    exact = [e for e in entries if e.number("gradient_error") is not None]
    for group in grouped(exact, lambda e: (e.row.suite, e.row.family, machine(e.row))):
        groups = by_variant(group)
        dtypes = [d for d in DTYPES if any(e.row.dtype == d for e in group)]
        dtypes += sorted({e.row.dtype for e in group} - set(dtypes))
        traces, shapes = [], []
        for dtype in dtypes:
            colour, symbol = DTYPES.get(dtype, ("#7c828c", "x"))
            points = [
                (e.number("gradient_error") or 0.0, e.row.variant, f"S {e.row.length}, {e.where}")
                for e in group
                if e.row.dtype == dtype and (e.number("gradient_error") or 0.0) > 0
            ]
            traces.append(dots(dtype, points, colour, symbol, ".1e"))
            if dtype in LIMITS:
                shapes.append(_limit(LIMITS[dtype], colour))
        data, layout = figure(
            traces,
            xaxis={"type": "log", "title": {"text": "relative error"}, "exponentformat": "power", "dtick": 1},
            yaxis=names_axis(list(groups)),
            shapes=shapes,
            height=90 + 28 * max(len(groups), 3),
        )
        row = group[0].row
        title = f"{row.suite} {row.family}"
        said = in_words(groups, lambda e: f"{number(e.number('gradient_error'), '.1e')} in {e.row.dtype}")
        zero = [e for e in group if e.number("gradient_error") == 0]
        notes = [f"{e.row.variant}, {e.row.dtype}: no error at all ({e.where})." for e in zero]
        columns = ("variant", "dtype", "S", "gradient error", "rows")
        panels.append(
            Panel(
                title, machine(row), data, layout, f"Gradient error, {title}. {said}", group, columns, notes
            )
        )
    return Section(
        "errors",
        "Gradient error against float64",
        "Relative error of all gradients together, against PyTorch's forward mode in float64 on hand-written layers, "
        "at a small length and for inputs as rounded to the dtype. Dashed: what an exact variant may have at most. "
        "Finite differences and formulas in low precision are only reported.",
        panels,
        "No row has a gradient error.",
    )


def _limit(value: float, colour: str) -> dict[str, Any]:
    line = {"color": colour, "width": 1, "dash": "dash"}
    return {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": value, "x1": value, "line": line}
