"""Functions under torch.compile whose forward computes one tensor twice: torch 2.11 gave zeros for gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import aajr_kernels as aajr

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by Dynamo


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _out(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    torch.sin(x, out=y)
    return y


def _unused(x: Tensor) -> Tensor:
    y = x.sin()
    y.contiguous()
    return y


def _parts(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[0] = x[0].sin()
    y[1:] += x[1:].sin()
    return y


SINES: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": torch.sin,
    "out=": _out,
    "in place": lambda x: x.clone().sin_(),
    "in place, then a view": lambda x: x.t().clone().sin_().t(),
    "copied": lambda x: torch.zeros_like(x).copy_(x.sin()),
    "contiguous": lambda x: x.sin().contiguous(),
    "contiguous, not used": _unused,
    "converted to its own dtype": lambda x: x.contiguous().sin().to(x.dtype),
    "parts": _parts,
}


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, form: str, more: bool) -> Any:
        ctx.save_for_backward(x)
        y = SINES[form](x)
        return (y, y.cos()) if more else y

    @staticmethod
    def backward(ctx: Any, y_bar: Tensor, *more: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return (y_bar - more[0] * x.sin().sin() if more else y_bar) * x.cos(), None, None


@pytest.mark.parametrize("form", SINES)
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_gradients_of_a_compiled_function(form, backend):
    x, weight = torch.randn(2, 4, 3, dtype=torch.float64)

    def loss(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        single, (first, cosine) = Sine.apply(x, form, False), Sine.apply(x * 2, form, True)
        own = aajr.layer_norm(aajr.dual(x, y), 3)  # makes the package ready to be traced
        return (weight * (single + 2 * first + 3 * cosine)).sum(), own.tangents.square().sum()

    y = x.flip(0)
    leaf = x.clone().requires_grad_()
    total, penalty = torch.compile(loss, fullgraph=True, backend=backend)(leaf, y)
    (gradient,) = torch.autograd.grad(total, leaf, retain_graph=True)
    wide = (2 * x).cos()
    want = x.cos() + 2 * (2 * wide - 3 * (2 * x).sin().sin() * wide)
    torch.testing.assert_close(gradient, weight * want, rtol=1e-12, atol=1e-12)
    exact = x.clone().requires_grad_()
    scale = (exact.var(-1, keepdim=True, unbiased=False) + 1e-5).rsqrt()
    centred, direction = (t - t.mean(-1, keepdim=True) for t in (exact, y))
    tangent = scale * direction - scale**3 * centred * (centred * direction).mean(-1, keepdim=True)
    (want,) = torch.autograd.grad(tangent.square().sum(), exact)
    torch.testing.assert_close(torch.autograd.grad(penalty, leaf)[0], want, rtol=1e-10, atol=1e-12)
