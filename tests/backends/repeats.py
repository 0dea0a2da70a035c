"""Problems that are run again and again, whose bits are compared."""

from __future__ import annotations

from collections.abc import Callable

import torch

from aajr_kernels.testing.cases.case import Case, Result, outcome

#: of one problem, whose results are bitwise equal
RUNS = 20

Problem = tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]


def prepared(case: Case, dtype: torch.dtype, device: str = "cpu") -> Problem:
    """Inputs, parameters and a cotangent of the output, with two tangents."""
    inputs, params = ([t.to(device, dtype) for t in ts] for ts in case.build(2))
    return inputs, params, torch.randn(case.ours(inputs, params).shape).to(device, dtype)


def assert_same(a: Result, b: Result) -> None:
    assert torch.equal(a.y, b.y)
    for i, (x, y) in enumerate(zip(a.gradients, b.gradients, strict=True)):
        assert torch.equal(x, y), f"gradient {i} differs by {(x.double() - y.double()).abs().max()}"


def repeat(
    case: Case, problem: Problem, runs: int = RUNS, before: Callable[[], object] = lambda: None
) -> Result:
    """The result of all runs, which are bitwise equal and finite; `before` is called before each."""
    before()
    first = outcome(case.ours, *problem)
    assert all(torch.isfinite(t).all() for t in [first.y, *first.gradients])
    for _ in range(runs - 1):
        before()
        assert_same(first, outcome(case.ours, *problem))
    return first
