"""Native kernels: bitwise equal results over 20 runs, for every number of threads, and in several callers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from backends.repeats import RUNS, assert_same, prepared, repeat
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


def skip_unless_native(case: Case) -> None:
    reason = Target("native").why_not(case.op)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize(
    ("dtype", "counts"),
    [(torch.float32, (1, 2)), pytest.param(torch.bfloat16, (1, 2, 3), marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_runs_are_bitwise_equal(case, dtype, counts, threads):
    skip_unless_native(case)
    with Target("native").active():
        problem = prepared(case, dtype)
        for number in counts:
            threads(number)
            repeat(case, problem)
    counted("runs", problems=len(counts), runs=len(counts) * RUNS)


#: whose results are bitwise equal for every number of threads
ROWWISE = [case for case in LARGE if case.op in ("activation", "rotary", "sensitivity")]


@pytest.mark.parametrize("case", ROWWISE, ids=str)
def test_results_without_sums_over_rows_do_not_depend_on_the_number_of_threads(case, threads):
    skip_unless_native(case)
    with Target("native").active():
        problem, results = prepared(case, torch.float32), []
        for number in (1, 2, 3):
            threads(number)
            results.append(repeat(case, problem, 1))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


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
