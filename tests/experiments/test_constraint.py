"""The experiment on the constraint: its runs, its criterion, its page."""

from __future__ import annotations

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from experiments import constraint, load
from experiments.constraint.report import is_met

QUICK = load("constraint").config(True)


def test_rows_and_page(tmp_path):
    tasks = load("constraint").tasks(QUICK)
    assert len({task.key for task in tasks}) == len(tasks) == 16
    rows = [
        {**row, "task": task.key, "seconds": 1.0}
        for task in tasks
        for row in constraint.work(**task.arguments)
    ]
    assert rows == [
        {**row, "task": t.key, "seconds": 1.0} for t in tasks for row in constraint.work(**t.arguments)
    ]
    for row in rows:
        assert (row["quantile_held_out"] <= row["gamma"]) == (row["within_held_out"] >= 0.95)
        assert [entry["step"] for entry in row["path"]] == [5] and row["multiplier"] > 0
    environment = dict(dirty=False, torch="2", python="3", cpu="c", machine="m", commit="0")
    page = load("constraint").report({"config": QUICK, "environment": environment}, rows, tmp_path)
    assert "γ = 3, 6 and 12, which bind" in page and "| 60 |" in page
    assert (tmp_path / "constraint.png").stat().st_size > 10_000


def test_the_criterion():
    """The mean within 2 % and every run within 4 %; a loose bound has at least 95 % and λ at its floor."""
    of = dict(followed="validation")
    at = lambda gamma, *shares, binding=1.0: [
        {**of, "gamma": gamma, "within_held_out": share, "binding": binding} for share in shares
    ]
    met_at = lambda rows, gamma: is_met(QUICK, rows, "validation", gamma)
    for shares, met in (
        ((0.92, 0.97), True),
        ((0.9, 0.97), False),
        ((0.92, 0.92), False),
        ((0.98, 0.975), False),
    ):
        assert met_at(at(3, *shares), 3) is met
    assert met_at(at(60, 0.95, 1.0, binding=0.0), 60)
    assert not met_at(at(60, 0.95, 1.0), 60) and not met_at(at(60, 0.94, binding=0.0), 60)
