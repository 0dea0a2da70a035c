"""Forms in which torch takes its arguments: by keyword, one Dual among plain tensors, arrays, written aliases."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rules.cases import B3, BOTH, C3, P, X, Y, Z, real
from rules.check import check

from aajr_kernels import Dual, UnsupportedOperation, dual

KEYWORDS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda x, y: torch.add(input=x, other=y, alpha=2),
    "Tensor.mul": lambda x, y: x.mul(other=y),
    "div": lambda x, y: torch.div(x, other=y),
    "pow": lambda x, y: torch.pow(x.abs(), exponent=y),
    "maximum": lambda x, y: torch.maximum(input=x, other=y),
    "max(other)": lambda x, y: torch.max(x, other=y),
    "atan2": lambda x, y: torch.atan2(x, other=y),
    "exp": lambda x, y: torch.exp(input=x) * y,
    "where": lambda x, y: torch.where(condition=X > 0, input=x, other=y),
    "Tensor.where": lambda x, y: x.where(condition=X > 0, other=y),
    "matmul": lambda x, y: torch.matmul(input=x, other=y.mT),
    "mm": lambda x, y: torch.mm(x, mat2=y.mT),
    "mv": lambda x, y: torch.mv(x, vec=y[0]),
    "dot": lambda x, y: torch.dot(x[0], tensor=y[0]),
    "outer": lambda x, y: torch.outer(x[0], vec2=y[0]),
    "addcmul": lambda x, y: torch.addcmul(x, tensor1=y, tensor2=x, value=0.3),
    "linear": lambda x, y: F.linear(input=x, weight=y),
    "conv1d": lambda x, y: F.conv1d(input=x[None], weight=y[None, :, :2]),
    "softmax": lambda x, y: torch.softmax(input=x, dim=-1) * y,
    "mean": lambda x, y: torch.mean(input=x, dim=(0,), keepdim=True) * y,
    "sum(axis)": lambda x, y: x.sum(axis=1, keepdims=True) * y,
    "std(axis)": lambda x, y: x.std(axis=1, keepdims=True) * y,
    "max(axis)": lambda x, y: x.max(axis=1).values * y[:, 0],
    "cat(axis)": lambda x, y: torch.cat([x, y], axis=1),
    "transpose": lambda x, y: torch.transpose(input=x, dim0=0, dim1=1) @ y,
    "gather": lambda x, y: torch.gather(input=x, dim=1, index=torch.zeros(3, 1, dtype=torch.long)) * y,
    "dropout": lambda x, y: torch.dropout(x, p=0.5, train=False) * y,
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_operands_may_be_named(name: str) -> None:
    check(KEYWORDS[name], (X, Y), 2, duals=BOTH)


SUMS = {
    "addmm": (lambda x, a, b: torch.addmm(input=x, mat1=a, mat2=b, beta=0.5), (real(5), X, C3[0])),
    "baddbmm": (lambda x, a, b: x.baddbmm(batch1=a, batch2=b, alpha=2.0), (real(2, 3, 5), B3, C3)),
    "lerp": (torch.lerp, (X, Y, Z)),
    "addcdiv": (torch.addcdiv, (X, Y, P)),
    "linear": (F.linear, (B3, real(5, 4), real(5))),
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("name", SUMS)
def test_any_one_operand_may_be_the_dual(name: str, place: int) -> None:
    function, inputs = SUMS[name]
    check(function, inputs, 2, duals=(place,))


def test_xlogy_at_zero_has_the_slope_of_the_logarithm() -> None:
    check(lambda x: torch.xlogy(x - X, P), (X,), 2)


def test_cumprod_through_zeros() -> None:
    check(lambda x: (x * (X > 0)).cumprod(-1), (X,), 2, upstream=False)


def test_an_array_operand_raises() -> None:
    x = dual(torch.randn(4), torch.randn(2, 4))
    for function in (operator.mul, operator.add, operator.truediv):
        with pytest.raises(TypeError, match=r"torch\.as_tensor"):
            function(x, np.ones((3, 4), dtype=np.float32))


def test_too_few_axes_raise_instead_of_reaching_the_stack_axis() -> None:
    vector, matrix = (dual(torch.randn(*s), torch.randn(3, *s)) for s in ((4,), (4, 3)))
    with pytest.raises(ValueError, match="two axes"):
        vector.tril()
    with pytest.raises(ValueError, match="pixel_shuffle"):
        torch.pixel_shuffle(matrix, 2)


def test_cat_of_an_empty_dual_and_a_tensor() -> None:
    empty = dual(torch.zeros(0), torch.zeros(0))
    joined = torch.cat([empty, torch.ones(3, 4)])
    assert isinstance(joined, Dual) and joined.shape == (3, 4) and not joined.tangents.any()


def test_contiguous_of_a_contiguous_view_is_that_view() -> None:
    def written(x: Any) -> Any:
        x = x * 1
        x[:2].contiguous().mul_(3.0)
        return x * x

    check(written, (X,), 2)


def test_random_values_in_place_have_no_tangent() -> None:
    x = dual(torch.randn(3, 4), torch.randn(3, 4))
    torch.manual_seed(1)
    drawn = x.new_empty(3, 1).bernoulli_(0.5)
    torch.manual_seed(1)
    assert torch.equal(drawn.primal, torch.empty(3, 1).bernoulli_(0.5)) and not drawn.tangents.any()


def test_values_without_a_derivative_are_not_written_in_silence() -> None:
    x = dual(torch.randn(3, 4), torch.randn(3, 4))
    for write in (
        lambda: x.eq_(0),
        lambda: torch.full_like(x.primal, x.sum()),
        lambda: x.new_full((3,), x.sum()),
    ):
        with pytest.raises(UnsupportedOperation):
            write()


@pytest.mark.parametrize("function", [torch.addmm, lambda x, a, b: F.linear(a, b.mT, x)])
def test_sums_of_products_keep_the_low_dtype_under_autocast(function: Callable[..., Any]) -> None:
    x, a, b = torch.randn(5), torch.randn(3, 4), torch.randn(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        for inputs in ((x, dual(a, a), b), (dual(x, x), a, b)):
            assert function(*inputs).dtype == function(x, a, b).dtype == torch.bfloat16
