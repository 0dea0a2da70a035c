"""Fixtures of the benchmarks' tests."""

from __future__ import annotations

import pytest
import torch
from toy_bench import FACTS, Toy

from bench import __main__ as command
from bench import gate, suites
from bench.case import Suite
from bench.suites import step


@pytest.fixture(autouse=True)
def allocator(monkeypatch):
    """Other tests of this process find the allocator as it was."""
    monkeypatch.setattr(command, "keep_memory", lambda: None)


@pytest.fixture(autouse=True)
def nothing_judged_before():
    gate._judged.clear()
    step.true_gradients.cache_clear()
    yield
    gate._judged.clear()
    step.true_gradients.cache_clear()


@pytest.fixture
def toy(monkeypatch) -> Toy:
    toy = Toy()
    monkeypatch.setattr(suites, "SUITES", {"toy": Suite("toy", "a toy", ("only",), toy.cases)})
    monkeypatch.setattr("bench.run.time", toy)
    monkeypatch.setattr(command, "environment", lambda: {**FACTS, "threads": torch.get_num_threads()})
    return toy
