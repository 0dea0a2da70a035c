"""The minimax experiment: its training, search and analysis, and a run of seconds."""

from __future__ import annotations

import copy
import math
from collections import Counter

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from experiments import load
from experiments.base import run_experiment
from experiments.digits import data
from experiments.digits.training import unit_weight
from experiments.minimax import rank, training, work
from experiments.minimax.report import COMPARISON
from experiments.search import best, interpolated
from experiments.statistics import t_interval
from experiments.store import Store

FULL, QUICK = load("minimax").config(False), load("minimax").config(True)


@pytest.fixture(scope="module")
def digits():
    return data.load(0, (897, 400, 500))


@pytest.fixture(scope="module")
def start(digits):
    return training.pretrain(FULL, 0, digits.train)


def test_only_steps_beyond_the_bound_of_the_starting_policy_fall(digits, start):
    kappa_0 = training.curvature(FULL, start, digits.validation)
    reports = {}
    for factor in (0.5, 8.0):
        traj = training.inner_ascent(FULL, start, digits.validation, factor * 2 / kappa_0)
        reports[factor] = training._report(start, digits.validation, traj)
    assert not reports[0.5].non_monotone.any() and not reports[0.5].violated.any()
    assert reports[8.0].non_monotone.float().mean() > 0.02
    assert (reports[8.0].violated | ~reports[8.0].non_monotone).float().mean() > 0.99


def test_methods_share_everything_but_the_penalty(digits, start):
    config = FULL | {"epochs": 2}
    part = digits.train[slice(0, 256)]
    before = copy.deepcopy(start.state_dict())
    plain, plain_history = training.tune(config, 0, start, part, "none", 0.1, mix=1.0, weight=0.0)
    for method in training.METHODS[1:]:  # a weight of zero leaves no trace of the method
        other, history = training.tune(config, 0, start, part, method, 0.1, mix=1.0, weight=0.0)
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters()))
        assert history == plain_history
    pushed, _ = training.tune(config, 0, start, part, "aajr-l2", 0.1, mix=1.0, weight=1.0)
    heavier, _ = training.tune(config, 0, start, part, "none", 0.1, mix=9.0, weight=0.0)
    assert not torch.equal(pushed[0].weight, plain[0].weight)
    assert not torch.equal(heavier[0].weight, plain[0].weight)
    assert all(torch.equal(before[name], value) for name, value in start.state_dict().items())


def unit_of(policy, part, method):
    ascent = lambda config, policy, part, _: training.inner_ascent(config, policy, part, 0.1)
    return unit_weight(FULL, 0, method, policy, part, ascent)


def test_penalties_make_the_policy_less_sensitive_than_training_without(digits, start):
    part = digits.train[slice(0, 512)]
    config = FULL | {"epochs": 3}
    none, _ = training.tune(config, 0, start, part, "none", 0.1, mix=1.0, weight=0.0)
    for method in ("frobenius", "aajr-fisher"):
        unit = unit_of(start, part, method)
        tuned, _ = training.tune(config, 0, start, part, method, 0.1, mix=1.0, weight=unit)
        assert unit_of(tuned, part, method) > 1.2 * unit_of(none, part, method)


def test_history():
    trend = [0.1 * step for step in range(8)]
    summary = training.history([0.0, 0.5, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0], trend, 4, True)
    assert summary["falls"] == [0.375, 0.25] and summary["outer"] == pytest.approx([0.15, 0.55])
    # a straight line has variance, by its slope; its jitter is half the square of a step
    assert summary["variance"] == pytest.approx(torch.tensor(trend[4:]).var().item())
    assert summary["jitter"] == pytest.approx(0.005)
    assert summary["diverged"] is False
    assert training.history([0.0] * 4, [math.log(10) + 1.01] * 4, 2, True)["diverged"]
    broken = training.history([], [], 4, False)
    assert broken["diverged"] and broken["variance"] is None and broken["jitter"] is None


def test_a_run_that_is_not_finite_ends_before_the_update(digits, start, monkeypatch):
    calls = []

    def penalty(method, policy, *rest):
        calls.append(method)
        return policy[0].weight.sum() * (math.inf if len(calls) == 3 else 0.0)

    monkeypatch.setattr(training, "penalty", penalty)
    part = digits.train[slice(0, 256)]
    policy, history = training.tune(FULL, 0, start, part, "frobenius", 0.1, mix=1.0, weight=1.0)
    assert len(calls) == 3 and history["diverged"] and not history["finite"]
    assert all(parameter.isfinite().all() for parameter in policy.parameters())


def test_attacks_only_make_it_worse(digits, start):
    part = digits.test[slice(0, 64)]
    config = FULL | {"attack": FULL["attack"] | {"steps": 5}}
    result = training.evaluate(config, start, part, 0, 0.1)
    tiny = training.evaluate(config | {"radius": 1e-6}, start, part, 0, 0.1)
    assert (
        result["robust_loss"] > 2 * result["cross_entropy"] and result["robust_accuracy"] < result["accuracy"]
    )
    # the loss changes by at most its gradient, of norm below 30, times the radius
    assert tiny["robust_loss"] == pytest.approx(tiny["cross_entropy"], abs=3e-5)
    assert tiny["robust_accuracy"] == tiny["accuracy"]


