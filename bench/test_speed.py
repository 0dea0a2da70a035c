"""The cases of `python -m bench` under pytest-benchmark: one benchmark per variant, grouped by case.

    pytest bench --benchmark-only                       # the ops
    pytest bench --benchmark-only -k "attention and d64" --benchmark-autosave --benchmark-compare

For statistics of single variants and for comparing two commits. Ratios to quote come from `python -m bench`, which
interleaves the variants. A case whose gradients are wrong fails here too, before anything is timed.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

pytest.importorskip("pytest_benchmark")

import torch

from .case import Case, Selection
from .gate import Verdict, check, on_backend
from .suites import SUITES

CASES = [
    case
    for suite in SUITES.values()
    for case in suite.cases(Selection())
    if case.timed and (case.device == "cpu" or torch.cuda.is_available())
]
PAIRS = [
    pytest.param(case, variant.name, id=f"{case.name} {variant.name}".replace(" ", "-"))
    for case in CASES
    for variant in case.variants
]


@functools.cache
def verdict(case: Case) -> Verdict:
    return check(case)


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_speed(benchmark: Any, case: Case, name: str) -> None:
    checked = verdict(case)
    assert not checked.failures, checked.failures
    if name in checked.left_out:
        pytest.skip(checked.left_out[name])
    variant = case.variant(name)
    benchmark.group = case.name
    benchmark.extra_info.update(config=dict(case.config), ops=checked.ops[name])
    with on_backend(variant):
        run = variant.make(case.length)
        # teardown frees the gradients of one step before the next, outside the clock
        benchmark.pedantic(
            run.call,
            teardown=run.reset,
            rounds=min(case.repeats, variant.rounds or case.repeats),
            warmup_rounds=1,
        )
