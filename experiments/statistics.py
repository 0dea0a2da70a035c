"""Intervals and tests for a few independent repetitions (seeds): what their mean supports.

scipy has them all but Holm's correction, which needs no more than the p values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

__all__ = [
    "Interval",
    "Outcome",
    "equivalence_p",
    "holm",
    "outcomes",
    "sign_flip_p",
    "t_interval",
    "t_test_p",
]

#: mean, lower and upper bound
Interval = tuple[float, float, float]
#: probability of an error that is accepted
LEVEL = 0.05
#: up to this number of values all sign flips are made, 2ⁿ of them
EXACT = 14


def _sample(values: Sequence[float]) -> np.ndarray:
    """
    Raises:
        ValueError: there are fewer than two values, or one is not finite.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or len(sample) < 2 or not np.isfinite(sample).all():
        raise ValueError(f"values must be two or more finite numbers, got {list(values)}.")
    return sample


def t_interval(values: Sequence[float], *, level: float = 1 - LEVEL) -> Interval:
    """Mean over independent repetitions, and Student's t interval of it.

    Args:
        values: one number per repetition; of a paired comparison, the differences.
        level: of the interval.

    Raises:
        ValueError: there are fewer than two values, or one is not finite.
    """
    sample = _sample(values)
    mean = float(sample.mean())
    if np.ptp(sample) == 0:
        return mean, mean, mean
    bounds = stats.ttest_1samp(sample, 0.0).confidence_interval(level)
    return mean, float(bounds.low), float(bounds.high)


def t_test_p(values: Sequence[float], mean: float = 0.0, alternative: str = "two-sided") -> float:
    """p of Student's t test that the expectation is `mean`; `alternative` as in scipy."""
    sample = _sample(values)
    if np.ptp(sample) == 0:  # no spread: certain on either side
        away = float(sample[0]) - mean
        return float(not {"two-sided": away != 0, "greater": away > 0, "less": away < 0}[alternative])
    return float(stats.ttest_1samp(sample, mean, alternative=alternative).pvalue)


def sign_flip_p(values: Sequence[float]) -> float:
    """Exact two-sided p that the values are symmetric about zero, from all 2ⁿ flips of their signs.

    It assumes no distribution, and is at least 2 / 2ⁿ: with five values it cannot be below 0.05. Beyond 14 values it is
    that of 20,000 random flips, the same ones every time.
    """
    sample = _sample(values)
    flips = np.inf if len(sample) <= EXACT else 20_000
    # a mean along an axis: scipy then computes all flips at once
    test = stats.permutation_test(
        *((sample,), lambda x, axis: np.mean(x, axis=axis)),
        permutation_type="samples",
        n_resamples=flips,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number: the k-th smallest of m is multiplied by m − k + 1 (Holm, 1979)."""
    order = np.argsort(p_values, kind="stable")
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, (len(p_values) - place) * float(p_values[index]))
        corrected[index] = min(largest, 1.0)
    return corrected


def equivalence_p(values: Sequence[float], margin: float) -> float:
    """p of two one-sided t tests (TOST): a small one places the expectation within ±`margin`."""
    return max(t_test_p(values, -margin, "greater"), t_test_p(values, margin, "less"))


@dataclass(frozen=True)
class Outcome:
    """Of one difference among several.

    Attributes:
        count: n.
        interval: mean and 95 % t interval.
        p: of the t test.
        exact_p: of all sign flips.
        corrected_p: of the t test, after Holm's correction over the family.
        equivalence_p: of the equivalence test, likewise corrected; None without a margin.
    """

    count: int
    interval: Interval
    p: float
    exact_p: float
    corrected_p: float
    equivalence_p: float | None

    @property
    def verdict(self) -> str:
        """``lower`` and ``higher`` are confirmed, ``equivalent`` within the margin; else ``undecided``."""
        if self.corrected_p < LEVEL and self.exact_p < LEVEL:
            return "lower" if self.interval[0] < 0 else "higher"
        if self.equivalence_p is not None and self.equivalence_p < LEVEL:
            return "equivalent"
        return "undecided"


def outcomes(family: Sequence[tuple[Sequence[float], float | None]]) -> list[Outcome]:
    """Outcomes of a family of differences.

    The sign flips are a second condition and not corrected: 2 / 2ⁿ is more than Holm's first bound of a family of a
    dozen for n up to 8, so that no difference could be confirmed, however large.

    Args:
        family: the differences of every comparison, one per seed, and the margin of equivalence or None.
    """
    p_values = [t_test_p(values) for values, _ in family]
    within = {
        i: equivalence_p(values, margin) for i, (values, margin) in enumerate(family) if margin is not None
    }
    equivalence = dict(zip(within, holm(list(within.values()))))
    return [
        Outcome(len(values), t_interval(values), p, sign_flip_p(values), corrected, equivalence.get(index))
        for index, ((values, _), p, corrected) in enumerate(zip(family, p_values, holm(p_values)))
    ]
