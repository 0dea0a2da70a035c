"""Intervals and tests of the experiments: against tables, enumeration by hand, and their promises on simulated data."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from experiments import statistics as ours
from experiments.summaries import Comparison, Quantity


def test_t_interval():
    """Against the table of Student's distribution: 12.706 for one degree of freedom, 2.776 for four."""
    assert ours.t_interval([1.0, 3.0]) == pytest.approx((2.0, 2 - 12.7062, 2 + 12.7062), abs=1e-3)
    sample = [1.0, 2.0, 3.0, 4.0, 5.0]
    half = 2.7764 * (2.5 / 5) ** 0.5
    assert ours.t_interval(sample) == pytest.approx((3.0, 3 - half, 3 + half), abs=1e-3)
    assert ours.t_interval([2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0)
    for bad in ([1.0], [1.0, math.nan]):
        with pytest.raises(ValueError, match="two or more finite numbers"):
            ours.t_interval(bad)


def test_p_and_interval_say_the_same():
    """A p of 0.05 is where the interval ends at zero."""
    sample = np.array([1.0, 2.5, -0.5, 3.0, 1.5])
    _, low, _ = ours.t_interval(sample)
    assert ours.t_test_p(sample - low) == pytest.approx(0.05) and ours.t_test_p(sample) > 0.05
    for alternative, p in (("two-sided", 0.0), ("greater", 0.0), ("less", 1.0)):
        assert ours.t_test_p([0.5, 0.5], 0.0, alternative) == p
    assert ours.t_test_p([0.0, 0.0]) == 1.0


@pytest.mark.parametrize("sample", [[1.0, 2.0, 3.0], [0.3, -0.1, 0.7, 0.2, 0.05, -0.4], [0.0, 0.0, 1.0]])
def test_sign_flips_are_counted(sample):
    flips = [np.dot(signs, sample) for signs in itertools.product([-1, 1], repeat=len(sample))]
    share = np.mean(np.abs(flips) >= abs(sum(sample)) * (1 - 1e-12))
    assert ours.sign_flip_p(sample) == pytest.approx(share)


def test_sign_flips_of_seeds_that_agree_and_of_many_values():
    for n in (2, 5, 8, 10):
        assert ours.sign_flip_p(np.linspace(1, 2, n)) == pytest.approx(2.0 ** (1 - n))
    many = np.random.default_rng(1).normal(0.3, 1, 30)
    assert ours.sign_flip_p(many) == ours.sign_flip_p(many)
    # drawn flips: four standard errors of a share of 20,000
    p = ours.t_test_p(many)
    assert abs(ours.sign_flip_p(many) - p) < 0.02


def test_holm():
    """The example of Holm's rule in textbooks: 0.01, 0.04, 0.03, 0.005 of four."""
    assert ours.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert ours.holm([0.5, 0.9]) == [1.0, 1.0] and ours.holm([]) == []


def test_equivalence():
    sample = [0.1, -0.1, 0.05, -0.05, 0.0]
    # 2.132 is the 95 % quantile of Student's distribution with four degrees of freedom: there p is 0.05
    error = np.std(sample, ddof=1) / 5**0.5
    assert ours.equivalence_p(sample, 2.1318 * error) == pytest.approx(0.05, abs=1e-4)
    assert ours.equivalence_p(sample, 0.01) > 0.3 and ours.equivalence_p(np.add(sample, 1), 0.5) > 0.99


def test_verdicts():
    spread = np.array([-0.1, 0.1, -0.05, 0.05, 0.0, 0.02, -0.02, 0.01])
    family = [
        (1 + spread, 0.2), (spread - 1, None), (0.1 * spread, 0.2), (spread, None), (0.3 + spread[:4], 0.2)
    ]  # fmt: skip
    judged = ours.outcomes(family)
    assert [o.verdict for o in judged] == ["higher", "lower", "equivalent", "undecided", "undecided"]
    assert [o.corrected_p for o in judged] == ours.holm([o.p for o in judged])
    within = ours.holm([ours.equivalence_p(values, margin) for values, margin in family if margin])
    assert [o.equivalence_p for o in judged] == [within[0], None, within[1], None, within[2]]
    # four seeds that agree have an exact p of 1/8, and confirm nothing
    assert judged[4].corrected_p < 0.05 < judged[4].exact_p == 0.125


def test_false_confirmations_are_rarer_than_the_level():
    """Families of nine without a difference: one in twenty at most has a confirmed one, within three deviations."""
    generator = np.random.default_rng(0)
    trials, wrong = 60, 0
    for _ in range(trials):
        family = [(generator.normal(0, 1, 8), None) for _ in range(9)]
        wrong += any(o.verdict != "undecided" for o in ours.outcomes(family))
    assert wrong <= trials * 0.05 + 3 * (trials * 0.05 * 0.95) ** 0.5


def test_the_family_is_that_of_the_page():
    rows = [
        {"method": m, "seed": s, "chosen": True, "a": s + shift, "b": 0.001 * s * shift}
        for m, shift in (("ours", 1.0), ("one", 2.0), ("two", 1.5))
        for s in range(8)
    ]
    quantities = {
        "a": Quantity("loss", lambda row: row["a"], primary=True, margin=0.1),
        "b": Quantity("other", lambda row: row["b"]),
    }
    compared = Comparison(
        {m: m for m in ("ours", "one", "two")}, [("ours", "one"), ("ours", "two")], quantities
    )
    assert {key: o.verdict for key, o in compared.primaries(rows).items()} == {
        ("ours", "one", "a"): "lower",
        ("ours", "two", "a"): "lower",
    }
    line = "| ours − two | loss | 8 | **−0.500 [−0.500, −0.500]** | 0 | 0.0078 | 0 | **lower** |"
    assert line in compared.primary_table(rows)
