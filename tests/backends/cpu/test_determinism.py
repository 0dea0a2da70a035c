"""Bitwise equal results over runs, for every number of threads, whatever the scheduling; and in several callers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ops.suite import Target

from aajr_kernels.testing.cases.case import Case, Result, outcome
from aajr_kernels.testing.cases.products import attention, head
from aajr_kernels.testing.cases.rows import gated, layer, linear, pointwise, reduction, rms, rotary
from common.trust import count as counted

#: more rows, heads and words than threads, and no number that three divides
LARGE = [
    rms("deterministic", 129, batch=(5, 41)),
    layer("deterministic", 129, batch=(5, 41)),
    pointwise("gelu", "deterministic", 5, 41, 129),
    gated("silu", "deterministic", 5, 41, 129),
    rotary("deterministic", (2, 3, 41, 36), (2, 41, 36)),
    linear("deterministic", (2, 71), (65, 40)),
    attention("deterministic", (2, 4, 2, 130, 130, 36, 20), causal=True),
    attention("bias, deterministic", (2, 4, 2, 67, 70, 16, 16), bias=(4, 1, 70)),
    head("fisher", "deterministic", (2, 73), 36, 601, bias=True, labelled=True),
    head("probs", "deterministic", (2, 7), 36, 601),
    reduction("fisher", "deterministic", 5, 41, 129),
]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def skip_unless_native(case: Case) -> None:
    reason = Target("native").why_not(case.op)
    if reason is not None:
        pytest.skip(reason)


def prepared(case: Case, dtype: torch.dtype) -> tuple[list, list, torch.Tensor]:
    inputs, params = case.build(2)
    inputs, params = [t.to(dtype) for t in inputs], [t.to(dtype) for t in params]
    return inputs, params, torch.randn(case.ours(inputs, params).shape).to(dtype)


def assert_same(a: Result, b: Result) -> None:
    assert torch.equal(a.y, b.y)
    for i, (x, y) in enumerate(zip(a.gradients, b.gradients)):
        assert torch.equal(x, y), f"gradient {i} differs by {(x.double() - y.double()).abs().max()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_runs_are_bitwise_equal(case, dtype, threads):
    skip_unless_native(case)
    with Target("native").active():
        problem = prepared(case, dtype)
        for count in (1, 2, 3):
            threads(count)
            first = outcome(case.ours, *problem)
            assert all(torch.isfinite(t).all() for t in [first.y, *first.gradients])
            for _ in range(4):
                assert_same(first, outcome(case.ours, *problem))


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_callers_at_the_same_time_do_not_disturb_each_other(case, threads):
    skip_unless_native(case)
    threads(2)
    with Target("native").active():
        problem = prepared(case, torch.float32)
        alone = outcome(case.ours, *problem)

        def call(_: int) -> Result:
            torch.set_num_threads(2)  # a setting of each thread
            return outcome(case.ours, *problem)

        with ThreadPoolExecutor(4) as pool:
            for result in pool.map(call, range(8)):
                assert_same(alone, result)
    counted("callers", problems=1, calls=8)
