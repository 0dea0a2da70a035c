"""Two sets of rows against each other: by how much every ratio changed, with an interval, and whether that is too much.

Ratios are compared, never times: both sides of a ratio are measured in the same process, interleaved. The interval is
the percentile bootstrap of the median over the rounds of either run; it says how well these runs tell the two apart,
not how the machine will behave tomorrow.
"""

from __future__ import annotations

import functools
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
    "ROUNDS",
    "Change",
    "Comparison",
    "baseline_file",
    "compare",
    "key_of",
    "machine_kind",
    "merged",
    "show",
]

LIMIT = 0.15  # largest growth of a ratio that passes
ROUNDS = 7  # with fewer an interval says little, and the growth alone decides
RESAMPLES, LEVEL = 4000, 0.95

Key = tuple[object, ...]


@dataclass(frozen=True)
class Change:
    """One variant of one case, in two sets of rows.

    Attributes:
        name: suite:family dtype length variant.
        before, after: median ratios to the same base, where both have rounds on record, else the ratios.
        interval: of the growth; None where a side has fewer than :data:`ROUNDS` rounds, or another base.
        rounds: of the side that has fewer.
    """

    name: str
    before: float
    after: float
    interval: tuple[float, float] | None
    rounds: int

    @property
    def growth(self) -> float:
        """after / before − 1."""
        return self.after / self.before - 1

    @property
    def differs(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]

    def exceeds(self, limit: float = LIMIT) -> bool:
        """Whether the ratio grew by more than `limit`, and an interval, if there is one, leaves out zero."""
        return self.growth > limit and (self.interval is None or self.interval[0] > 0)


@dataclass(frozen=True)
class Comparison:
    """Two sets of rows.

    Attributes:
        changes: variants with a ratio in both; without those that were the base both times.
        lost: variants of cases that both ran, with a ratio before and none now.
        unmatched: how many variants of either set have no partner, because the other has no such case or variant.
    """

    changes: list[Change]
    lost: list[str]
    unmatched: tuple[int, int]

    @property
    def slower(self) -> list[str]:
        """Those whose ratio grew too much; not slow peers and references, which run a few rounds only."""
        return [change.name for change in self.changes if change.exceeds() and change.rounds >= ROUNDS]


def case_of(row: Row) -> Key:
    """A case on a kind of machine; commit and versions are free to differ."""
    config = json.dumps(row.config, sort_keys=True)
    where = (row.device, row.device_name, row.cpu, row.torch_capability, row.native_capability, row.threads)
    return (row.suite, row.family, config, row.length, row.dtype, *where)


def key_of(row: Row) -> Key:
    """A variant of a case on a kind of machine."""
    return (*case_of(row), row.variant)


def name_of(row: Row) -> str:
    """The same for people."""
    part = f" {row.config['part']}" if "part" in row.config else ""
    return f"{row.suite}:{row.family} {row.dtype} {row.length}{part} {row.variant}"


def newest(rows: Iterable[Row]) -> dict[Key, Row]:
    """Of rows that measure the same, the last one."""
    return {key_of(row): row for row in rows}


def merged(old: Iterable[Row], new: Sequence[Row]) -> list[Row]:
    """`old` with the cases of `new` replaced as a whole."""
    replaced = {case_of(row) for row in new}
    return [*(row for row in newest(old).values() if case_of(row) not in replaced), *newest(new).values()]


def compare(before: Iterable[Row], after: Iterable[Row]) -> Comparison:
    """The ratios of `after` against those of `before`, in the order of `after`."""
    old, new = newest(before), newest(after)
    changes = []
    for key, row in new.items():
        was = old.get(key)
        if was is None or was.ratio is None or row.ratio is None or was.variant == was.base == row.base:
            continue
        changes.append(_change(was, row, new.get((*case_of(row), was.base))))
    ran = {case_of(row) for row in new.values()}
    measured = {key for key, row in new.items() if row.ratio is not None}
    lost = [
        name_of(row)
        for key, row in old.items()
        if row.ratio is not None and case_of(row) in ran and key not in measured
    ]
    return Comparison(changes, lost, (len(old.keys() - new.keys()), len(new.keys() - old.keys())))


def _change(before: Row, after: Row, base: Row | None) -> Change:
    """`base` is the row, in the second set, of what `before` was divided by."""
    assert before.ratio is not None and after.ratio is not None
    fewer = min(before.repeats, after.repeats)
    if before.base != after.base:  # another way to compute the plain step was the fastest
        ratio = after.ratio / base.ratio if base is not None and base.ratio else after.ratio
        return Change(name_of(after), before.ratio, ratio, None, fewer)
    rounds = [row.round_ratios for row in (before, after)]
    if not all(rounds):
        return Change(name_of(after), before.ratio, after.ratio, None, fewer)
    interval = None
    if min(map(len, rounds)) >= ROUNDS:
        rng = np.random.default_rng(0)
        old, new = (_medians(ratios, rng) for ratios in rounds)
        low, high = np.quantile(new / old - 1, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        interval = float(low), float(high)
    return Change(name_of(after), statistics.median(rounds[0]), statistics.median(rounds[1]), interval, fewer)


def _medians(values: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    sample = np.asarray(values)
    drawn: np.ndarray = np.median(sample[rng.integers(0, len(sample), (RESAMPLES, len(sample)))], axis=1)
    return drawn


def show(found: Comparison, names: tuple[str, str], console: Console) -> None:
    """A table, the largest growth first; then what could not be compared."""
    table = Table(box=SIMPLE_HEAD, header_style="dim", padding=(0, 1))
    for column in ("case and variant", *names, "change", f"{LEVEL:.0%} interval", ""):
        table.add_column(escape(column), justify="left" if column == "case and variant" else "right")
    for change in sorted(found.changes, key=lambda c: -c.growth):
        interval = "" if change.interval is None else "{:+.1%} to {:+.1%}".format(*change.interval)
        mark = "[bold red]slower[/]" if change.exceeds() else ""
        if not mark and change.differs:
            mark = "[yellow]slower[/]" if change.growth > 0 else "[green]faster[/]"
        cells = (f"{change.before:.3f}", f"{change.after:.3f}", f"{change.growth:+.1%}", interval, mark)
        table.add_row(escape(change.name), *cells)
    console.print(table)
    say = functools.partial(console.print, highlight=False, soft_wrap=True)
    say(
        f"{len(found.changes)} ratios compared; without a partner: {found.unmatched[0]} of {names[0]}, "
        f"{found.unmatched[1]} of {names[1]}."
    )
    if found.slower:
        say(f"[bold red]Slower by more than {LIMIT:.0%}:[/] {'; '.join(map(escape, found.slower))}.")
    if found.lost:
        say(f"[bold red]Without a number now:[/] {'; '.join(map(escape, found.lost))}.")


def machine_kind(facts: Mapping[str, object]) -> str:
    """A file name for the kind of machine: device, processor, instruction sets, threads; what :func:`case_of` holds."""
    where = "-".join(str(facts[name]) for name in ("device_name", "cpu") if facts[name]) or facts["machine"]
    native = facts["native_capability"] or "no-native"
    text = f"{where}-{facts['torch_capability']}-{native}-{facts['threads']}".lower()
    return "".join(c if c.isalnum() else "-" for c in text).strip("-")


def baseline_file(folder: Path, facts: Mapping[str, object]) -> Path:
    """Where the baseline of this kind of machine is."""
    return folder / f"{machine_kind(facts)}.jsonl"
