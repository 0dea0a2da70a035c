"""Rooflines: arithmetic a second against arithmetic intensity, under what the machine allows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .panels import SYMBOLS, Panel, Section, by_variant, figure, grouped, intensity, number, plain_text
from .sources import Entry, machine

CEILING = "#7c828c"


def on_roofline(entry: Entry) -> bool:
    """Whether a row has both rates and both ceilings."""
    return intensity(entry) is not None and {"gflop_per_s", "gb_per_s"} <= entry.row.ceilings.keys()


def rooflines(entries: Sequence[Entry], hues: Mapping[str, str]) -> Section:
    """One panel for every dtype and machine."""
    placed = [e for e in entries if on_roofline(e)]
    return Section(
        "rooflines",
        "Rooflines",
        "What has to be computed, divided by the time, against arithmetic over traffic. The roof is what the machine "
        "allows there: the rate of a large product, or that of a copy times the intensity, both measured in the same "
        "run. What fits into caches may lie above the roof of the memory.",
        [_roofline(group, hues) for group in grouped(placed, lambda e: (e.row.dtype, machine(e.row)))],
        "No row has both rates and the machine's ceilings.",
    )


def _roofline(entries: Sequence[Entry], hues: Mapping[str, str]) -> Panel:
    """One dtype on one machine; the roof is the highest that its rows measured."""
    peak, bandwidth = (max(e.row.ceilings[name] for e in entries) for name in ("gflop_per_s", "gb_per_s"))
    groups = by_variant(entries)
    traces = [
        _points(variant, inside, hues[variant], SYMBOLS[i % len(SYMBOLS)])
        for i, (variant, inside) in enumerate(groups.items())
    ]
    places = [intensity(e) or 0.0 for e in entries]
    ridge = peak / bandwidth
    corners = sorted({min(*places, ridge) / 2, ridge, max(*places, ridge) * 2})
    traces.append(
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": "roof",
            "x": corners,
            "y": [min(peak, bandwidth * x) for x in corners],
            "customdata": [""] * len(corners),
            "hovertemplate": "%{x:.3g} FLOP/byte: %{y:.4g} GFLOP/s",
            "line": {"color": CEILING, "width": 2},
            "marker": {"color": CEILING, "size": 1, "symbol": "line-ns-open"},
        }
    )
    data, layout = figure(
        traces,
        xaxis={"type": "log", "title": {"text": "arithmetic intensity, FLOP/byte"}},
        yaxis={"type": "log", "title": {"text": "GFLOP/s"}},
        height=420,
    )
    row = entries[0].row
    said = "; ".join(
        f"{_name(e)}, {e.row.variant}: {number(e.number('gflop_per_s'), '.4g')} GFLOP/s at "
        f"{number(intensity(e), '.3g')} FLOP/byte"
        for e in entries
    )
    alt = (
        f"Roofline, {row.dtype}, {machine(row)}: {peak:.4g} GFLOP/s, {bandwidth:.4g} GB/s, which meet at {ridge:.3g} "
        f"FLOP/byte. {said}."
    )
    columns = ("suite", "family", "S", "variant", "FLOP/byte", "GFLOP/s", "GB/s", "of ceiling", "rows")
    return Panel(f"Roofline, {row.dtype}", machine(row), data, layout, alt, entries, columns)


def _points(variant: str, entries: Sequence[Entry], colour: str, symbol: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": plain_text(variant),
        "x": [intensity(e) for e in entries],
        "y": [e.number("gflop_per_s") for e in entries],
        "customdata": [plain_text(f"{_name(e)}, {_allowed(e)}, {e.where}") for e in entries],
        "hovertemplate": "%{x:.3g} FLOP/byte: %{y:.4g} GFLOP/s<br>%{customdata}",
        "marker": {"color": colour, "size": 8, "symbol": symbol},
    }


def _name(entry: Entry) -> str:
    part = f" {entry.row.config['part']}" if "part" in entry.row.config else ""
    return f"{entry.row.suite} {entry.row.family}{part}, S {entry.row.length}"


def _allowed(entry: Entry) -> str:
    """The share of what the machine allows there."""
    limits = entry.row.ceilings
    roof = min(limits["gflop_per_s"], limits["gb_per_s"] * (intensity(entry) or math.nan))
    return f"{(entry.number('gflop_per_s') or 0.0) / roof:.0%} of the roof"
