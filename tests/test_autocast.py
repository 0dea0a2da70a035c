"""Autocast: dtypes as torch gives them, helpers of the ops, gradients through the casts."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import aajr_kernels as aajr
from aajr_kernels.autocast import autocast_float32, autocast_low, no_autocast


def dual(*shape, dtype=torch.float32):
    return aajr.dual(torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype))


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
