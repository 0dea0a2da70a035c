"""Two sets of rows against each other: two files (`python -m bench.compare BEFORE AFTER`), or a run and its baseline.

Ratios are compared, never times: both sides of a ratio are measured in the same process, interleaved. The interval is
the percentile bootstrap of the median over the rounds of either run; it covers these runs, not the
machine of another day.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape

from aajr_kernels.files import write_text
from common.command import fail, run

from .row import Row, latest, read_rows
from .run import Outcome
from .tables import grid, say, wide_console

LIMIT = 0.15  # largest growth of a ratio that passes
ROUNDS = 7  # with fewer an interval means little, and the growth decides
RESAMPLES, LEVEL = 4000, 0.95


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


def compare(before: Iterable[Row], after: Iterable[Row]) -> Comparison:
    """The ratios of `after` against those of `before`, in the order of `after`."""
    old, new = ({row.key: row for row in rows} for rows in (before, after))
    changes = []
    for key, row in new.items():
        was = old.get(key)
        if was is None or was.ratio is None or row.ratio is None or was.variant == was.base == row.base:
            continue
        changes.append(_change(was, row, new.get((*row.case_key, was.base))))
    cases = {row.case_key for row in new.values()}
    measured = {key for key, row in new.items() if row.ratio is not None}
    lost = [
        row.name
        for key, row in old.items()
        if row.ratio is not None and row.case_key in cases and key not in measured
    ]
    return Comparison(changes, lost, (len(old.keys() - new.keys()), len(new.keys() - old.keys())))


def _change(before: Row, after: Row, base: Row | None) -> Change:
    """`base` is the row, in the second set, of the base of `before`."""
    assert before.ratio is not None and after.ratio is not None
    old, new, fewer = before.round_ratios, after.round_ratios, min(before.repeats, after.repeats)
    if before.base != after.base:  # another way to compute the plain step was the fastest
        ratio = after.ratio / base.ratio if base is not None and base.ratio else after.ratio
        return Change(after.name, before.ratio, ratio, None, fewer)
    if not old or not new:
        return Change(after.name, before.ratio, after.ratio, None, fewer)
    interval = None
    if min(len(old), len(new)) >= ROUNDS:
        rng = np.random.default_rng(0)
        draws = [np.asarray(one)[rng.integers(0, len(one), (RESAMPLES, len(one)))] for one in (old, new)]
        medians = [np.median(draw, axis=1) for draw in draws]
        low, high = np.quantile(medians[1] / medians[0] - 1, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        interval = float(low), float(high)
    return Change(after.name, statistics.median(old), statistics.median(new), interval, fewer)


def show(comparison: Comparison, names: tuple[str, str], console: Console) -> None:
    """A table, the largest growth first; then the rows without a partner."""
    header = ("case and variant", *names, "change", f"{LEVEL:.0%} interval", "")
    rows = []
    for change in sorted(comparison.changes, key=lambda c: -c.growth):
        interval = "" if change.interval is None else "{:+.1%} to {:+.1%}".format(*change.interval)
        mark = "[bold red]slower[/]" if change.exceeds() else ""
        if not mark and change.differs:
            mark = "[yellow]slower[/]" if change.growth > 0 else "[green]faster[/]"
        cells = (f"{change.before:.3f}", f"{change.after:.3f}", f"{change.growth:+.1%}", interval, mark)
        rows.append((escape(change.name), *cells))
    console.print(grid(header, rows, left=header[:1], wrap=header[:1]))
    before, after = comparison.unmatched
    text = f"{len(comparison.changes)} ratios compared; without a partner: "
    text += f"{before} of {names[0]}, {after} of {names[1]}."
    if comparison.slower:
        text += (
            f"\n[bold red]Slower by more than {LIMIT:.0%}:[/] {'; '.join(map(escape, comparison.slower))}."
        )
    if comparison.lost:
        text += f"\n[bold red]Without a number now:[/] {'; '.join(map(escape, comparison.lost))}."
    say(console, text)


def files(before: Path, after: Path) -> None:
    """The ratios of the second file of rows against the first's, the largest growth first.

    Exit code 2: bad arguments, rows that cannot be read, or no ratio in common.
    """
    try:
        comparison = compare(read_rows(before), read_rows(after))
    except (OSError, ValueError) as error:
        fail(str(error))
    if not comparison.changes and not comparison.lost:
        fail("the files must have a ratio in common, of the same case on the same kind of machine, got none.")
    names = (before.stem, after.stem) if before.stem != after.stem else ("A", "B")
    show(comparison, names, wide_console())


# ------------------------------------------------------------------------------------------------------ baselines
def baseline_file(folder: Path, facts: Mapping[str, object]) -> Path:
    """The baseline of a kind of machine: device, processor, instruction sets and threads, as in ``Row.case_key``."""
    where = "-".join(str(facts[name]) for name in ("device_name", "cpu") if facts[name]) or facts["machine"]
    native = facts["native_capability"] or "no-native"
    text = f"{where}-{facts['torch_capability']}-{native}-{facts['threads']}".lower()
    return folder / f"{''.join(c if c.isalnum() else '-' for c in text).strip('-')}.jsonl"


def read_baseline(file: Path, update: bool) -> list[Row]:
    """The rows of a baseline, which need not exist where it is about to be written.

    Raises:
        ValueError: there is none to compare with, or it holds something else.
    """
    if not update and not file.exists():
        raise ValueError(
            f"there is no {file.name} for this kind of machine in {file.parent}: make one with --update on a "
            "commit that is known to be good."
        )
    return read_rows(file) if file.exists() else []


def write_baseline(file: Path, rows: Sequence[Row], results: Sequence[Outcome], console: Console) -> bool:
    """Replace the cases of a baseline that ran, unless one of them failed; whether that was done."""
    new = [row for result in results for row in result.rows]
    if not new or any(result.failures or result.broken for result in results):
        say(console, "[bold red]The baseline was not written:[/] a case failed, or nothing was measured.")
        return False
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [row.line() + "\n" for row in merged(rows, new)]
    write_text(file, "".join(lines))
    say(console, f"Baseline of {len(lines)} rows in {escape(str(file))}.")
    return True


def merged(old: Iterable[Row], new: Sequence[Row]) -> list[Row]:
    """`old` with the cases of `new` replaced as a whole."""
    replaced = {row.case_key for row in new}
    return [*(row for row in latest(old) if row.case_key not in replaced), *latest(new)]


def passes(rows: Sequence[Row], results: Sequence[Outcome], console: Console) -> bool:
    """Whether no ratio is too far above the baseline's `rows`, and none is gone."""
    new = [row for result in results for row in result.rows]
    # a case of the baseline that was asked for, under whatever configuration it runs now
    asked = {(r.case.suite, r.case.family, r.case.dtype, r.case.length) for r in results}
    expected = [row for row in rows if (row.suite, row.family, row.dtype, row.length) in asked]
    comparison = compare(expected, new)
    gone = comparison.unmatched[0] - len(comparison.lost)
    show(comparison, ("baseline", "now"), console)
    if gone > 0:
        console.print(
            f"[bold red]{gone} rows of the baseline have no counterpart:[/] write it anew with --update."
        )
    return not (comparison.slower or comparison.lost or gone > 0 or not comparison.changes)


if __name__ == "__main__":
    run(files, "bench.compare", "bench")
