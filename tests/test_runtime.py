"""Backend choice, coverage recording, autocast helpers and the rule registry."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import aajr_kernels as aajr
from aajr_kernels.autocast import autocast_float32, autocast_low, no_autocast
from aajr_kernels.backends import choice
from aajr_kernels.coverage import recording
from aajr_kernels.rules import registry


def dual(*shape, dtype=torch.float32):
    return aajr.dual(torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype))


def test_backend_choice_is_scoped_and_checked():
    assert choice.select_backend("norm", torch.ones(1).double()) == "reference"
    with aajr.use_backend("reference"):
        assert choice.select_backend("norm") == "reference"
    with pytest.raises(ValueError, match="choose one of auto, reference, native, triton"):
        aajr.use_backend("cudnn")
    missing = [name for name, reason in aajr.backends().items() if reason]
    for name in missing:
        with pytest.raises(aajr.BackendUnavailable, match=f"backend '{name}' cannot run here: ."):
            aajr.use_backend(name)
    assert aajr.backends()["reference"] is None


@pytest.mark.parametrize(
    ("value", "error"), [pytest.param("cudnn", "ValueError", marks=pytest.mark.slow), ("reference", "")]
)
def test_environment_variable_names_the_backend(value, error):
    code = (
        "import torch, aajr_kernels as a; d = a.dual(torch.ones(2, 3), torch.ones(2, 3)); "
        "print(a.rms_norm(d, 3).shape)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        env={**os.environ, "AAJR_BACKEND": value},
        capture_output=True,
        text=True,
    )
    assert (run.returncode != 0) == bool(error)
    assert error in run.stderr


def test_an_op_without_that_backend_says_so():
    with pytest.raises(aajr.BackendUnavailable, match="op 'norm' has no 'abacus' backend"):
        choice.implementation("norm", "abacus")


def test_coverage_counts_ops_shares_and_what_is_unsupported():
    x, weight = dual(4, 8, dtype=torch.float64), torch.randn(16, 8, dtype=torch.float64)
    with aajr.coverage() as outer:
        with aajr.coverage() as inner:
            F.linear(x, weight).tanh().sum()
        with pytest.raises(aajr.UnsupportedOperation):
            torch.special.bessel_j0(x)
        torch.linalg.inv(dual(3, 3))
    rows = {(op, backend): (count, share) for op, backend, count, share in inner.rows()}
    assert rows["linear", "reference"][0] == 1 and rows["linear", "reference"][1] > 0.5
    assert abs(sum(share for *_, share in inner.rows()) - 1) < 1e-12
    assert inner.fallbacks == [] and inner.unsupported == []
    assert outer.unsupported == ["torch.special_bessel_j0"] and len(outer.fallbacks) == 1
    assert "linear" in str(outer) and "unsupported" in str(outer)
    assert not recording()


def test_plain_tensors_are_not_recorded():
    with aajr.coverage() as cov:
        F.linear(torch.ones(2, 3), torch.ones(4, 3))
    assert cov.rows() == []


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


def test_autocast_helpers_follow_the_active_autocast_and_keep_gradients():
    x = torch.randn(3, requires_grad=True)
    wide = torch.randn(3, dtype=torch.float64)
    assert autocast_low(x, None, wide) == (x, None, wide)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, nothing, kept, index = autocast_low(x, None, wide, torch.arange(3))
        (back,) = autocast_float32(low)
        with no_autocast("cpu"):
            assert not torch.is_autocast_enabled("cpu")
    assert low.dtype == torch.bfloat16 and nothing is None and kept is wide and index.dtype == torch.int64
    assert back.dtype == torch.float32
    low.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtypes_that_torch_gives(dtype):
    x, weight = dual(2, 3, 8), torch.randn(8, 8)
    functions = {
        "linear": lambda t: F.linear(t, weight),
        "matmul": lambda t: t @ weight,
        "softmax": lambda t: t.softmax(-1),
        "layer_norm": lambda t: F.layer_norm(t, (8,)),
        "gelu": lambda t: F.gelu(F.linear(t, weight)),
        "attention": lambda t: F.scaled_dot_product_attention(t, t, t),
    }
    with torch.autocast("cpu", dtype=dtype):
        for name, function in functions.items():
            y = function(x)
            assert y.dtype == function(x.primal).dtype, name
            assert y.tangent.isfinite().all() and y.tangent.abs().max() > 0, name
