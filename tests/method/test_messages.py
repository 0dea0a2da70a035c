"""Errors of the method name the argument that the caller gave, what came, and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import aajr_kernels as aajr

X = torch.linspace(-1.0, 1.0, 60).reshape(3, 5, 4)
NET = torch.nn.Linear(4, 4)


def _penalty(**options: Any) -> Any:
    return aajr.aligned_penalty(NET, X, X, **options)


def _ascent(**options: Any) -> Any:
    return aajr.ascend(lambda z: z.square().sum((1, 2)), X, radius=1.0, steps=1, **options)


CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "gamma, NumPy": (lambda: _penalty(gamma=np.float32(0.1)), TypeError, "gamma must be a Python number, got float32"),
    "gamma, tensor": (lambda: _penalty(gamma=torch.tensor(0.1)), TypeError, "gamma must be a Python number, got T"),
    "gamma, text": (lambda: _penalty(gamma="1"), TypeError, "gamma must be a Python number, got str"),
    "gamma, negative": (lambda: _penalty(gamma=-1.0), ValueError, "gamma must be a finite number >= 0, got -1"),
    "denominator, text": (lambda: _penalty(denominator="3"), TypeError, "a number or a tensor, got str"),
    "denominator, vector": (
        lambda: _penalty(denominator=torch.tensor([1.0, 2.0])),
        ValueError,
        r"denominator must be a number or a tensor of one element, got shape \(2,\)",
    ),
    "denominator, zero": (lambda: _penalty(denominator=0), ValueError, "denominator must be positive, got 0"),
    "project, integers": (
        lambda: _ascent(project=lambda z: z.int()),
        TypeError,
        r"project must return a floating-point perturbation, got torch\.int32",
    ),
    "option of trajectory_penalty": (
        lambda: aajr.trajectory_penalty(NET, X, _ascent(), bogus=1),
        TypeError,
        r"trajectory_penalty\(\) has no option bogus",
    ),
    "as_tensor": (lambda: torch.as_tensor(aajr.dual(X, X)), TypeError, "a Dual is a tensor already"),
    "tensor": (lambda: torch.tensor(aajr.dual(X, X)), TypeError, "a Dual is a tensor already"),
    "nested": (lambda: torch.nested.nested_tensor([aajr.dual(X, X)]), TypeError, "no rule for nested tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_message_says_what_is_wrong(name: str) -> None:
    call, error, message = CASES[name]
    with pytest.raises(error, match=message):
        call()


def test_a_denominator_of_one_element_is_a_number() -> None:
    want = _penalty(denominator=3.0)
    for same in (torch.tensor(3.0), torch.tensor([3.0]), np.float64(3.0), 3):
        torch.testing.assert_close(_penalty(denominator=same), want)
