"""Numbers that leave a Dual, and strict mode; NumPy's scalars beside one."""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import aajr_kernels as aajr
from aajr_kernels import UnsupportedOperation, dual, is_dual

LEAVING: dict[str, Callable[[Any], Any]] = {
    "item()": lambda x: x.item(),
    "tolist()": lambda x: x.tolist(),
    "float()": float,
    "math.sqrt": math.sqrt,
    "int()": int,
    "bool()": bool,
    "if": lambda x: 1 if x else 0,
    "format": lambda x: f"{x:.2f}",
    "is_nonzero": torch.is_nonzero,
}


def scalar() -> aajr.Dual:
    return dual(torch.tensor(2.5), torch.tensor(1.0))


@pytest.mark.parametrize("name", LEAVING)
def test_strict_mode_raises_where_a_tangent_would_be_left_behind(name: str) -> None:
    leave = LEAVING[name]
    assert leave(scalar()) is not None
    with aajr.strict():
        with pytest.raises(UnsupportedOperation, match=r"leaves its tangent behind.*detach"):
            leave(scalar())
        assert leave(scalar().detach()) is not None  # a plain tensor
        with aajr.strict(False):
            assert leave(scalar()) is not None
        with pytest.raises(UnsupportedOperation):
            leave(scalar())
    assert leave(scalar()) is not None


def test_strict_mode_leaves_alone_what_says_that_it_is_plain() -> None:
    x = dual(torch.ones(3), torch.ones(3))
    with aajr.strict():
        assert type(x.detach()) is type(x.data) is type(x > 0) is torch.Tensor
        assert "primal" in repr(x) and f"{x}" == str(x) and x.primal.sum().item() == 3.0
        assert is_dual(torch.relu(x).sum()) and bool((x > 0).all())


def test_strict_mode_as_a_decorator_and_as_a_switch() -> None:
    @aajr.strict()
    def decorated() -> float:
        return float(scalar())

    assert float(scalar()) == 2.5
    for _ in range(2):
        with pytest.raises(UnsupportedOperation):
            decorated()
        assert float(scalar()) == 2.5
    mode = aajr.strict()
    try:
        with pytest.raises(UnsupportedOperation):
            scalar().item()
    finally:
        aajr.strict(False)
    with mode, pytest.raises(UnsupportedOperation):
        scalar().item()
    assert scalar().item() == 2.5
    with pytest.raises(TypeError, match="on must be True or False, got 1"):
        aajr.strict(1)  # type: ignore[arg-type]


def test_strict_mode_is_that_of_its_thread() -> None:
    results: list[Any] = []

    def elsewhere() -> None:
        results.append(scalar().item())
        aajr.strict()
        try:
            scalar().item()
        except UnsupportedOperation as error:
            results.append(error)

    with aajr.strict():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert results[0] == 2.5 and isinstance(results[1], UnsupportedOperation) and scalar().item() == 2.5


def test_strict_mode_of_a_penalty_and_of_compiled_code() -> None:
    x, v = torch.rand(3, 4) + 1, torch.ones(3, 4)
    model = lambda z: z * z.sum().item()
    assert torch.isfinite(aajr.aligned_penalty(model, x, v))
    compiled = torch.compile(lambda d: d * d.sum().item(), backend="eager")
    with aajr.strict():
        for run in (
            lambda: aajr.aligned_penalty(model, x, v),
            lambda: aajr.jvp(model, (x,), (v,)),
            lambda: compiled(dual(x, v)),
        ):
            with pytest.raises(UnsupportedOperation, match=r"item\(\) of a Dual"):
                run()
    torch._dynamo.reset()
    assert is_dual(torch.compile(lambda d: d * d.sum().item(), backend="eager")(dual(x, v)))


# -- NumPy ------------------------------------------------------------------------------------------------------------

SCALARS = [
    np.float64(1.7), np.float32(1.5), np.float16(1.5), np.int64(2), np.int32(3), np.uint8(2),
    np.sqrt(np.float64(3.0)), np.array(1.7), np.array(2), np.bool_(True),
]  # fmt: skip
OPERATORS = "add sub mul truediv pow mod floordiv".split()


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_numpy_scalars_on_either_side(name: str, dtype: torch.dtype) -> None:
    function = getattr(operator, name)
    for k in (1, 2):
        x, v = (
            torch.tensor([[1.3, 2.9]], dtype=dtype),
            torch.tensor([[[0.5, -2.0]], [[1.5, 3.0]]], dtype=dtype)[:k],
        )
        for s in SCALARS[: -1 if name in ("sub", "pow") else None]:  # torch has neither with a bool
            number = s.item()
            for ours, same in (
                (lambda d, s=s: function(s, d), lambda d, n=number: function(n, d)),
                (lambda d, s=s: function(d, s), lambda d, n=number: function(d, n)),
            ):
                a = x.clone().requires_grad_()
                y = ours(dual(a, v))
                assert is_dual(y) and y.dtype == dtype
                want = same(x)  # as plain torch has it with a Python number
                low = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0  # ours is rounded once
                torch.testing.assert_close(y.primal, want, rtol=low, atol=0)
                if dtype == torch.float64:
                    h = 1e-6
                    for j in range(k):
                        slope = (same(x + h * v[j]) - same(x - h * v[j])) / (2 * h)
                        torch.testing.assert_close(y.tangents[j], slope, rtol=1e-7, atol=1e-8)
                torch.autograd.grad((y.tangents.square().sum() + y.primal.sum()), a, allow_unused=True)


def test_numpy_scalars_in_comparisons_and_arguments() -> None:
    x = dual(torch.tensor([1.0, 2.0]), torch.ones(2))
    two = np.float32(2.0)
    for left, right in ((two > x, [True, False]), (two == x, [False, True]), (two <= x, [False, True])):
        assert type(left) is torch.Tensor and left.tolist() == right
    assert (np.int64(2) != x).tolist() == [True, False]
    assert torch.equal(torch.clamp(x, np.float32(1.5)).stacked, torch.clamp(x, 1.5).stacked)
    assert torch.equal(x.sum(np.int64(0)).stacked, x.sum(0).stacked)
    assert torch.equal(torch.softmax(x, np.int64(-1)).stacked, torch.softmax(x, -1).stacked)


def test_arrays_and_other_ufuncs_raise() -> None:
    x = dual(torch.randn(4), torch.randn(2, 4))
    for function in (operator.mul, operator.add, operator.sub, operator.pow):
        for a, b in ((x, np.ones(4)), (np.ones(4), x), (np.ones((3, 4), dtype=np.float32), x)):
            with pytest.raises(TypeError, match=r"torch\.as_tensor"):
                function(a, b)
    array = np.ones(4)
    for call in (
        lambda: np.sin(x),
        lambda: np.maximum(np.float64(1.0), x),
        lambda: np.add.reduce(x),
        lambda: np.multiply(2.0, x, out=array),
        lambda: operator.imul(array, x),
        lambda: divmod(np.float64(3.0), x),
    ):
        with pytest.raises(UnsupportedOperation, match="NumPy cannot hold a Dual"):
            call()
