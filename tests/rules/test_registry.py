"""Rules that a user registers."""

from __future__ import annotations

import pytest
import torch

import aajr_kernels as aajr
from aajr_kernels import torch_private
from aajr_kernels.rules import registry


def dual(*shape, dtype=torch.float32):
    return aajr.dual(torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype))


def test_a_user_can_register_a_rule():
    def cube(x):
        if torch.overrides.has_torch_function_unary(x):
            return torch.overrides.handle_torch_function(cube, (x,), x)
        return x**3

    x = dual(3, dtype=torch.float64)
    with pytest.raises(aajr.UnsupportedOperation, match="cube has no derivative rule"):
        cube(x)
    try:
        registry.rule(cube)(lambda d: d * d * d)
        y = cube(x)
    finally:
        registry.RULES.pop(cube)
        registry.KINDS.pop(cube)
    assert torch.allclose(y.tangent, 3 * x.primal**2 * x.tangent)
    with pytest.raises(LookupError, match="no torch function is called 'cubed'"):
        registry.rule("cubed")(lambda d: d)


def test_a_newer_torch_may_lack_a_function(monkeypatch):
    monkeypatch.setattr(torch_private, "VERSION", (99, 0))
    rules = len(registry.RULES)
    registry.rule("cubed")(lambda d: d)
    assert len(registry.RULES) == rules
