"""Fixtures of the benchmarks' tests."""

from __future__ import annotations

import pytest
import torch
from toy_bench import FACTS, Toy

import bench as benchmarks
from bench import Suite, gate
from bench.suites import head, step


@pytest.fixture(autouse=True)
def allocator(monkeypatch):
    """Other tests of this process find the allocator as it was."""
    monkeypatch.setattr(benchmarks, "keep_memory", lambda: None)


@pytest.fixture(autouse=True)
def nothing_judged_before():
    for clear in (gate._judged.clear, step.true_gradients.cache_clear, head._truth.cache_clear):
        clear()
    head._plain_truth.cache_clear()
    yield
    gate._judged.clear()
    step.true_gradients.cache_clear()


@pytest.fixture
def toy(monkeypatch) -> Toy:
    found = Toy()
    monkeypatch.setattr(benchmarks, "SUITES", {"toy": Suite("toy", "a toy", ("only",), found.cases)})
    monkeypatch.setattr("bench.run.time", found)
    monkeypatch.setattr(benchmarks, "environment", lambda: {**FACTS, "threads": torch.get_num_threads()})
    return found
