"""Random programs of 5 to 30 torch functions on Duals: right in value, tangents and all gradients, or refused.

The oracle is PyTorch's forward mode on hand-written layers. Where its gradient through the tangents differs from ours,
central differences of the functional decide: torch's second derivative is wrong for some functions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from fuzz import programs
from fuzz.examples import fuzzed
from hypothesis import assume
from hypothesis import strategies as st

import aajr_kernels as aajr
from aajr_kernels.testing import oracle
from common.trust import count

#: error of value and tangents, of gradients, and of central differences, relative to the largest number
VALUE, GRADIENT, DIFFERENCE = 1e-10, 1e-8, 1e-5

STEPS = st.lists(
    st.tuples(st.sampled_from(sorted(programs.OPERATIONS)), st.tuples(*8 * [st.integers(0, 11)])),
    min_size=5,
    max_size=30,
)


def drawn_leaves(data: Any) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """x, its directions ``[K, ...]`` and three parameters."""
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple), "shape")
    k = data.draw(st.integers(1, 3), "K")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20), "seed"))
    draw = lambda *size: torch.randn(*size, dtype=torch.float64, generator=generator)
    return draw(*shape), draw(k, *shape), [draw(n) for n in (7, 12, 30)]


def by_oracle(program: Any, x: torch.Tensor, v: torch.Tensor, parameters: Any) -> torch.Tensor:
    with oracle.oracle_mode():
        value, tangents = oracle.jvp(lambda z: programs.run(program, z, parameters), x, v)
    return torch.cat([value.unsqueeze(0), tangents])


def by_dual(program: Any, x: torch.Tensor, v: torch.Tensor, parameters: Any) -> torch.Tensor:
    y = programs.run(program, aajr.dual(x, v), parameters)
    return torch.cat([y.primal.unsqueeze(0), y.tangents])


def gradients(run: Any, program: Any, leaves: list[torch.Tensor], cotangent: Any) -> list[torch.Tensor]:
    own = [t.clone().requires_grad_() for t in leaves]
    y = run(program, own[0], own[1], own[2:])
    got = torch.autograd.grad((y * cotangent).sum(), own, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(own, got)]


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1.0))


@fuzzed("random programs", quick=15, full=2500)
def test_a_program_is_right_or_refused(data):
    x, v, parameters = drawn_leaves(data)
    program = programs.accepted(data.draw(STEPS, "program"), x, parameters)
    leaves = [x, v, *parameters]
    try:
        expected = by_oracle(program, x, v, parameters)
    except (RuntimeError, NotImplementedError):  # torch has no forward mode of a step
        expected = x.new_full((), math.nan)
    assume(bool(expected.isfinite().all()))
    try:
        ours = by_dual(program, x, v, parameters)
    except aajr.UnsupportedOperation:
        count("random programs", refused=1)
        return
    assert error(ours[0], expected[0]) < VALUE, "value"
    assert error(ours[1:], expected[1:]) < VALUE * 10, "tangents"
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    mine = gradients(by_dual, program, leaves, cotangent)
    try:
        theirs = gradients(by_oracle, program, leaves, cotangent)
    except (RuntimeError, NotImplementedError):  # torch differentiates no tangent of a step
        theirs = [torch.full_like(t, math.nan) for t in leaves]
    wrong = [i for i, (a, b) in enumerate(zip(mine, theirs)) if not error(a, b) < GRADIENT]
    if not wrong:
        return
    directions = [torch.randn(t.shape, dtype=torch.float64, generator=generator) for t in leaves]

    def functional(step: float) -> float:
        moved = [t + step * d for t, d in zip(leaves, directions)]
        return float((by_oracle(program, moved[0], moved[1], moved[2:]) * cotangent).sum())

    def slope(h: float) -> float:
        return (8 * (functional(h) - functional(-h)) - (functional(2 * h) - functional(-2 * h))) / (12 * h)

    slopes = slope(1e-4), slope(3e-5)
    size = max(abs(slopes[0]), 1.0)
    # a kink near by has no derivative
    assume(math.isfinite(slopes[0]) and abs(slopes[0] - slopes[1]) < DIFFERENCE * size)
    got = sum(float((g * d).sum()) for g, d in zip(mine, directions))
    assert abs(got - slopes[0]) < 10 * DIFFERENCE * size, (
        f"gradients {wrong} (x, v, parameters): {got} by ours, {slopes} by central differences"
    )
