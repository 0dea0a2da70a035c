"""Errors of the vectorised elementary functions, in units in the last place, on every capability.

The bounds are those that csrc/cpu/math.h documents.
"""

from __future__ import annotations

import math

import pytest
import torch

from aajr_kernels.backends import cpu as native

pytest.importorskip("aajr_kernels._native")

#: number in the module, float64 truth, largest error in ulps
FUNCTIONS = {
    "exp": (0, torch.exp, 1.25),
    "log": (1, torch.log, 1.0),
    "sigmoid": (2, torch.sigmoid, 3.0),
    "sigmoid_complement": (3, lambda x: torch.sigmoid(-x), 3.0),
    "tanh": (4, torch.tanh, 2.5),
    "tanh_slope": (5, lambda x: x.cosh() ** -2, 5.0),
    "normal_cdf": (6, lambda x: 0.5 * torch.erfc(-x * math.sqrt(0.5)), 8.0),
    "normal_density": (7, lambda x: torch.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi), 2.5),
}


def evaluate(name: str, x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    native.call("math_eval", (x, y), (FUNCTIONS[name][0],))
    return y


def samples() -> torch.Tensor:
    """Floats of every exponent and both signs, subnormal ones included, and the ranges where the functions vary."""
    patterns = torch.arange(0, 1 << 31, 4801, dtype=torch.int64)
    every = torch.cat([patterns, patterns + (1 << 31)]).to(torch.int32).view(torch.float32)
    edges = torch.tensor(
        [0.0, -0.0, 2.0**-149, -(2.0**-149), 2.0**-126, 3.4e38, -3.4e38, 0.6, -0.6, 88.722, 88.73]
    )
    varied = [torch.linspace(-r, r, 150_001) for r in (1.5, 16.0, 110.0)]
    x = torch.cat([every, edges, *varied])
    return x[torch.isfinite(x)]


SAMPLES = samples()


def error_in_ulps(y: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    rounded = exact.float()
    assert torch.equal(torch.isnan(y), torch.isnan(exact))
    infinite = torch.isinf(rounded) | torch.isinf(y)
    finite = torch.isfinite(rounded) & ~infinite
    # where the result rounds to infinity, the largest float may be exceeded by what the bound allows
    near_overflow = exact[infinite].abs().clamp(max=3.5e38) >= 3.4028e38
    assert near_overflow.all()
    unit = torch.ldexp(torch.ones_like(exact[finite]), torch.frexp(exact[finite]).exponent - 24).clamp(
        min=2.0**-149
    )
    return (y[finite].double() - exact[finite]).abs() / unit


@pytest.mark.parametrize("name", FUNCTIONS)
def test_error(name, vectors):
    _, truth, bound = FUNCTIONS[name]
    error = error_in_ulps(evaluate(name, SAMPLES), truth(SAMPLES.double()))
    assert error.max().item() <= bound


@pytest.mark.parametrize("name", FUNCTIONS)
def test_limits_and_tails(name, vectors):
    x = torch.tensor([math.inf, -math.inf, math.nan])
    torch.testing.assert_close(
        evaluate(name, x), FUNCTIONS[name][1](x.double()).float(), rtol=0, atol=0, equal_nan=True
    )
    for size in (0, 1, 5, 37):  # shorter than a vector, and not a multiple of one
        x = torch.linspace(0.1, 3.0, size)
        guarded = torch.full((size + 2,), 7.0)
        native.call("math_eval", (x, guarded[1:-1]), (FUNCTIONS[name][0],))
        torch.testing.assert_close(guarded[1:-1], FUNCTIONS[name][1](x))
        assert guarded[0] == 7.0 and guarded[-1] == 7.0


def test_signed_zero(vectors):
    assert math.copysign(1.0, evaluate("tanh", torch.tensor([-0.0])).item()) == -1.0
    assert evaluate("exp", torch.tensor([-0.0])).item() == 1.0


def test_sigmoid_and_its_complement_sum_to_one(vectors):
    x = torch.linspace(-30, 30, 1001)
    total = evaluate("sigmoid", x).double() + evaluate("sigmoid_complement", x).double()
    assert (total - 1.0).abs().max() < 3e-7


def test_the_exponential_of_a_softmax(vectors):
    """Within its range as accurate as exp, zero below it, NaN kept."""
    x = SAMPLES[SAMPLES < 88.0]
    y = torch.empty_like(x)
    native.call("math_eval", (x, y), (8,))
    exact = torch.where(x < -87.33, 0.0, x.double().exp())
    unit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 24)
    assert ((y.double() - exact).abs() / unit).max() <= 1.25
    special = torch.tensor([-math.inf, math.nan, 0.0])
    out = torch.empty_like(special)
    native.call("math_eval", (special, out), (8,))
    assert out[0] == 0.0 and out[1].isnan() and out[2] == 1.0
