"""Counts of what a run tried, for the table of docs/trust.md (`python scripts/trust.py --run NAME`)."""

from __future__ import annotations

import json
import os
from pathlib import Path

#: names the file that a run's counts go to; without it nothing is written
VARIABLE = "AAJR_TRUST"


def count(promise: str, **figures: float) -> None:
    """Add to the figures of a promise, if a run for the table asks for them.

    Args:
        promise: name of a row of docs/trust.jsonl.
        figures: unit -> number, ``examples=200``; an underscore is read as a space. Whole numbers of one run are
            added up, of fractions the largest counts.
    """
    if file := os.environ.get(VARIABLE):
        line = json.dumps({"promise": promise, "figures": figures}) + "\n"
        # one write at the end of the file: also from several processes
        with Path(file).open("ab", buffering=0) as out:
            out.write(line.encode())


def totals(file: Path) -> dict[str, dict[str, float]]:
    """Promise -> unit -> number, of all lines that one run wrote."""
    counted: dict[str, dict[str, float]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        units = counted.setdefault(row["promise"], {})
        for unit, number in row["figures"].items():
            before = units.get(unit)
            if before is None:
                units[unit] = number
            else:
                units[unit] = before + number if isinstance(number, int) else max(before, number)
    return counted
