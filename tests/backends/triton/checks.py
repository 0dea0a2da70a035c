"""Comparisons shared by the tests of Triton kernels: on a GPU where there is one, otherwise in the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from assertions import assert_within_budget
from ops.suite import DEVICES

DEVICE = DEVICES["triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: numpy, which computes in the interpreter, warns of infinities
QUIET = "ignore:.* encountered in .*:RuntimeWarning"


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(shape)).to(DEVICE, dtype)


def results(function: Callable[..., Any], args: tuple) -> tuple:
    result = function(*args)
    return result if isinstance(result, tuple) else (result,)


def compare(ours: Any, reference: Any, name: str, args: tuple, floor: float = 0.0) -> tuple:
    """A function of both backends on the same tensors, the truth in float64; returns our results."""
    double = tuple(a.double() if isinstance(a, torch.Tensor) else a for a in args)
    got = results(getattr(ours, name), args)
    eager, exact = results(getattr(reference, name), args), results(getattr(reference, name), double)
    for i, (g, e, x) in enumerate(zip(got, eager, exact)):
        if x is None:
            assert g is None
            continue
        assert (g.dtype, g.shape) == (e.dtype, e.shape)
        assert_within_budget(g, e, x, f"{name} {i}", floor=max(floor, 1e-30))
    return got


def same_bits(first: tuple, second: tuple) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(first, second))
