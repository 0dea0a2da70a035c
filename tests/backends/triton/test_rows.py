"""Shared by the kernels of rows, and the linear layer: functions of one number, axes that merge, sums, the bias."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from backends.triton.checks import DEVICE, DTYPES, QUIET, compare, draw, same_bits

from aajr_kernels.backends.triton import launch as gpu
from aajr_kernels.backends.triton import layout, sums
from aajr_kernels.backends.triton import math as functions
from aajr_kernels.ops.linear import reference as linear_reference
from aajr_kernels.ops.linear import triton as linear

pytestmark = pytest.mark.filterwarnings(QUIET)


@triton.jit
def _evaluate_kernel(x, y, z, size, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, i < size, 0.0)
    if FUNCTION == "exp":
        first, second = functions.exp(value), functions.exp_flushed(value)
    elif FUNCTION == "log":
        first = functions.log(value)
        second = first
    elif FUNCTION == "sigmoid":
        first, second = functions.sigmoid(value)
    elif FUNCTION == "tanh":
        first, second = functions.tanh(value)
    else:
        first, second = functions.normal(value)
    tl.store(y + i, first, i < size)
    tl.store(z + i, second, i < size)


def evaluate(name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.to(DEVICE)
    y, z = torch.empty_like(x), torch.empty_like(x)
    gpu.launch(
        _evaluate_kernel,
        (triton.cdiv(x.numel(), 4096),),
        x.device,
        x,
        y,
        z,
        x.numel(),
        FUNCTION=name,
        BLOCK=4096,
    )
    return y.cpu(), z.cpu()


def ulps(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error in units in the last place; a subnormal result counts in units of 2^-149."""
    exponent = torch.frexp(exact.abs().clamp(min=2.0**-126)).exponent - 24
    return ((got.double() - exact).abs() / torch.ldexp(torch.ones_like(exact), exponent)).max().item()


def arguments(low: float, high: float) -> torch.Tensor:
    """Between the two, dense and evenly spread, and small ones of both signs."""
    tiny = torch.logspace(-37, 0, 2000)
    x = torch.cat([torch.linspace(low, high, 40_001), tiny, -tiny])
    return x[(x >= low) & (x <= high)]


def exact_normal(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * torch.special.erfc(-x * math.sqrt(0.5))


FUNCTIONS = {
    "exp": (-103.0, 88.7, torch.exp, None, 1.5, 0.0),
    "log": (1e-38, 3e38, torch.log, None, 1.0, 0.0),
    "sigmoid": (-100.0, 100.0, torch.sigmoid, lambda x: torch.sigmoid(-x), 4.0, 4.0),
    "tanh": (-30.0, 30.0, torch.tanh, lambda x: x.cosh() ** -2, 4.0, 7.0),
    "normal": (
        -14.0,
        14.0,
        exact_normal,
        lambda x: torch.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi),
        10.0,
        3.0,
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_against_float64(name):
    low, high, first, second, budget, second_budget = FUNCTIONS[name]
    x = arguments(low, high) if name != "log" else torch.logspace(-44, 38, 40_001)
    y, z = evaluate(name, x)
    assert ulps(y, first(x.double())) <= budget
    if second is not None:
        assert ulps(z, second(x.double())) <= second_budget


def test_the_flushed_exponential():
    x = torch.linspace(-87.3, 87.0, 40_001)
    assert ulps(evaluate("exp", x)[1], x.double().exp()) <= 1.5
    assert not evaluate("exp", torch.tensor([-87.4, -1e30, -math.inf]))[1].any()


def test_limits():
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 3e38, -3e38, 1e-45])
    expected = {
        "exp": (torch.exp(x), None),
        "log": (torch.log(x), None),
        "sigmoid": (torch.sigmoid(x), torch.sigmoid(-x)),
        "tanh": (torch.tanh(x), 1.0 - torch.tanh(x) ** 2),
        "normal": (exact_normal(x), torch.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)),
    }
    for name, (first, second) in expected.items():
        y, z = evaluate(name, x)
        torch.testing.assert_close(y, first, equal_nan=True, rtol=1e-6, atol=0.0)
        if second is not None:
            torch.testing.assert_close(z, second, equal_nan=True, rtol=1e-6, atol=0.0)
    assert torch.signbit(evaluate("tanh", x)[0][4])  # -0 stays


def test_axes_merge():
    x = torch.empty(2, 3, 4, 5, 8)
    assert layout.row_axes((x,)) == (60, (0,), [(480, 8, 1)])
    heads = x.transpose(2, 3)
    assert layout.row_axes((heads,)) == (60, (0, 11, 9), [(480, 160, 8, 40, 1)])
    assert layout.row_axes((heads,), 0) == (60, (0,), [(480, 8, 1)])
    assert layout.row_axes((x, None, x[:, :1].expand_as(x))) == (
        60,
        (0, 41),
        [(480, 160, 8, 1), (0, 0, 0, 0), (480, 0, 8, 1)],
    )
    assert layout.row_axes((torch.empty(2, 7),)) == (1, (0,), [(7, 0, 1)])
    assert layout.row_axes((torch.empty(2, 0, 7),))[0] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (7, 300), (2000, 3), (3, 5, 7, 33)])
def test_column_sums(dtype, shape):
    x = draw(*shape, dtype=dtype) + 1.0
    got = sums.column_sums(x)
    exact = x.double().flatten(0, -2).sum(0)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(sums.column_sums(x.mT.contiguous().mT, dtype), got.to(dtype))
    assert torch.equal(got, sums.column_sums(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(dtype):
    x, weight = draw(3, 5, 7, 20, dtype=dtype), draw(1300, 20, dtype=dtype)
    bias, y_bar = draw(2600, dtype=dtype)[::2], draw(3, 5, 7, 1300, dtype=dtype)
    compare(linear, linear_reference, "linear_fwd", (x, weight, bias))
    args = (y_bar, x, weight, True)
    assert same_bits(compare(linear, linear_reference, "linear_bwd", args), linear.linear_bwd(*args))
    compare(linear, linear_reference, "linear_bwd", (y_bar, None, weight, False))
    compare(linear, linear_reference, "linear_bwd", (y_bar, x, None, False))


@pytest.mark.parametrize("shape", [(2, 0, 3), (2, 4, 0)])
def test_linear_of_nothing(shape):
    x, weight, bias = draw(*shape), draw(5, shape[-1]), draw(5)
    assert torch.equal(linear.linear_fwd(x, weight, bias), linear_reference.linear_fwd(x, weight, bias))
    x_bar, weight_bar, bias_bar = linear.linear_bwd(draw(*shape[:-1], 5), x, weight, True)
    assert x_bar.shape == shape and not weight_bar.any() and bias_bar.shape == (5,)
