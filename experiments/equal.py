"""Methods compared where they are equal: at the same bound, and at the same realised sensitivity along the ascent.

Rows have ``method``, ``seed``, ``gamma`` and ``realised``, the quantile of ‖J u‖ on inputs that were not learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from common.pages import table

from .statistics import Outcome, outcomes
from .store import Row
from .summaries import PRIMARY_COLUMNS, outcome_cells

Value = Callable[[Row], float]
#: points of the common range at which two curves are compared
POINTS = 101


def at_equal_bound(
    rows: Sequence[Row],
    ours: str,
    baseline: str,
    value: Value,
    gammas: Sequence[float],
    is_valid: Callable[[Row], bool],
) -> list[float]:
    """Ours − baseline for every seed: the mean over the bounds at which both runs are valid; without one, left out."""
    valid = {
        (row["method"], row["seed"], row["gamma"]): row
        for row in rows
        if row["method"] in (ours, baseline) and row["gamma"] in gammas and is_valid(row)
    }
    differences = []
    for seed in sorted({seed for _, seed, _ in valid}):
        pairs = [(valid.get((ours, seed, gamma)), valid.get((baseline, seed, gamma))) for gamma in gammas]
        both = [value(a) - value(b) for a, b in pairs if a is not None and b is not None]
        if both:
            differences.append(float(np.mean(both)))
    return differences


def at_equal_realised(
    rows: Sequence[Row], ours: str, baseline: str, value: Value, gammas: Sequence[float]
) -> list[float]:
    """Ours − baseline for every seed: the mean over the range of log ``realised`` that the runs of both methods cover.

    Between its runs a method's value is interpolated linearly in log ``realised``. A run need not meet its bound, as
    what it reached is measured; a seed whose runs have no common range is left out.
    """
    differences = []
    for seed in sorted({row["seed"] for row in rows}):
        curves = []
        for method in (ours, baseline):
            own = [r for r in rows if (r["method"], r["seed"]) == (method, seed) and r["gamma"] in gammas]
            curves.append(sorted((float(np.log(row["realised"])), value(row)) for row in own))
        if not all(curves):
            continue
        low, high = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
        if high > low:
            at = np.linspace(low, high, POINTS)
            mine, theirs = (np.interp(at, [x for x, _ in curve], [y for _, y in curve]) for curve in curves)
            differences.append(float(np.mean(mine - theirs)))
    return differences


@dataclass(frozen=True)
class Primary:
    """One primary difference.

    Attributes:
        comparison: ours − baseline, in words.
        of: what is compared, and where.
        differences: one per seed.
        margin: differences of at most this size count as none.
    """

    comparison: str
    of: str
    differences: list[float]
    margin: float


def judged(primaries: Sequence[Primary]) -> list[tuple[Primary, Outcome]]:
    """With their outcomes, as one family; those with fewer than two seeds are left out."""
    family = [one for one in primaries if len(one.differences) > 1]
    return list(zip(family, outcomes([(one.differences, one.margin) for one in family])))


def primary_table(primaries: Sequence[Primary]) -> str:
    """A line for every primary difference; ``-`` where there are fewer than two seeds."""
    known = {id(one): outcome for one, outcome in judged(primaries)}
    lines: list[Sequence[object]] = []
    for one in primaries:
        outcome = known.get(id(one))
        rest = len(PRIMARY_COLUMNS) - 1
        cells = (
            [len(one.differences), *["-"] * rest]
            if outcome is None
            else outcome_cells(outcome, 3, one.margin)
        )
        lines.append([one.comparison, one.of, *cells])
    return table(["primary difference", "of", *PRIMARY_COLUMNS], lines)


def verdict(family: Sequence[Primary], places: Mapping[str, str], subject: str) -> str:
    """How many primary differences are lower, higher, equivalent and undecided, a sentence for every place.

    Args:
        family: all primaries, whose `of` starts with a letter of `places`.
        places: letter -> the place in words, at the start of the sentence.
        subject: what is lower or higher.
    """
    sentences = []
    for letter, place in places.items():
        verdicts = [outcome.verdict for one, outcome in judged(family) if one.of.startswith(letter)]
        lower, higher, equivalent, undecided = (
            verdicts.count(name) for name in ("lower", "higher", "equivalent", "undecided")
        )
        sentences.append(
            f"{place} {subject} is lower in {lower}, higher in {higher}, within the margin in {equivalent} and "
            f"undecided in {undecided} of {len(verdicts)} comparisons."
        )
    return " ".join(sentences)
