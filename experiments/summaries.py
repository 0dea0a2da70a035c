"""Intervals, comparisons of methods paired by seed, their tables and sentences, and the page that they stand on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.pages import table
from common.plots import COLOURS

from .store import Row

#: mean, lower and upper bound
Interval = tuple[float, float, float]
#: from the tested rows of a method, and all of its rows, to a cell of a table
Cell = Callable[[list[Row], list[Row]], object]


def bootstrap_interval(
    values: Sequence[float], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean, and the percentile bootstrap interval of the mean over independent repetitions (seeds).

    Args:
        values: one number per repetition; of a paired comparison, the differences.
        level: of the interval.
        resamples: drawn with replacement.
        seed: of the resampling.

    Raises:
        ValueError: there are fewer than two values, or one is not finite.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or len(sample) < 2 or not np.isfinite(sample).all():
        raise ValueError(f"values must be two or more finite numbers, got {list(values)}.")
    draws = np.random.default_rng(seed).integers(0, len(sample), (resamples, len(sample)))
    means = sample[draws].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(sample.mean()), float(low), float(high)


def t_interval(values: Sequence[float], *, level: float = 0.95) -> Interval:
    """Mean over independent repetitions (seeds), and Student's t interval of it.

    Args:
        values: two or more numbers, one per repetition; of a paired comparison, the differences.
        level: of the interval.
    """
    from scipy import stats  # comes with scikit-learn

    sample = np.asarray(values, dtype=np.float64)
    mean, error = float(sample.mean()), float(sample.std(ddof=1)) / len(sample) ** 0.5
    half = float(stats.t.ppf((1 + level) / 2, len(sample) - 1)) * error
    return mean, mean - half, mean + half


def interval_text(interval: Interval | None, digits: int = 3, sign: bool = True) -> str:
    """``+0.012 [−0.003, +0.027]``; bold where the interval leaves out zero; ``-`` for None."""
    if interval is None:
        return "-"
    form = f"{{:{'+' if sign else ''}.{digits}f}}"
    mean, low, high = (form.format(v).replace("-", "−") for v in interval)
    text = f"{mean} [{low}, {high}]"
    return f"**{text}**" if sign and (interval[1] > 0 or interval[2] < 0) else text


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
        label: in the sentences on the primary quantities; empty: it is a secondary one.
    """

    heading: str
    value: Callable[[Row], float | None]
    digits: int = 3
    label: str = ""

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
        for seed, own in sorted(chosen_runs(rows)[method].items()):
            values = [self.quantities[quantity].value(row) for row in own]
            whole = [value for value in values if value is not None]
            if len(whole) == len(values):
                means[seed] = float(np.mean(whole))
        return means

    def difference(self, rows: Sequence[Row], ours: str, baseline: str, quantity: str) -> Interval | None:
        """Mean over the seeds that both have of ours − baseline, with its 95 % interval; None below two seeds."""
        a, b = (self.values(rows, method, quantity) for method in (ours, baseline))
        differences = [a[seed] - b[seed] for seed in a if seed in b]
        return bootstrap_interval(differences) if len(differences) > 1 else None

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

    def verdict(self, rows: Sequence[Row], ours: str, baseline: str) -> str:
        """One sentence on the primary quantities."""
        parts = []
        for name, quantity in self.quantities.items():
            interval = self.difference(rows, ours, baseline, name) if quantity.label else None
            if interval is not None and (interval[1] > 0 or interval[2] < 0):
                parts.append(f"{quantity.label} **{'lower' if interval[0] < 0 else 'higher'}**")
            elif quantity.label:
                parts.append(f"{quantity.label} indistinguishable")
        return f"- {self.names[ours]} against {self.names[baseline]}: {', '.join(parts)}."

    def verdicts(self, rows: Sequence[Row]) -> str:
        """The sentences of all pairs."""
        return "\n".join(self.verdict(rows, *pair) for pair in self.pairs)

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
        parts: what else the template names.
    """
    facts = header["environment"]
    change = ", with changes" if facts["dirty"] else ""
    seconds = sum({row["task"]: row["seconds"] for row in rows}.values())
    environment = (
        f"torch {facts['torch']}, Python {facts['python']}, {facts['cpu'] or facts['machine']}, one thread per task, "
        f"commit {facts['commit']}{change}; {seconds / 60:.1f} minutes of computation in all."
    )
    template = Path(module).with_name("page.md").read_text(encoding="utf-8")
    return template.format(config=_listed(header["config"]), environment=environment, **parts)
