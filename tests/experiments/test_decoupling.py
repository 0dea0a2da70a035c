"""The experiment on smoothness that is held at 1/η: its steps, its controller, its analysis, a run of seconds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from experiments import decoupling, load
from experiments.decoupling import training
from experiments.decoupling.report import NAMES, by_seed, comparison
from experiments.digits.data import CLASSES
from experiments.digits.data import load as digits_of
from experiments.digits.training import Sine, make_policy
from experiments.statistics import t_interval

FULL, QUICK = load("decoupling").config(False), load("decoupling").config(True)


@pytest.fixture
def part():
    return digits_of(0, (24, 8, 8)).train


def steep(seed: int = 0):
    return make_policy(8, seed, Sine, 8.0)


def test_smoothness_is_that_of_the_realised_steps(part):
    policy = steep().double()
    part = type(part)(part.x.double(), part.y, part.u.double())
    traj = training.fresh(training.Regime("fresh", 3, 0.5, 0.05), policy, part)
    measured = training.smoothness(policy, traj, part.y)
    assert measured.shape == (3, 24)
    d, h = torch.nn.functional.normalize(traj.displacements[1], dim=-1), 1e-5
    fisher, slopes = [], []
    for end in (traj.points[1], traj.points[2]):
        plus, minus = (policy(end + sign * h * d)[:, :CLASSES].detach() for sign in (1, -1))
        slope, p = (plus - minus) / (2 * h), policy(end)[:, :CLASSES].detach().softmax(-1)
        fisher.append((p * (slope - (p * slope).sum(-1, keepdim=True)).square()).sum(-1))
        slopes.append(slope)
    bend = (slopes[1] - slopes[0]).norm(dim=-1) / traj.displacements[1].norm(dim=-1)
    expected = torch.maximum(*fisher) + math.sqrt(2) * bend
    moved = ~measured[1].isnan()
    assert moved.sum() > 12
    torch.testing.assert_close(measured[1][moved], expected[moved], rtol=1e-4, atol=1e-6)


def test_lasting_perturbations_take_projected_steps_from_where_they_are(part):
    policy, regime = steep(), training.Regime("lasting", 1, 0.3, 0.15)
    generator = torch.Generator().manual_seed(0)
    delta = torch.nn.functional.normalize(torch.randn(part.x.shape, generator=generator), dim=-1)
    delta = 0.3 * delta * torch.linspace(0.1, 1.0, len(part)).unsqueeze(1)
    traj = training.going_on(regime, policy, part, delta)
    x = (part.x + delta).requires_grad_()
    loss = torch.nn.functional.cross_entropy(policy(x)[:, :CLASSES], part.y, reduction="sum")
    moved = delta + 0.15 * torch.autograd.grad(loss, x)[0]
    expected = moved * (0.3 / moved.norm(dim=-1, keepdim=True)).clamp(max=1.0)
    torch.testing.assert_close(traj.points[0], part.x + delta)
    torch.testing.assert_close(delta + traj.displacements[0], expected, rtol=1e-4, atol=1e-5)
    assert (moved.norm(dim=-1) > 0.3).any() and (moved.norm(dim=-1) < 0.3).any()


def settings_of(name: str, **changes):
    return QUICK | QUICK["settings"][name] | changes


def test_the_controller_raises_the_weight_until_the_smoothness_is_held(part):
    config = settings_of("lasting", updates=60, controller={"rate": 0.2}, learning_rate=0.01)
    regime = training.Regime("lasting", 1, 0.5, 0.25)
    within = {}
    for method in ("none", "aajr-l2"):
        _, history = training.train(config, 0, steep(), part, method, regime, 1.0)
        within[method] = history["within"]
        assert len(history["outer"]) == config["blocks"] and history["finite"]
    assert within["none"] < 0.8 and within["aajr-l2"] > within["none"] + 0.1
    # a bound that does not bind: λ goes down to its floor, which is no failure
    loose = training.Regime("lasting", 1, 0.5, 1e-4)
    _, history = training.train(config, 0, steep(), part, "aajr-l2", loose, 1.0)
    assert history["outcome"] == "held" and history["multiplier"] < config["weight"] / 100


def test_methods_share_start_and_batches(part):
    for name in ("fresh", "lasting"):
        config = settings_of(name, updates=3, batch=8)
        regime = training.Regime(name, 2 if name == "fresh" else 1, 0.5, 0.1)
        outer = {
            method: training.train(config, 0, steep(), part, method, regime, 0.0)[1]["outer"]
            for method in ("none", "spectral", "aajr-fisher")
        }
        assert outer["none"] == outer["spectral"] == outer["aajr-fisher"]


def test_outcomes_and_the_variance_about_a_line():
    outcome = lambda within, binding=True: training.outcome_of(FULL, within, binding)
    assert [outcome(w) for w in (0.5, 0.9, 0.92, 0.98, 1.0)] == ["infeasible"] * 2 + ["held"] * 2 + ["below"]
    assert outcome(1.0, False) == "held" and outcome(None) == "infeasible"
    line = [3.0 - 0.1 * i for i in range(40)]
    wave = [0.2 * (-1) ** i for i in range(40)]
    history = training.history(FULL, [a + b for a, b in zip(line, wave)], [0.0] * 30 + [0.9] * 10, True)
    assert history["variance"] == pytest.approx(0.04, rel=0.02) and history["within"] == pytest.approx(0.9)
    assert training.history(FULL, line, [1.0] * 40, True)["variance"] < 1e-20
    assert training.history(FULL, line, [1.0] * 40, False)["variance"] is None


def made(outcomes=None, **shift):
    noise = np.random.default_rng(0).normal(0, 0.004, (10, 3, len(NAMES)))
    rows = []
    for seed in range(10):
        for s, setting in enumerate(FULL["settings"]):
            for m, method in enumerate(NAMES):
                outcome = "infeasible" if method == "none" else (outcomes or {}).get((method, seed), "held")
                nominal = 0.5 + shift.get(method.replace("-", "_"), 0.0) + noise[seed, s, m]
                numbers = {"variance": 10 ** (-3 + (method == "none") + noise[seed, s, m]), "within": 0.95}
                numbers |= {"robust_loss": 2.0, "robust_accuracy": 0.4, "multiplier": 1.0, "nominal": nominal}
                facts = {"finite": True, "outcome": outcome, "eta": 0.2, "outer": [3.0, 2.0]}
                where = {"seed": seed, "setting": setting, "method": method, "task": "t", "seconds": 1.0}
                rows.append({**where, **numbers, **facts})
    return rows


def test_only_runs_that_hold_the_bound_are_compared():
    compared = comparison(FULL)
    rows = made({("spectral", 0): "infeasible", ("aajr-l2", 3): "below"}, aajr_l2=-0.1)
    merged = by_seed(rows)
    nominal = "nominal fresh"
    assert sorted(compared.values(merged, "spectral", nominal)) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    differences = compared.paired(merged, "aajr-l2", "spectral", nominal)
    assert len(differences) == 8
    outcome = compared.primaries(merged)["aajr-l2", "spectral", nominal]
    assert outcome.verdict == "lower" and outcome.interval == t_interval(differences)
    # nothing is held without a penalty, but its variance is compared
    assert ("aajr-l2", "none", nominal) not in compared.primaries(merged)
    assert compared.primaries(merged)["aajr-l2", "none", "variance"].verdict == "lower"
    assert compared.primaries(merged)["aajr-l2", "spectral", "variance"].verdict == "equivalent"


def test_page(tmp_path):
    environment = dict(dirty=False, torch="2", python="3", cpu="c", machine="m", commit="0")
    rows = made({("spectral", 0): "infeasible"})
    page = load("decoupling").report({"config": FULL, "environment": environment}, rows, tmp_path)
    assert "| global spectral | 9 | 0 | 1 |" in page and "fresh: 5.0 to 5.0" in page
    assert "within ±0.02" in page
    assert (tmp_path / "decoupling.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_small_run():
    tasks = load("decoupling").tasks(QUICK)
    assert len({task.key for task in tasks}) == len(tasks) == 6
    rows = decoupling.work(**tasks[1].arguments)
    assert [row["method"] for row in rows] == list(NAMES)
    assert rows == decoupling.work(**tasks[1].arguments)
    assert all(math.isfinite(row["nominal"]) and row["eta"] > 0 for row in rows)
