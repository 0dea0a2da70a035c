"""Activations and gated products of Duals."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_exact
from ops.op_checks import check, check_low, stacks

import aajr_kernels.ops.activation as ops
from aajr_kernels import Dual, coverage
from aajr_kernels.ops.activation import reference


def gelu_formula(x):
    return 0.5 * x * torch.erfc(-x / math.sqrt(2.0))


def gelu_tanh_formula(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


FORMULAS = {
    "gelu": gelu_formula,
    "gelu_tanh": gelu_tanh_formula,
    "silu": lambda x: x / (1.0 + torch.exp(-x)),
    "relu": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "relu2": lambda x: torch.where(x > 0, x * x, torch.zeros_like(x)),
    "quick_gelu": lambda x: x / (1.0 + torch.exp(-1.702 * x)),
    "tanh": lambda x: 1.0 - 2.0 / (1.0 + torch.exp(2.0 * x)),
    "sigmoid": lambda x: 1.0 / (1.0 + torch.exp(-x)),
}
TORCH = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
GATES = {"silu": ops.swiglu, "gelu": ops.geglu, "gelu_tanh": lambda g, u: ops.geglu(g, u, "tanh")}


def activation(name):
    return (lambda x: ops.gelu(x, "tanh")) if name == "gelu_tanh" else getattr(ops, name)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", FORMULAS)
def test_pointwise(name, k):
    for shape in ((), (37,), (2, 3, 7)):
        check(activation(name), FORMULAS[name], [stacks(*shape, k=k, scale=2.0).abs_() + 0.1])
        check(activation(name), FORMULAS[name], [stacks(64, k=k, scale=2.0)])


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "quick_gelu", "tanh", "sigmoid"])
def test_second_derivative_by_finite_differences(name):
    x = torch.linspace(-6, 6, 41, dtype=torch.float64)
    h = 1e-4
    _, first, second = reference.derivatives(name, x, 2)
    up, down = reference.derivatives(name, x + h, 1), reference.derivatives(name, x - h, 1)
    torch.testing.assert_close(first, (up[0] - down[0]) / (2 * h), atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(second, (up[1] - down[1]) / (2 * h), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_large_arguments_saturate_without_nan(name, dtype):
    x = torch.tensor([-3e30, -1e20, -1e4, -100.0, 0.0, 100.0, 1e4, 1e18], dtype=dtype)
    stack = torch.stack([x, torch.ones_like(x)]).requires_grad_()
    y = activation(name)(Dual(stack))
    assert torch.isfinite(y.stacked).all()
    torch.testing.assert_close(y.primal, TORCH[name](x))
    (gradient,) = torch.autograd.grad(y.stacked.sum(), stack)
    assert torch.isfinite(gradient).all()


def test_negative_tail_keeps_its_digits():
    x = torch.tensor([[-5.0], [1.0]])
    for name in ("gelu", "silu", "gelu_tanh"):
        exact = FORMULAS[name](x[0].double())
        if name == "gelu_tanh":
            exact = x[0].double() * torch.sigmoid(
                2.0 * math.sqrt(2.0 / math.pi) * (-5.0 - 0.044715 * 125.0) * exact**0
            )
        assert_exact(activation(name)(Dual(x)).primal, exact, name, tolerance=1e-5)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("moving", ["both", "gate", "up"])
def test_gated(name, k, moving):
    for shape in ((), (37,), (2, 3, 7)):
        gate = stacks(*shape, k=0 if moving == "up" else k, scale=2.0)
        up = stacks(*shape, k=0 if moving == "gate" else k)
        check(GATES[name], lambda g, u: FORMULAS[name](g) * u, [gate, up])


def test_gate_and_up_of_one_product_are_views():
    both = stacks(3, 4, 10, k=2)
    check(ops.swiglu, lambda g, u: FORMULAS["silu"](g) * u, [both[..., :5], both[..., 5:]])
    check(ops.silu, FORMULAS["silu"], [stacks(5, 3, 4).transpose(1, 3)])


def test_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", 40)
    both = stacks(3, 5, 14, k=2)
    views = [both[..., :7], both[..., 7:]]
    check(ops.swiglu, lambda g, u: FORMULAS["silu"](g) * u, views)
    check(ops.gelu, FORMULAS["gelu"], views[:1])
    check(ops.gelu, FORMULAS["gelu"], [stacks(3, 4, 5).permute(0, 3, 1, 2)])
    check(ops.geglu, lambda g, u: FORMULAS["gelu"](g) * u, [views[0], views[1][:1]])


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3), (2, 3, 0)])
def test_empty(shape):
    x = torch.zeros(3, *shape).requires_grad_()
    for y in (ops.gelu(Dual(x)), ops.swiglu(Dual(x), Dual(x))):
        assert y.shape == shape
        y.stacked.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_dtypes(dtype):
    for name, formula in TORCH.items():
        check_low(activation(name), formula, [stacks(13, 50, k=2, scale=2.0)], [], dtype)
    for name, op in GATES.items():
        inputs = [stacks(13, 50, k=2, scale=2.0), stacks(13, 50, k=2)]
        check_low(op, lambda g, u, name=name: TORCH[name](g) * u, inputs, [], dtype)


def test_mixed_dtypes_are_promoted():
    gate, up = stacks(4, 5).bfloat16(), stacks(4, 5).float().requires_grad_()
    h = ops.swiglu(Dual(gate), Dual(up))
    assert h.dtype == torch.float32
    h.stacked.sum().backward()
    assert up.grad.dtype == torch.float32


def test_gradients_nobody_needs_are_skipped():
    gate, up = stacks(3, 5).requires_grad_(), stacks(3, 5)
    ops.swiglu(Dual(gate), Dual(up)).stacked.sum().backward()
    assert gate.grad is not None and up.grad is None


def test_plain_tensors_give_what_torch_gives():
    x, u = torch.randn(3, 5), torch.randn(3, 5)
    for name, formula in TORCH.items():
        assert torch.equal(activation(name)(x), formula(x))
        _, tangent = torch.func.jvp(activation(name), (x,), (u,))
        assert tangent.any()
    assert torch.equal(ops.swiglu(x, u), F.silu(x) * u)
    assert torch.equal(ops.geglu(x, u, "tanh"), F.gelu(x, approximate="tanh") * u)


def test_coverage():
    with coverage() as cov:
        ops.gelu(Dual(torch.randn(2, 5)))
        ops.swiglu(Dual(torch.randn(2, 5)), torch.randn(5))
    assert {op for op, _ in cov.entries} == {"gelu", "swiglu"}


def test_errors():
    x = Dual(torch.randn(2, 3, 5))
    with pytest.raises(ValueError, match="approximate must be 'none' or 'tanh', got 'erf'"):
        ops.gelu(x, "erf")
    with pytest.raises(ValueError, match=r"swiglu: up must have the shape of gate \(3, 5\), got \(5,\)"):
        ops.swiglu(x, torch.randn(5))
    with pytest.raises(ValueError, match="1 and 2 tangents"):
        ops.geglu(x, Dual(torch.randn(3, 3, 5)))
