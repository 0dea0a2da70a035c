"""The budget of computations that round at random: it sees a wrong gradient where terms cancel, and where none do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from ops.suite import Target, check, targets
from torch import Tensor

from aajr_kernels.testing.budgets import ULPS
from aajr_kernels.testing.cases import products, rows
from aajr_kernels.testing.cases.case import Case, Problem, Run, forward_mode, on_device, outcome, problem

DRAWS = 16
REFERENCE = Target("reference")


def wrong(case: Case, gradient_of: Run) -> Case:
    """The case with right values in float64 and the gradients of another formula."""

    def ours(inputs: list[Tensor], params: list[Tensor]) -> Tensor:
        wide = [t.double() for t in inputs], [t.double() for t in params]
        change = gradient_of(*wide)
        return (case.exact(*wide).detach() + (change - change.detach())).to(inputs[0].dtype)

    return replace(case, ours=ours)


def scaled(factor: float, case: Case) -> Case:
    return wrong(case, lambda s, p: factor * case.exact(s, p))


def fisher(z: Tensor, z_tan: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    p = torch.exp(z - total(z.logsumexp(-1, keepdim=True)))
    return (p * (z_tan - (p * z_tan).sum(-1, keepdim=True)).square()).sum(-1)


HEAD = functools.partial(products.head, "fisher", "peaked", (2,), 7, 3, spread=1.0)
ATTENTION = functools.partial(products.attention, "one late key", (1, 2, 1, 9, 9, 4, 4), causal=True)
NORM = functools.partial(rows.layer, "2 features", 2, 0, (5,))


def without_the_gradient_of_the_total() -> Case:
    return wrong(HEAD(), HEAD(values=lambda z, d, _: fisher(z, d, torch.detach)).exact)


def by_a_window_too_wide() -> Case:
    return wrong(ATTENTION(window=5), ATTENTION(window=6).exact)


def without_the_mean() -> Case:
    """The gradient of a norm of two features takes their mean for a constant."""

    def formula(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True).detach()
        return centred * centred.square().mean(-1, keepdim=True).add(1e-5).rsqrt()

    return wrong(NORM(), lambda s, p: forward_mode(formula, s, p))


@pytest.mark.parametrize(
    "case",
    [
        without_the_gradient_of_the_total(),
        by_a_window_too_wide(),
        without_the_mean(),
        scaled(1 + 1e-5, ATTENTION()),
        scaled(1 + 1e-5, rows.rms("37", 37, 1)),
    ],
    ids=["dropped term", "mask edge", "missing mean", "attention 1e-5 off", "norm 1e-5 off"],
)
def test_a_wrong_gradient_is_above_the_budget(case):
    with pytest.raises(AssertionError, match="gradient of .* is above the budget"):
        check(case, REFERENCE, 1, torch.float32, draws=DRAWS)
    check(scaled(1.0, case), REFERENCE, 1, torch.float32, draws=DRAWS)


def test_a_wrong_gradient_of_a_low_dtype_is_above_the_budget():
    with pytest.raises(AssertionError, match="gradient of .* is above the budget"):
        check(by_a_window_too_wide(), REFERENCE, 1, torch.bfloat16, draws=DRAWS)


def terms_of_one_key(p: Problem, scale: float) -> list[Tensor]:
    """Sizes of terms that cancel in the gradients of q and k: attention whose weight is not divided by their sum."""

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = scale * q @ k.mT
        return torch.exp(scores - scores.detach()) @ v

    run = lambda s, p: forward_mode(formula, s, p)
    sizes = [t.double().abs() for t in p.inputs]
    return outcome(run, sizes, [], p.cotangent.double().abs()).gradients[:2]


@pytest.mark.parametrize("target", targets("attention"), ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 63, 1, 1, 1), (2, 2, 1, 5, 1, 16, 16)], ids=str)
def test_gradients_through_the_softmax_of_one_key_are_roundings(target, sizes):
    """The weight is one whatever the scores are. Units in the last place count for the terms that cancel."""
    if reason := target.why_not("attention"):
        pytest.skip(reason)
    case = products.attention(str(sizes), sizes, scale=0.7)
    for dtype in (torch.float32, torch.bfloat16):
        p = problem(case, 1, dtype)
        with target.active():
            gradients = on_device(case, p, target.device).gradients
        for exact, gradient, terms in zip(p.exact.gradients, gradients, terms_of_one_key(p, 0.7)):
            assert exact.norm() < 1e-12 * terms.norm()
            assert gradient.double().norm() <= ULPS * torch.finfo(dtype).eps * terms.norm()
