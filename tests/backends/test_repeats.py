"""Bitwise equal outputs and gradients over 20 runs: the reference on one and two threads, Triton's kernels in its
interpreter with their programs in another order each time, and the CUDA C++ kernels compiled for the CPU.

The native kernels are in cpu/test_determinism.py, whole steps in tests/training/test_repeated_steps.py.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backends.cpu.test_determinism import LARGE
from backends.repeats import RUNS, prepared, repeat
from ops.suite import Target

from aajr_kernels import ops
from aajr_kernels.backends.triton import launch as gpu
from aajr_kernels.dual import Dual
from aajr_kernels.ops.head import counted as counting
from aajr_kernels.ops.head import lm_head_sensitivity
from aajr_kernels.ops.sensitivity import softmax
from aajr_kernels.testing.cases.case import Case, outcome, stacked, stacks
from aajr_kernels.testing.cases.products import attention, head
from aajr_kernels.testing.cases.rows import added, gated, layer, linear, pointwise, reduction, rms, rotary
from common.trust import count as counted


def masked_head() -> Case:
    """The tokens that count are a number in a tensor, as on a device."""
    mask = torch.rand(2, 23, generator=torch.Generator().manual_seed(3)) < 0.4

    def ours(s: Any, p: Any) -> torch.Tensor:
        return lm_head_sensitivity(Dual(s[0]), *p, metric="fisher", mask=mask)

    return Case(
        *("head", "masked, repeated", "lm_head_sensitivity", ("hidden", "weight")),
        lambda k: ([stacks(2, 23, 20, k=k)], [torch.randn(201, 20)]),
        ours,
        ours,
    )


#: of several programs or blocks each; together they launch every kernel
SMALL = [
    added("repeated", "layer", 65, 2, batch=(2, 21)),
    linear("repeated", (2, 41), (33, 20)),
    head("probs", "repeated", (2, 7), 20, 201),
    gated("silu", "repeated", 5, 41, 65),
    rms("repeated", 129, batch=(2, 41)),
    rms("long, repeated", 8200, batch=(3,)),
    layer("repeated", 129, batch=(2, 41)),
    layer("long, repeated", 4100, batch=(3,)),
    pointwise("gelu", "repeated", 5, 41, 129),
    rotary("repeated", (2, 3, 41, 36), (2, 41, 36)),
    reduction("fisher", "repeated", 5, 3, 41),
    stacked("sensitivity", "softmax, repeated", "softmax", "x", softmax, softmax, lambda k: ([stacks(3, 33, k=k)], [])),
    head("fisher", "repeated", (2, 23), 20, 201, bias=True, labelled=True),
    masked_head(),
    attention("repeated", (1, 4, 2, 40, 40, 16, 12), causal=True),
    attention("mask, repeated", (1, 4, 2, 21, 37, 16, 16), mask="square"),
    attention("bias, repeated", (1, 4, 2, 21, 37, 16, 16), bias=(4, 1, 37)),
    attention("context, repeated", (1, 4, 2, 21, 21, 16, 16), context=19, causal=True),
]  # fmt: skip
#: that `make test` runs
QUICK = {"reference": ("linear", "rotary"), "triton": ("linear", "sensitivity:softmax")}


def problems(backend: str, cases: list[Case]) -> list[Any]:
    """Parameters of a test: a case, and whether it is slow."""
    quick = QUICK[backend]
    return [
        pytest.param(case, id=str(case), marks=[] if str(case).startswith(quick) else [pytest.mark.slow])
        for case in cases
    ]


def ready(backend: str, case: Case) -> Target:
    target = Target(backend)
    if reason := target.why_not(case.op):
        pytest.skip(reason)
    return target


@pytest.mark.parametrize("case", problems("reference", LARGE))
def test_the_reference_repeats_its_bits(case, threads):
    with ready("reference", case).active():
        problem = prepared(case, torch.float32)
        for number in (1, 2):
            threads(number)
            repeat(case, problem)
    counted("repeats", problems=2, runs=2 * RUNS)


@pytest.fixture
def shuffled(monkeypatch) -> Any:
    """Programs of a launch in the interpreter run in another order each time; a device has orders of its own."""
    if gpu.missing() is not None or not gpu.interpreted():
        return
    from triton.runtime.interpreter import interpreter_builder as builder

    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
    order: Iterator[tuple[int, ...]] = iter(())

    def launch(*grid: int) -> None:
        nonlocal order
        set_dim(*grid)
        places = list(itertools.product(*map(range, grid)))
        random.shuffle(places)
        order = iter(places)

    monkeypatch.setattr(builder, "set_grid_dim", launch)
    monkeypatch.setattr(builder, "set_grid_idx", lambda *place: set_index(*next(order)))


@pytest.fixture
def in_front(monkeypatch) -> None:
    """How many tokens count is a number in a tensor, as on a device."""
    monkeypatch.setattr(counting, "_is_known", lambda device: False)


@pytest.mark.parametrize("case", problems("triton", SMALL))
def test_triton_kernels_repeat_their_bits_in_any_order_of_programs(case, shuffled, in_front):
    target = ready("triton", case)
    with target.active():
        repeat(case, prepared(case, torch.float32, target.device))
    counted("repeats", problems=1, runs=RUNS)


@pytest.mark.slow
def test_the_problems_launch_every_triton_kernel(in_front):
    from aajr_kernels.backends.triton.rows import column_sum_kernel

    launched: set[str] = set()
    for case in SMALL:
        target = ready("triton", case)
        with target.active(), gpu.traced(lambda kernel, *_: launched.add(kernel.fn.__name__)):
            outcome(case.ours, *prepared(case, torch.float32, target.device))
    packages = pkgutil.walk_packages(ops.__path__, "aajr_kernels.ops.")
    modules = [importlib.import_module(x.name) for x in packages if ".triton" in x.name]
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert launched == kernels | {column_sum_kernel.fn.__name__}


def test_an_order_of_programs_that_counts_is_seen(shuffled):
    ready("triton", SMALL[0])
    from backends.triton.toys import ordered_sum_kernel

    x, sums = torch.randn(64), set()
    for _ in range(RUNS):
        total = torch.zeros(1)
        ordered_sum_kernel[(64,)](x, total)
        sums.add(total.item())
    assert len(sums) > 1


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in SMALL if case.op in ("norm", "sensitivity")], ids=str)
def test_cuda_kernels_repeat_their_bits(case):
    target = ready("cuda", case)
    with target.active():
        repeat(case, prepared(case, torch.float32, target.device))
    counted("repeats", problems=1, runs=RUNS)
