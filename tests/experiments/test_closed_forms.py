"""Strict inclusion and the step condition: small runs, and their closed forms."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from experiments import inclusion, load, step_condition
from experiments.base import run_experiment
from experiments.inclusion import problem
from experiments.step_condition import closed
from experiments.step_condition.report import totals
from experiments.store import Store


def test_inclusion_equals_its_closed_form(tmp_path):
    experiment = load("inclusion")
    store = Store(tmp_path / "rows.jsonl", "inclusion", experiment.config(True))
    run_experiment(experiment, store, quick=True)
    worst = inclusion.errors(store.rows)
    assert set(worst) == {"nominal", "spectral_norm", "excess", "scalar", "gap", "one output", "two classes"}
    assert max(worst.values()) < 1e-6, worst
    page = experiment.report(store.header, store.rows, tmp_path)
    assert "8.0000000" in page and (tmp_path / "inclusion.png").stat().st_size > 10_000


def test_the_closed_form_is_that_of_a_grid_search():
    a, b = torch.meshgrid(*[torch.linspace(0, 6, 601, dtype=torch.float64)] * 2, indexing="ij")
    loss = 0.5 * (a - 1) ** 2 + 0.5 * (b - 5) ** 2
    for gamma in (0.5, 1.0, 3.0):
        for bound, allowed in (("global", torch.maximum(a, b) <= gamma), ("aligned", a <= gamma)):
            best = torch.where(allowed, loss, math.inf).min().item()
            assert problem.closed_form(bound, gamma)["nominal"] == pytest.approx(best, abs=1e-12)
    assert problem.closed_form("global", 1.0) == {"nominal": 8.0, "spectral_norm": 1.0, "excess": 0.125}
    assert problem.closed_form("aligned", 1.0) == {"nominal": 0.0, "spectral_norm": 5.0, "excess": 0.125}


def test_a_gap_would_be_seen():
    """With more outputs than one the same measurement finds a gap."""
    linear = torch.nn.Linear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn, "Linear", lambda i, o: linear(i, 3 if o == 2 else o))
        assert inclusion.network_gap("two classes", 0) > 0.01


@pytest.mark.parametrize("family", closed.FAMILIES)
def test_kappa_is_the_supremum_over_the_segment(family):
    generator = torch.Generator().manual_seed(1)
    problems = closed.Problem(family, 64, generator)
    start = torch.randn(64, closed.TOKENS, closed.CHANNELS, generator=generator, dtype=torch.float64)
    delta = torch.randn(start.shape, generator=generator, dtype=torch.float64)
    delta[0] = 0
    kappa = problems.kappa(start, delta)
    d = delta / delta.flatten(1).norm(dim=1).clamp(min=1e-300).reshape(-1, 1, 1)
    sampled = torch.zeros(64, dtype=torch.float64)
    for s in torch.linspace(0, 1, 33, dtype=torch.float64):
        along = lambda t, s=s: problems.loss(start + s * delta + t.reshape(-1, 1, 1) * d)
        first = lambda t, along=along: torch.func.jvp(along, (t,), (torch.ones_like(t),))[1]
        zero = torch.zeros(64, dtype=torch.float64)
        bend = torch.func.jvp(first, (zero,), (torch.ones_like(zero),))[1]
        sampled = torch.maximum(sampled, -bend)
    assert (kappa[1:] > 0).any() and kappa[0] == 0
    assert (sampled <= kappa * (1 + 1e-12)).all()
    # a cosine sampled every 1/32 of the segment misses its peak by at most half the square of half the phase between
    phase = (problems.wave * delta.flatten(1)).sum(1).abs() / 32 if family == "wave" else torch.zeros(64)
    assert (kappa - sampled <= kappa * (phase**2 / 8 + 1e-12)).all()


def test_a_small_run_of_the_step_condition(tmp_path):
    experiment = load("step-condition")
    store = Store(tmp_path / "rows.jsonl", "step-condition", experiment.config(True))
    run_experiment(experiment, store, quick=True)
    whole = totals([row for row in store.rows if row["family"] != "network"])
    assert whole["trials"] > 3000 and whole["falls"] > 100 and whole["tight"] > 100
    assert whole["held_falls"] == whole["special_falls"] == whole["special_beyond"] == 0
    assert whole["carried_falls"] > 0
    page = experiment.report(store.header, store.rows, tmp_path)
    assert "**0 of" in page and (tmp_path / "step-condition.png").stat().st_size > 10_000


def test_an_underestimated_curvature_would_be_seen(monkeypatch):
    exact = closed.Problem.kappa
    monkeypatch.setattr(closed.Problem, "kappa", lambda self, x, delta: 0.9 * exact(self, x, delta))
    counts = totals(closed.trials("quadratic", 0, 128, 2))
    assert counts["held_falls"] > 0 and counts["special_falls"] > 0


def test_unprojected_quadratics_fall_exactly_where_the_condition_is_violated():
    counts = totals(closed.trials("quadratic", 3, 128, 2), projection="none")
    assert counts["falls"] == counts["trials"] - counts["held"] > 0


def test_runs_are_reproducible():
    arguments = dict(family="wave", seed=5, rows=8, steps=2)
    assert step_condition.work(**arguments) == step_condition.work(**arguments)
