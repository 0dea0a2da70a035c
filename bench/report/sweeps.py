"""The section of suite `sweep`: how the ratio grows with one size at a time, other than the length."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ..plot import COLOURS
from .panels import Panel, Section, by_variant, figure, grouped, lines, number
from .sources import Entry, machine

SUITE = "sweep"
#: letter of a family -> what its size is
SIZES = {"D": "features of a head, D", "V": "words of the head, V", "K": "directions that share a primal, K"}
#: the one line of the directions, whose variants are their numbers
STEP = "exact, fused"


def size_of(entry: Entry) -> tuple[str, int] | None:
    """Letter and size of a row, from its family (``D-64``) or its variant (``K = 4``); None for another suite's."""
    found = re.fullmatch(r"([DV])-(\d+)", entry.row.family)
    if entry.row.family == "K":
        found = re.fullmatch(r"(K) = (\d+)", entry.row.variant)
    return (found[1], int(found[2])) if entry.row.suite == SUITE and found else None


def sweeps(entries: Sequence[Entry], hues: Mapping[str, str]) -> Section:
    """Ratios against D, V and K."""
    panels = []
    some = [e for e in entries if size_of(e) is not None and e.number("ratio") is not None]
    for group in grouped(some, lambda e: (_letter(e), e.row.dtype, e.row.length, machine(e.row))):
        panels.append(_panel(sorted(group, key=_size), hues))
    return Section(
        "sweeps",
        "Time against other sizes",
        "One size at a time, the others as they are: time divided by that of the base at the same size; with several "
        "directions, by that of one.",
        panels,
        "No size was swept.",
    )


def _letter(entry: Entry) -> str:
    return (size_of(entry) or ("", 0))[0]


def _size(entry: Entry) -> int:
    return (size_of(entry) or ("", 0))[1]


def _panel(entries: Sequence[Entry], hues: Mapping[str, str]) -> Panel:
    letter, row = _letter(entries[0]), entries[0].row
    groups = {STEP: list(entries)} if letter == "K" else by_variant(entries)
    sizes = sorted({_size(entry) for entry in entries})
    axis = {"tickvals": sizes, "ticktext": [f"{n:,}" for n in sizes], "title": {"text": SIZES[letter]}}
    data, layout = figure(
        lines(groups, {**COLOURS, **hues}, lambda e: e.number("ratio"), ".2f", _size, letter),
        xaxis={"type": "log", **axis},
        yaxis={"title": {"text": "time ÷ base"}, "rangemode": "tozero"},
        height=300,
    )
    said = "; ".join(
        f"{name}: " + ", ".join(f"{number(e.number('ratio'), '.2f')} at {letter} {_size(e)}" for e in inside)
        for name, inside in groups.items()
    )
    title = f"{SIZES[letter]}, {row.dtype}"
    subtitle = f"S {row.length} · {machine(row)}"
    alt = f"Time over that of the base against {SIZES[letter]}, {row.dtype}. {said}."
    columns = ("family", "variant", "S", "min ms", "ratio", "of", "rows")
    return Panel(title[0].upper() + title[1:], subtitle, data, layout, alt, entries, columns)
