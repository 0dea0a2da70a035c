"""One HTML file with everything in it: words, tables, plots and the library that draws them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .evidence import Evidence
from .panels import COLUMNS, NUMBERS
from .readme import Costs, source
from .sections import sections
from .sources import Entry, commits, latest, machine, places, versions

HERE = Path(__file__).parent
#: columns of the table of all rows that have a menu
MENUS = ("suite", "dtype", "variant", "machine")


@dataclass(frozen=True)
class Machine:
    """What was measured on one machine."""

    name: str
    rows: int
    source: str
    versions: str
    commits: str


def render(entries: Sequence[Entry], table: Costs, experiments: Sequence[Evidence]) -> str:
    """The page.

    Args:
        entries: all rows, in the order of their files.
        table: what steps cost, see :func:`.readme.costs`.
        experiments: results to show beside them.
    """
    import jinja2
    from plotly.offline import get_plotlyjs

    parts = sections(entries)
    figures = [{"data": panel.data, "layout": panel.layout} for section in parts for panel in section.panels]
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FileSystemLoader(HERE),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        machines=_machines(entries),
        files=places(entries),
        count=len(entries),
        table=table,
        source=source,
        sections=parts,
        experiments=experiments,
        columns=list(COLUMNS),
        numbers=NUMBERS,
        menus={name: sorted({COLUMNS[name](entry) for entry in entries}) for name in MENUS},
        rows=_rows(entries),
        style=(HERE / "page.css").read_text(encoding="utf-8"),
        script=(HERE / "page.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        figures=in_script(figures),
    )


def in_script(value: Any) -> str:
    """JSON that cannot end the element it stands in.

    Raises:
        ValueError: a number is not finite.
    """
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def _machines(entries: Sequence[Entry]) -> list[Machine]:
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(machine(entry.row), []).append(entry)
    return [Machine(n, len(g), places(g), versions(g), commits(g)) for n, g in groups.items()]


def _rows(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """All rows with their cells; those that a later one repeats are marked."""
    newest = {id(entry) for entry in latest(entries)}
    return [
        {"newest": id(entry) in newest, "cells": {name: cell(entry) for name, cell in COLUMNS.items()}}
        for entry in entries
    ]
