"""The digits experiment: its data, policy, search and analysis, and a run of seconds."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import aajr_kernels as aajr
from experiments import digits as experiment_digits
from experiments import load
from experiments.base import run_experiment
from experiments.digits import data, training
from experiments.digits.report import COMPARISON
from experiments.search import best, bisected
from experiments.statistics import t_interval
from experiments.store import Store

QUICK = load("digits").config(True)


def test_data_is_split_without_overlap_and_standardised():
    digits = data.load(3, (897, 400, 500))
    parts = (digits.train, digits.validation, digits.test)
    assert [len(part) for part in parts] == [897, 400, 500]
    x = torch.cat([part.x for part in parts])
    assert x.min() == 0 and x.max() == 1
    other = data.load(4, (897, 400, 500))
    everything = torch.cat([part.x for part in (other.train, other.validation, other.test)])
    assert not torch.equal(x, everything) and torch.equal(x.sum(1).sort()[0], everything.sum(1).sort()[0])
    torch.testing.assert_close(digits.train.u.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(digits.train.u.std(0), torch.ones(4), atol=1e-5, rtol=0)
    again = data.load(3, (897, 400, 500))
    assert torch.equal(again.test.x, digits.test.x) and torch.equal(again.test.u, digits.test.u)


def test_moments_of_one_pixel_and_of_a_diagonal():
    x = torch.zeros(2, 8, 8)
    x[0, 0, 7] = 0.5  # first row, last column
    x[1] = torch.eye(8)
    ink, across, down, slant = data.moments(x.flatten(1)).T
    torch.testing.assert_close(ink, torch.tensor([0.5, 8.0]))
    torch.testing.assert_close(across, torch.tensor([1.0, 0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(down, torch.tensor([-1.0, 0.0]), atol=1e-6, rtol=0)
    assert slant[0].abs() < 1e-6 and slant[1] > 0.4


def test_the_fisher_metric_of_both_heads_is_twice_the_divergence():
    torch.manual_seed(0)
    policy = training.make_policy(16, 0).double()
    x, v = torch.rand(5, 64).double(), torch.randn(5, 64).double()
    q = training.fisher(policy(aajr.dual(x, v)))[0]
    t = 1e-4
    a, b = policy(x), policy(x + t * v)
    p = a[:, :10].softmax(1)
    categorical = (p * (a[:, :10].log_softmax(1) - b[:, :10].log_softmax(1))).sum(1)
    gaussian = 0.5 * (a[:, 10:] - b[:, 10:]).square().sum(1)
    # third-order terms are of size t, rounding of size eps / t²
    torch.testing.assert_close(q, 2 * (categorical + gaussian) / t**2, rtol=1e-2, atol=1e-6)


def row(weight: float, robust: float, nominal: float) -> dict[str, object]:
    return {"weight": weight, "validation": {"robust_accuracy": robust, "nominal": nominal}}


def test_the_cheapest_weight_that_reaches_the_target_is_chosen_else_the_most_robust():
    rows = [row(1, 0.5, 0.1), row(2, 0.7, 0.4), row(3, 0.6, 0.3), row(4, 0.9, 0.5)]
    for target, expected in ((0.6, 2), (0.95, 3)):
        assert best(rows, lambda one, target=target: experiment_digits.rank(one, target)) == expected


def test_a_bisection_goes_down_once_the_target_is_reached():
    assert bisected([], 0.5, 2.0) == 0.5
    assert bisected([False, True, True], 0.0, 2.0) == 1.0 - 0.5 - 0.25


def test_the_search_halves_its_stride_and_tests_the_chosen_one_alone(monkeypatch):
    monkeypatch.setattr(experiment_digits, "unit_weight", lambda *a: 2.0)
    tried = []

    def train(config, seed, part, method="none", weight=0.0):
        if method != "none":
            tried.append(weight)
        return weight

    def evaluate(config, policy, part, seed):
        return {"robust_accuracy": min(1.0, 0.3 * policy), "nominal": policy}

    monkeypatch.setattr(experiment_digits, "train", train)
    monkeypatch.setattr(experiment_digits, "evaluate", evaluate)
    rows = experiment_digits.work(QUICK | {"budget": 4, "target": 0.9}, 0, "aajr-l2")
    # reached from weight 3 on: 2 misses, 20 reaches, 2·√10 reaches, 2·10^¼ reaches
    assert tried == pytest.approx([2 * 10**e for e in (0, 1, 0.5, 0.25)])
    assert [r["chosen"] for r in rows] == [False, False, False, True]
    assert "test" in rows[3] and "test" not in rows[0] and all(r["unit"] == 2.0 for r in rows)


def test_methods_share_everything_but_the_penalty():
    digits = data.load(0, (64, 32, 32))
    config = QUICK | {"epochs": 1, "batch": 32, "width": 8}
    plain = training.train(config, 0, digits.train)
    for method in training.METHODS:  # a weight of zero leaves no trace of the method
        other = training.train(config, 0, digits.train, method, 0.0)
        for a, b in zip(plain.parameters(), other.parameters()):
            assert torch.equal(a, b)
    pushed = training.train(config, 0, digits.train, "aajr-l2", 1.0)
    assert not torch.equal(pushed[0].weight, plain[0].weight)


def test_a_stronger_attack_leaves_less_and_no_attack_leaves_the_accuracy():
    digits = data.load(0, (640, 64, 64))
    config = load("digits").config(False) | {"epochs": 6}
    policy = training.train(config, 0, digits.train)
    seen = [
        training.evaluate(config | {"radius": radius}, policy, digits.test, 0)["robust_accuracy"]
        for radius in (1e-6, 0.25, 0.5)
    ]
    accuracy = training.evaluate(config, policy, digits.test, 0)["accuracy"]
    assert seen[0] == accuracy > seen[1] > seen[2]


def test_differences_are_paired_by_seed():
    rows = [
        {"method": m, "seed": s, "chosen": c, "test": {"nominal": v}}
        for m, s, c, v in [
            ("a", 0, True, 1.0), ("a", 1, True, 5.0), ("a", 2, True, 2.0), ("a", 0, False, 9.0),
            ("b", 2, True, 1.5), ("b", 1, True, 4.0), ("b", 0, True, 0.75),
        ]
    ]  # fmt: skip
    assert COMPARISON.difference(rows, "a", "b", "nominal") == t_interval([0.25, 1.0, 0.5])


def test_a_small_run_and_its_page(tmp_path):
    experiment = load("digits")
    store = Store(tmp_path / "rows.jsonl", "digits", QUICK)
    run_experiment(experiment, store, quick=True)
    assert {r["method"] for r in store.rows} == {"none", *training.METHODS}
    for name in ("none", *training.METHODS):
        rows = [r for r in store.rows if r["method"] == name]
        assert len(rows) == (2 if name == "none" else 2 * QUICK["budget"])
        assert sum(r["chosen"] for r in rows) == 2
    page = experiment.report(store.header, store.rows, tmp_path)
    assert "AAJR, Fisher − spectral, Fisher" in page
    assert (tmp_path / "digits.png").stat().st_size > 10_000


@pytest.mark.slow
def test_two_processes_compute_the_same_rows(tmp_path):
    experiment = load("digits")
    config = QUICK | {"seeds": 1}
    small = type(experiment)(
        "digits", lambda quick: config, experiment.tasks, experiment.work, experiment.report
    )
    runs = []
    for jobs in (1, 2):
        store = Store(tmp_path / f"{jobs}.jsonl", "digits", config)
        run_experiment(small, store, jobs=jobs)
        rows = sorted(store.rows, key=lambda r: (r["task"], r["weight"]))
        runs.append([{k: v for k, v in r.items() if k != "seconds"} for r in rows])
    assert runs[0] == runs[1]
