"""What a page is made of: sections of panels, each one plot with its rows and its words."""

from __future__ import annotations

import html
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..plot import BASES, finite
from ..show import share_of_roof
from .sources import Entry, commits, machine, places, versions


def by_round(entry: Entry) -> str:
    """The middle half of the ratios that single rounds gave, where there are enough of them."""
    values = [value for value in entry.row.round_ratios if finite(value) is not None]
    if len(values) < 4:
        return ""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{low:.2f}–{high:.2f}"


#: columns of the tables under the plots and of the table of all rows: name -> cell
COLUMNS: dict[str, Callable[[Entry], str]] = {
    "rows": lambda e: e.where,
    "suite": lambda e: e.row.suite,
    "family": lambda e: e.row.family,
    "S": lambda e: str(e.row.length),
    "dtype": lambda e: e.row.dtype,
    "variant": lambda e: e.row.variant,
    "backend": lambda e: e.row.backend,
    "min ms": lambda e: number(e.number("min_ms"), ".4g"),
    "median ms": lambda e: number(e.number("median_ms"), ".4g"),
    "ratio": lambda e: number(e.number("ratio"), ".2f"),
    "by round": by_round,
    "of": lambda e: e.row.base or "",
    "GFLOP/s": lambda e: number(e.number("gflop_per_s"), ".4g"),
    "GB/s": lambda e: number(e.number("gb_per_s"), ".4g"),
    "FLOP/byte": lambda e: number(intensity(e), ".3g"),
    "of ceiling": lambda e: number(share_of_roof(e.row), ".0%"),
    "peak MB": lambda e: number(megabytes(e), ".1f"),
    "peak ratio": lambda e: number(e.number("peak_ratio"), ".2f"),
    "gradient error": lambda e: number(e.number("gradient_error"), ".1e"),
    "bounds": lambda e: {True: "held", False: "missed", None: ""}[e.row.passed],
    "note": lambda e: e.row.failure,
    "machine": lambda e: machine(e.row),
    "commit": lambda e: commits([e]),
}
NUMBERS = {
    *(
        "S",
        "min ms",
        "median ms",
        "ratio",
        "by round",
        "GFLOP/s",
        "GB/s",
        "FLOP/byte",
        "of ceiling",
        "peak MB",
        "peak ratio",
    ),
    "gradient error",
}
#: variants that come first
ORDER = ("exact, fused", "exact", "dual", "dual, reference")
#: plotly's symbol -> the same as a character
GLYPHS = {
    "circle": "●",
    "square": "■",
    "diamond": "◆",
    "triangle-up": "▲",
    "cross": "✚",
    "x": "✖",
    "star": "★",
    "hexagon": "⬢",
    "pentagon": "⬟",
    "line-ns-open": "|",
}
SYMBOLS = tuple(GLYPHS)[:-1]


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        title, subtitle: what it shows, and of what configuration.
        data, layout: of plotly.
        alt: the plot in words, with its numbers.
        entries: the rows it is drawn from.
        columns: of its table, names of :data:`COLUMNS`.
        notes: what has to be said beside it.
    """

    title: str
    subtitle: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    alt: str
    entries: Sequence[Entry]
    columns: Sequence[str]
    notes: Sequence[str] = ()

    @property
    def source(self) -> str:
        """Rows, machine, versions and commit."""
        machines = "; ".join(dict.fromkeys(machine(entry.row) for entry in self.entries))
        return (
            f"{places(self.entries)} · {machines} · {versions(self.entries)} · commit {commits(self.entries)}"
        )

    @property
    def keys(self) -> list[tuple[str, str, str]]:
        """Name, colour and mark of every trace."""
        return [
            (
                html.unescape(trace["name"]),
                trace["marker"]["color"],
                GLYPHS[trace["marker"].get("symbol", "square")],
            )
            for trace in self.data
        ]

    @property
    def table(self) -> list[list[str]]:
        return [[COLUMNS[name](entry) for name in self.columns] for entry in self.entries]


@dataclass(frozen=True)
class Section:
    """Panels under one heading; without any, `empty` says why."""

    key: str
    title: str
    text: str
    panels: Sequence[Panel]
    empty: str = ""
    notes: Sequence[str] = field(default=())


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def intensity(entry: Entry) -> float | None:
    """Arithmetic over traffic, where a row has both."""
    flops, moved = entry.number("gflop_per_s"), entry.number("gb_per_s")
    return flops / moved if flops and moved else None


def megabytes(entry: Entry) -> float | None:
    peak = entry.number("peak_bytes")
    return None if peak is None else peak / 1e6


def plain_text(text: str) -> str:
    """Text for plotly, which reads tags and entities in it."""
    return html.escape(text, quote=False)


def grouped(entries: Iterable[Entry], key: Callable[[Entry], Hashable]) -> list[list[Entry]]:
    """Entries with the same key together, in the order in which they appear."""
    groups: dict[Hashable, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    return list(groups.values())


def ordered(variants: Iterable[str]) -> list[str]:
    """Variants with ours first, what they are compared with last."""
    names = dict.fromkeys(variants)
    known = [name for name in ORDER if name in names]
    middle = [name for name in names if name not in known and name not in BASES]
    return known + middle + [name for name in BASES if name in names]


def figure(traces: Sequence[Mapping[str, Any]], **layout: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Data and layout of a plot, checked by plotly; colours of text and grid are the page's."""
    import plotly.graph_objects as go

    made = go.Figure()
    made.update_layout(
        template=None,
        margin={"l": 8, "r": 16, "t": 8, "b": 46},
        showlegend=False,  # the page has its own, which wraps and takes no room from the axes
        hoverlabel={"align": "left"},
        **layout,
    )
    made.update_xaxes(zeroline=False, tickangle=0)  # only names need room that cannot be known
    made.update_yaxes(automargin=True, zeroline=False)
    for trace in traces:
        made.add_trace(trace)
    found = made.to_plotly_json()
    return [dict(trace) for trace in found["data"]], dict(found["layout"])


