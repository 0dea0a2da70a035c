"""Comparisons of methods paired by seed, their tables, and the page that they stand on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.pages import table
from common.plots import COLOURS

from .statistics import Interval, Outcome, outcomes, t_interval
from .store import Row

#: from the tested rows of a method, and all of its rows, to a cell of a table
Cell = Callable[[list[Row], list[Row]], object]


def interval_text(interval: Interval | None, digits: int = 3, sign: bool = True) -> str:
    """``+0.012 [−0.003, +0.027]``; bold where the interval leaves out zero; ``-`` for None."""
    if interval is None:
        return "-"
    form = f"{{:{'+' if sign else ''}.{digits}f}}"
    mean, low, high = (form.format(v).replace("-", "−") for v in interval)
    text = f"{mean} [{low}, {high}]"
    return f"**{text}**" if sign and (interval[1] > 0 or interval[2] < 0) else text


#: of :func:`outcome_cells`
PRIMARY_COLUMNS = ("n", "mean [95 % t interval]", "p", "p, sign flips", "p, Holm", "verdict")


def outcome_cells(outcome: Outcome, digits: int, margin: float | None) -> list[object]:
    """A primary difference: n, its mean and interval, its p values, and how it is judged."""
    verdict = outcome.verdict
    if verdict in ("lower", "higher"):
        verdict = f"**{verdict}**"
    elif verdict == "equivalent":
        verdict = f"within ±{margin:g}"
    p_values = [f"{p:.2g}" for p in (outcome.p, outcome.exact_p, outcome.corrected_p)]
    return [outcome.count, interval_text(outcome.interval, digits), *p_values, verdict]


def chosen_runs(rows: Sequence[Row]) -> dict[str, dict[int, list[Row]]]:
    """Method -> seed -> the rows that were tested: one, or one for every setting that an experiment varies."""
    methods: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        if row.get("chosen"):
            methods.setdefault(row["method"], {}).setdefault(row["seed"], []).append(row)
    return methods


def entry(*keys: str | int, factor: float = 1.0) -> Callable[[Row], float | None]:
    """The value under nested keys of a row, times a factor; None stays None."""

    def value(row: Row) -> float | None:
        inner: Any = row
        for key in keys:
            inner = inner[key]
        return None if inner is None else factor * float(inner)

    return value


@dataclass(frozen=True)
class Quantity:
    """A number that methods are compared by.

    Attributes:
        heading: of its column.
        value: from a tested row; None where the run broke off.
        digits: after the decimal point.
        primary: whether its differences are judged.
        margin: differences of at most this size count as none; of a primary quantity.
    """

    heading: str
    value: Callable[[Row], float | None]
    digits: int = 3
    primary: bool = False
    margin: float | None = None

    def mean(self, own: list[Row], _: list[Row] | None = None) -> str:
        """Mean over tested rows, as a cell."""
        values = [value for row in own if (value := self.value(row)) is not None]
        return f"{np.mean(values):.{self.digits}f}" if values else "-"


@dataclass(frozen=True)
class Comparison:
    """Methods that are compared in pairs, by the mean over seeds of ours − baseline.

    Attributes:
        names: method -> its name on the page, in the order of the tables.
        pairs: (ours, baseline).
        quantities: name -> quantity.
        greys: colours of the first methods, those without a penalty.
    """

    names: Mapping[str, str]
    pairs: Sequence[tuple[str, str]]
    quantities: Mapping[str, Quantity]
    greys: Sequence[str] = ("#444444",)

    @property
    def colours(self) -> dict[str, str]:
        return dict(zip(self.names, (*self.greys, *COLOURS)))

    def values(self, rows: Sequence[Row], method: str, quantity: str) -> dict[int, float]:
        """Seed -> mean over its tested rows; a seed with a run that broke off is left out."""
        means = {}
        for seed, own in sorted(chosen_runs(rows).get(method, {}).items()):
            values = [self.quantities[quantity].value(row) for row in own]
            whole = [value for value in values if value is not None]
            if len(whole) == len(values):
                means[seed] = float(np.mean(whole))
        return means

    def paired(self, rows: Sequence[Row], ours: str, baseline: str, quantity: str) -> list[float]:
        """Ours − baseline for the seeds that both have."""
        a, b = (self.values(rows, method, quantity) for method in (ours, baseline))
        return [a[seed] - b[seed] for seed in a if seed in b]

    def difference(self, rows: Sequence[Row], ours: str, baseline: str, quantity: str) -> Interval | None:
        """Mean over the seeds that both have of ours − baseline, with its 95 % t interval; None below two seeds."""
        differences = self.paired(rows, ours, baseline, quantity)
        return t_interval(differences) if len(differences) > 1 else None

    def differences(
        self,
        rows: Sequence[Row],
        pairs: Sequence[tuple[str, str]] | None = None,
        columns: Mapping[str, tuple[str, Sequence[Row]]] | None = None,
    ) -> str:
        """Table of paired differences.

        Args:
            rows: of all methods.
            pairs: others than those of the comparison.
            columns: heading -> quantity and rows; otherwise a column for every quantity.
        """
        if columns is None:
            columns = {quantity.heading: (name, rows) for name, quantity in self.quantities.items()}
        lines = []
        for ours, baseline in pairs or self.pairs:
            cells = [
                interval_text(self.difference(own, ours, baseline, name), self.quantities[name].digits)
                for name, own in columns.values()
            ]
            lines.append([f"{self.names[ours]} − {self.names[baseline]}", *cells])
        return table(["paired difference", *columns], lines)

    def primaries(self, rows: Sequence[Row]) -> dict[tuple[str, str, str], Outcome]:
        """Outcomes of all pairs in all primary quantities, by (ours, baseline, quantity): one family."""
        family = {}
        for ours, baseline in self.pairs:
            for name, quantity in self.quantities.items():
                differences = self.paired(rows, ours, baseline, name) if quantity.primary else []
                if len(differences) > 1:
                    family[ours, baseline, name] = (differences, quantity.margin)
        return dict(zip(family, outcomes(list(family.values()))))

    def primary_table(self, rows: Sequence[Row]) -> str:
        """Table of the primary differences with their tests, a line for every pair and quantity."""
        lines = []
        for (ours, baseline, name), outcome in self.primaries(rows).items():
            quantity = self.quantities[name]
            cells = outcome_cells(outcome, quantity.digits, quantity.margin)
            lines.append([f"{self.names[ours]} − {self.names[baseline]}", quantity.heading, *cells])
        return table(["primary difference", "of", *PRIMARY_COLUMNS], lines)

    def forest(self, axis: Any, rows: Sequence[Row], quantities: Sequence[str]) -> None:
        """Draw the differences of all pairs with their intervals, one below the other."""
        for shift, quantity in enumerate(quantities):
            for place, (ours, baseline) in enumerate(reversed(self.pairs)):
                interval = self.difference(rows, ours, baseline, quantity)
                if interval is None:
                    continue
                mean, low, high = interval
                axis.errorbar(
                    *(mean, place - 0.2 * (shift - (len(quantities) - 1) / 2)),
                    xerr=[[mean - low], [high - mean]],
                    fmt="os^"[shift],
                    color=self.colours[ours],
                    capsize=3,
                    markersize=4,
                    label=quantity if place == 0 and len(quantities) > 1 else None,
                )
        axis.axvline(0, color="black", linewidth=0.8)
        labels = [f"{self.names[ours]} −\n{self.names[baseline]}" for ours, baseline in reversed(self.pairs)]
        axis.set_yticks(range(len(labels)), labels, fontsize=7)


#: how the primary differences of a page are judged
TESTS = (
    "Intervals are Student's t over seeds. A primary difference is *lower* or *higher* where the p of the t test is "
    "below 0.05 after Holm's correction over all primaries of this page and so is, uncorrected, the exact p of all 2ⁿ "
    "sign flips, which assumes no normal distribution; *within* a margin where two one-sided t tests (TOST), corrected "
    "likewise, place it there; else *undecided*."
)
_SECONDARY = "Secondary differences are not corrected for their number."
#: the same, of the pages whose tests were chosen after their runs
ANALYSIS = (
    f"{TESTS} The analysis that was committed before the runs had percentile bootstrap intervals, which are too narrow "
    "for so few seeds, and no correction: tests and margins were chosen afterwards and computed from the same rows. "
    f"{_SECONDARY}"
)


def by_method(names: Mapping[str, str], rows: Sequence[Row], columns: Mapping[str, Cell]) -> str:
    """Table with a line for every method that was tested; a cell is made of its tested rows and of all its rows."""
    lines, by_seed = [], chosen_runs(rows)
    for method in (name for name in names if name in by_seed):
        own = [row for rows_of_seed in by_seed[method].values() for row in rows_of_seed]
        every = [row for row in rows if row["method"] == method]
        lines.append([names[method], *(cell(own, every) for cell in columns.values())])
    return table(["method", *columns], lines)


def geometric_mean(rows: Sequence[Row], name: str, form: str = ".3g") -> str:
    """Geometric mean of a value of the rows, as a cell; ``-`` where one of them is 0."""
    values = [row[name] for row in rows]
    return f"{np.exp(np.mean(np.log(values))):{form}}" if all(values) else "-"


def share_of(rows: Sequence[Row], holds: Callable[[Row], bool]) -> str:
    """``3 of 10``."""
    return f"{sum(map(bool, map(holds, rows)))} of {len(rows)}"


class _Listed(list[Any]):
    """Values that a template writes as ``1, 2 and 3``."""

    def __format__(self, form: str) -> str:
        *first, last = (format(value, form) for value in self)
        return f"{', '.join(first)} and {last}" if first else last


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _listed(one) for name, one in value.items()}
    return _Listed(map(_listed, value)) if isinstance(value, list) else value


def page(module: str, header: dict[str, Any], rows: Sequence[Row], **parts: Any) -> str:
    """The page of an experiment: ``page.md`` beside its module, filled in.

    Args:
        module: ``__file__`` of the caller.
        header: of the rows; the template reads its ``config``.
        rows: of all tasks, with their seconds.
        parts: what else the template names, beside ``tests``, how primary differences are judged, and ``analysis``, the
            same of tests that were chosen after the runs.
    """
    facts = header["environment"]
    change = ", with changes" if facts["dirty"] else ""
    seconds = sum({row["task"]: row["seconds"] for row in rows}.values())
    environment = (
        f"torch {facts['torch']}, Python {facts['python']}, {facts['cpu'] or facts['machine']}, one thread per task, "
        f"commit {facts['commit']}{change}; {seconds / 60:.1f} minutes of computation in all."
    )
    template = Path(module).with_name("page.md").read_text(encoding="utf-8")
    known = dict(config=_listed(header["config"]), environment=environment)
    known |= dict(tests=f"{TESTS} {_SECONDARY}", analysis=ANALYSIS)
    return template.format(**known, **parts)