def test_the_search_strides_to_a_bracket_and_interpolates_there():
    assert interpolated([], 1.0, -0.5, 0.5) == -0.5
    assert interpolated([(-0.5, 0.8)], 1.0, -0.5, 0.5) == 0.0
    assert interpolated([(-0.5, 1.2)], 1.0, -0.5, 0.5) == -1.0
    assert interpolated([(-0.5, 0.8), (0.0, 1.2)], 1.0, -0.5, 0.5) == pytest.approx(-0.25)
    assert interpolated([(0.0, 0.8), (1.0, 2.8)], 1.0, 0.0, 1.0) == pytest.approx(0.1)
    assert interpolated([(0.0, 0.99), (1.0, 2.8)], 1.0, 0.0, 1.0) == pytest.approx(0.1)  # a tenth at least
    tried: list[tuple[float, float]] = []
    for _ in range(6):
        exponent = interpolated(tried, 0.55, -0.5, 0.5)
        tried.append((exponent, 0.5 + 0.1 * 10**exponent))
    assert min(abs(loss / 0.55 - 1) for _, loss in tried) < 0.005


def row(nominal: float, finite: bool = True) -> dict[str, object]:
    return {"validation": {"nominal": nominal}, "finite": finite}


def test_the_run_nearest_to_the_target_is_tested_broken_ones_last():
    nearest = lambda *rows: best(list(rows), lambda one: rank(one, 1.0))
    assert nearest(row(0.5), row(0.9), row(1.2)) == 1
    assert nearest(row(0.8), row(1.2)) == 1  # by ratio: 1.25 and 1.2
    assert nearest(row(1.0, False), row(2.0)) == 1
    assert nearest(row(1.0, False), row(2.0, False)) == 0


def test_every_method_gets_the_same_target_and_number_of_runs():
    rows = work(QUICK | {"budget": 2}, 0, 1.0)
    plain = rows[0]
    assert plain["method"] == "plain" and plain["knob"] == 1.0
    assert {r["target"] for r in rows} == {1.1 * plain["validation"]["nominal"]}
    assert Counter(r["method"] for r in rows[1:]) == dict.fromkeys(training.METHODS, 2)
    assert Counter(r["method"] for r in rows if r["chosen"]) == dict.fromkeys(COMPARISON.names, 1)
    assert all(("test" in r) == r["chosen"] for r in rows)
    assert all(r["eta"] == pytest.approx(2 / r["kappa_0"]) for r in rows)


def outcome(method: str, key: tuple[int, float], loss: float, variance: float | None) -> dict[str, object]:
    fields = {"method": method, "seed": key[0], "factor": key[1], "chosen": True, "falls": [0.0, 0.5]}
    return fields | {"variance": variance, "test": {"robust_loss": loss}}


def test_differences_are_paired_by_seed_and_averaged_over_step_sizes():
    ours = {(0, 1): 1.0, (0, 8): 2.0, (1, 1): 5.0, (1, 8): 5.0, (2, 1): 0.0, (2, 8): 0.0}
    other = {(0, 1): 0.5, (0, 8): 1.0, (1, 1): 4.0, (1, 8): 3.0, (2, 1): 0.5, (2, 8): 0.5}
    rows = [outcome("aajr-l2", key, loss, 1.0) for key, loss in ours.items()]
    rows += [outcome("none", key, loss, None if key == (1, 8) else 0.75) for key, loss in other.items()]
    rows.append(outcome("none", (0, 1), 99.0, 1.0) | {"chosen": False})
    compare = lambda rows, quantity: COMPARISON.difference(rows, "aajr-l2", "none", quantity)
    assert compare(rows, "robust_loss") == t_interval([0.75, 1.5, -0.5])
    last = [row for row in rows if row["factor"] == 8]
    assert compare(last, "robust_loss") == t_interval([1.0, 2.0, -0.5])
    # a seed with a run that broke off has no variance at all step sizes
    assert compare(rows, "variance") == t_interval([25.0, 25.0])
    judged = COMPARISON.primaries(rows)
    assert [name for *_, name in judged] == ["falls", "variance", "robust_loss"]
    assert judged["aajr-l2", "none", "falls"].verdict == "equivalent"  # the same in all runs
    assert judged["aajr-l2", "none", "robust_loss"].verdict == "undecided"
    # two seeds flip to a p of 1/2 at least, however sure the t test is
    variance = judged["aajr-l2", "none", "variance"]
    assert variance.corrected_p == 0 and variance.exact_p == 0.5 and variance.verdict == "undecided"


@pytest.mark.slow
def test_a_small_run_and_its_page(tmp_path):
    experiment = load("minimax")
    store = Store(tmp_path / "rows.jsonl", "minimax", QUICK)
    run_experiment(experiment, store, quick=True)
    assert len(store.rows) == 4 * (1 + len(training.METHODS))
    page = experiment.report(store.header, store.rows, tmp_path)
    assert "AAJR, Fisher − AAJR, l2" in page and "**Common target: 1.1 times" in page
    assert (tmp_path / "minimax.png").stat().st_size > 10_000
    broken = [r | {"variance": None, "jitter": None, "finite": False, "diverged": True} for r in store.rows]
    assert "diverged (chosen)" in experiment.report(store.header, broken, tmp_path)
