"""The experiment on lazy penalties: its steps, its page."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from experiments import lazy, load
from experiments.digits import training
from experiments.digits.data import load as load_digits

QUICK = load("lazy").config(True)


def test_a_penalty_on_every_kth_step(monkeypatch):
    config, part = QUICK["digits"], load_digits(0, tuple(QUICK["digits"]["sizes"])).train
    calls = []
    measured = training.penalty
    monkeypatch.setattr(training, "penalty", lambda *a: calls.append(a) or measured(*a))
    for every, expected in ((1, 4), (2, 2), (3, 1), (8, 0)):
        calls.clear()
        training.train(config, 0, part, "aajr-fisher", 0.5, every=every)
        assert len(calls) == expected
    plain, never = (training.train(config, 0, part, *m) for m in ((), ("aajr-fisher", 0.5, None, 8)))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), never.parameters()))


def test_rows_and_page(tmp_path):
    rows = [row for seed in range(2) for row in lazy.work(QUICK, "digits", seed)]
    assert [row["every"] for row in rows] == [None, 1, 2] * 2
    assert all(row["robust"] >= row["nominal"] and row["seconds_per_step"] > 0 for row in rows)
    rows = [
        {**row, "part": part, "task": part, "seconds": 1.0} for part in ("digits", "language") for row in rows
    ]
    environment = dict(dirty=False, torch="2", python="3", cpu="c", machine="m", commit="0")
    page = load("lazy").report({"config": QUICK, "environment": environment}, rows, tmp_path)
    assert "| no penalty |" in page and (tmp_path / "lazy.png").stat().st_size > 10_000
