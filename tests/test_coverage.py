"""Coverage: ops, backends, shares, fallbacks and unsupported operations inside a block."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import aajr_kernels as aajr
from aajr_kernels.coverage import recording


def dual(*shape, dtype=torch.float32):
    return aajr.dual(torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype))


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
