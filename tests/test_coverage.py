"""Coverage: ops, backends, shares, fallbacks and unsupported operations inside a block."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import aajr_kernels as aajr
from aajr_kernels.coverage import recording
from aajr_kernels.ops.head import lm_head_sensitivity


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


@pytest.mark.parametrize(
    ("function", "shapes", "products"),
    [
        (torch.matmul, ((3, 4), (4, 5)), 3 * 4 * 5),
        (torch.bmm, ((2, 3, 4), (2, 4, 5)), 2 * 3 * 4 * 5),
        (torch.addmm, ((3, 5), (3, 4), (4, 5)), 3 * 4 * 5),
        (torch.addmv, ((3,), (3, 4), (4,)), 3 * 4),
        (torch.addr, ((3, 5), (3,), (5,)), 3 * 5),
        (torch.addbmm, ((3, 5), (2, 3, 4), (2, 4, 5)), 2 * 3 * 4 * 5),
        (torch.baddbmm, ((2, 3, 5), (2, 3, 4), (2, 4, 5)), 2 * 3 * 4 * 5),
    ],
)
def test_products_count_their_arithmetic(function, shapes, products):
    *others, a, b = (torch.randn(shape) for shape in shapes)
    with aajr.coverage() as cov:
        function(*others, aajr.Dual(torch.stack([a, a, a])), b)
    (row,) = [entry for entry in cov.rows() if entry[1] == "torch"]
    assert cov.flops(row[0]) == 2.0 * products * 3  # the primal and two tangents


def test_plain_tensors_are_not_recorded():
    with aajr.coverage() as cov:
        F.linear(torch.ones(2, 3), torch.ones(4, 3))
    assert cov.rows() == []


def test_tokens_that_do_not_count_are_left_out_of_the_head():
    """All tokens by one call, 3 of 10 by the other; what was left out is the arithmetic of seven tokens."""
    hidden, weight = dual(10, 8, dtype=torch.float64), torch.randn(16, 8, dtype=torch.float64)
    with aajr.coverage() as all_of_them:
        lm_head_sensitivity(hidden, weight)
    with aajr.coverage() as some:
        lm_head_sensitivity(hidden, weight, mask=torch.arange(10) < 3)
    assert all_of_them.shares() == {"tokens": 1.0, "arithmetic": 1.0} and "computed" not in str(all_of_them)
    assert some.computed == {"tokens": [3, 10]} and some.skipped == 2.0 * 2 * 7 * 16 * 8
    assert some.flops("lm_head_sensitivity") + some.skipped == all_of_them.flops("lm_head_sensitivity")
    assert some.shares()["tokens"] == pytest.approx(0.3)
    assert "computed: 30.0% of the tokens in the head" in str(some)
    with aajr.coverage() as both:
        lm_head_sensitivity(hidden, weight)
        lm_head_sensitivity(hidden, weight, mask=torch.arange(10) < 3)
    assert both.computed == {"tokens": [13, 20]}


def test_a_number_of_tokens_that_only_a_device_knows_is_read_late(monkeypatch):
    """Rows that count in front, their number in a tensor: as on GPUs, where reading it would wait."""
    monkeypatch.setattr("aajr_kernels.ops.head.counted._is_known", lambda device: False)
    hidden, weight = dual(10, 8), torch.randn(16, 8)
    with aajr.coverage() as ran:
        for _ in range(2):
            lm_head_sensitivity(hidden, weight, mask=torch.arange(10) < 3)
    assert isinstance(ran.computed["tokens"][0], torch.Tensor)
    assert ran.shares()["tokens"] == pytest.approx(0.3) and ran.count("lm_head_sensitivity") == 2
    assert ran.flops("lm_head_sensitivity") == 2 * 2.0 * 2 * 3 * 16 * 8
    assert abs(sum(share for *_, share in ran.rows()) - 1) < 1e-6 and "30.0%" in str(ran)