def by_variant(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Entries of every variant, ours first."""
    names = ordered(entry.row.variant for entry in entries)
    return {name: [entry for entry in entries if entry.row.variant == name] for name in names}


def lines(
    groups: Mapping[str, Sequence[Entry]],
    hues: Mapping[str, str],
    value: Callable[[Entry], float | None],
    form: str,
    at: Callable[[Entry], int] = lambda entry: entry.row.length,
    size: str = "S",
) -> list[dict[str, Any]]:
    """A line over S, or over another size, for every variant."""
    traces = []
    for i, (variant, entries) in enumerate(groups.items()):
        points = sorted(((at(e), value(e), e.where) for e in entries), key=lambda point: point[0])
        points = [point for point in points if point[1] is not None]
        if points:
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": plain_text(variant),
                    "x": [point[0] for point in points],
                    "y": [point[1] for point in points],
                    "customdata": [plain_text(point[2]) for point in points],
                    "hovertemplate": f"{size} %{{x}}: %{{y:{form}}}<br>%{{customdata}}",
                    "line": {"color": hues[variant], "width": 2},
                    "marker": {"color": hues[variant], "size": 7, "symbol": SYMBOLS[i % len(SYMBOLS)]},
                }
            )
    return traces


def dots(
    name: str, points: Sequence[tuple[float, str, str]], colour: str, symbol: str, form: str
) -> dict[str, Any]:
    """Markers at (value, name on the y axis, place)."""
    return {
        "type": "scatter",
        "mode": "markers",
        "name": plain_text(name),
        "x": [point[0] for point in points],
        "y": [plain_text(point[1]) for point in points],
        "customdata": [plain_text(point[2]) for point in points],
        "hovertemplate": f"%{{y}}: %{{x:{form}}}<br>%{{customdata}}",
        "marker": {"color": colour, "size": 9, "symbol": symbol, "line": {"width": 1.5, "color": colour}},
    }


def lengths_axis(entries: Iterable[Entry]) -> dict[str, Any]:
    """A logarithmic axis of S with the lengths that were measured."""
    sizes = sorted({entry.row.length for entry in entries})
    return {"type": "log", "title": {"text": "S"}, "tickvals": sizes, "ticktext": [str(n) for n in sizes]}


def names_axis(names: Sequence[str]) -> dict[str, Any]:
    """An axis of names, the first on top."""
    shown = [plain_text(name) for name in names]
    return {"type": "category", "categoryorder": "array", "categoryarray": shown, "autorange": "reversed"}


def in_words(groups: Mapping[str, Sequence[Entry]], value: Callable[[Entry], str]) -> str:
    """The numbers of a plot: ``exact: 2.09 at S 512, 2.04 at S 2048; ...``."""
    said = []
    for name, entries in groups.items():
        cells = [f"{text} at S {entry.row.length}" for entry in entries if (text := value(entry))]
        if cells:
            said.append(f"{name}: {', '.join(cells)}")
    return "; ".join(said) + "."


def failures(entries: Iterable[Entry]) -> list[str]:
    """A sentence for every row that says why it has no numbers."""
    return [
        f"{entry.row.variant} at S {entry.row.length}: {entry.row.failure} ({entry.where})."
        for entry in entries
        if entry.row.failure
    ]
