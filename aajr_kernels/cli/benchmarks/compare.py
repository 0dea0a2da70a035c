"""Two sets of rows against each other: by how much every ratio changed, with an interval, and whether that is too much.

Ratios are compared, never times: both sides of a ratio are measured in the same process, interleaved. The interval is
the percentile bootstrap of the median over the rounds of either run; it says how well these runs tell the two apart,
not how the machine will behave tomorrow.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .row import Row

__all__ = [
    "LIMIT",
    "Change",
    "baseline_file",
    "compared",
    "lost",
    "machine_kind",
    "newest",
    "show",
    "worsened",
]

LIMIT = 0.15  # largest growth of a ratio that passes
RESAMPLES, LEVEL = 4000, 0.95

Key = tuple[object, ...]


@dataclass(frozen=True)
class Change:
    """One variant of one case, in two sets of rows.

    Attributes:
        name: suite:family dtype length variant.
        before, after: ratios to the base of their own run.
        growth: after / before − 1.
        interval: of the growth; None where a side has fewer than three rounds on record.
    """

    name: str
    before: float
    after: float
    growth: float
    interval: tuple[float, float] | None

    @property
    def differs(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]

    def exceeds(self, limit: float) -> bool:
        """Whether the ratio grew by more than `limit`, and the interval does not deny that it grew."""
        return self.growth > limit and (self.interval is None or self.interval[0] > 0)


def key_of(row: Row) -> Key:
    """What a row measures, and on what kind of machine; commit and versions are free to differ."""
    config = json.dumps(row.config, sort_keys=True)
    where = (row.device, row.device_name, row.cpu, row.torch_capability, row.threads)
    return (row.suite, row.family, config, row.length, row.variant, row.dtype, *where)


def newest(rows: Iterable[Row]) -> dict[Key, Row]:
    """Of rows that measure the same, the last one; those without a ratio left out."""
    return {key_of(row): row for row in rows if row.ratio is not None}


def name_of(row: Row) -> str:
    """What a row measures, for people."""
    return f"{row.suite}:{row.family} {row.dtype} {row.length} {row.variant}"


def compared(before: Iterable[Row], after: Iterable[Row]) -> list[Change]:
    """The variants that both have, in the order of `after`; without those that were the base both times."""
    old = newest(before)
    pairs = [(old[key], row) for key, row in newest(after).items() if key in old]
    return [_change(a, b) for a, b in pairs if a.variant != a.base or b.variant != b.base]


def lost(before: Iterable[Row], after: Sequence[Row]) -> list[str]:
    """Variants without a number any more, of cases that both have measured."""
    measured = newest(after)
    cases = {key_of(row)[:4] for row in measured.values()}
    return [name_of(row) for key, row in newest(before).items() if key[:4] in cases and key not in measured]


def _change(before: Row, after: Row) -> Change:
    assert before.ratio is not None and after.ratio is not None
    interval = None
    if min(len(before.round_ratios), len(after.round_ratios)) >= 3:
        rng = np.random.default_rng(0)
        old, new = (_medians(row.round_ratios, rng) for row in (before, after))
        low, high = np.quantile(new / old - 1, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        interval = float(low), float(high)
        growth = statistics.median(after.round_ratios) / statistics.median(before.round_ratios) - 1
    else:
        growth = after.ratio / before.ratio - 1
    return Change(name_of(after), before.ratio, after.ratio, growth, interval)


def _medians(values: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    sample = np.asarray(values)
    drawn: np.ndarray = np.median(sample[rng.integers(0, len(sample), (RESAMPLES, len(sample)))], axis=1)
    return drawn


def worsened(changes: Iterable[Change], limit: float = LIMIT) -> list[Change]:
    """Those whose ratio grew by more than `limit`."""
    return [change for change in changes if change.exceeds(limit)]


def show(changes: Sequence[Change], names: tuple[str, str], console: Console, limit: float = LIMIT) -> None:
    """A table, the largest growth first."""
    table = Table(box=SIMPLE_HEAD, header_style="dim", padding=(0, 1))
    for column in ("case and variant", *names, "change", f"{LEVEL:.0%} interval", ""):
        table.add_column(escape(column), justify="left" if column == "case and variant" else "right")
    for change in sorted(changes, key=lambda c: -c.growth):
        interval = "" if change.interval is None else "{:+.1%} to {:+.1%}".format(*change.interval)
        mark = "[bold red]slower[/]" if change.exceeds(limit) else ""
        if not mark and change.differs:
            mark = "[yellow]slower[/]" if change.growth > 0 else "[green]faster[/]"
        cells = (f"{change.before:.3f}", f"{change.after:.3f}", f"{change.growth:+.1%}", interval, mark)
        table.add_row(escape(change.name), *cells)
    console.print(table)


def machine_kind(facts: Mapping[str, object]) -> str:
    """A file name for the kind of machine: processor or device, instruction set, threads."""
    where = facts["device_name"] or facts["cpu"] or facts["machine"]
    text = f"{where}-{facts['torch_capability']}-{facts['threads']}".lower()
    return "".join(c if c.isalnum() else "-" for c in text).strip("-")


def baseline_file(folder: Path, facts: Mapping[str, object]) -> Path:
    """Where the baseline of this kind of machine is."""
    return folder / f"{machine_kind(facts)}.jsonl"
