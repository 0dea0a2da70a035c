"""Sensitivities of outputs that are in memory."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_exact, assert_within_budget
from ops.op_checks import check, check_low, outcome, stacks

from aajr_kernels import Dual, coverage
from aajr_kernels.ops.sensitivity import METRICS, sensitivity, softmax
from aajr_kernels.testing.oracle import metric_values


def both(y, metric, dtype=torch.float64):
    """(q, gradient) of ours in `dtype`, of autograd through the written-out metric in `dtype`, and in float64."""
    y = y.to(dtype)
    q_bar = torch.randn(y.shape[0] - 1, *y.shape[1:-1], dtype=torch.float64)
    written = lambda s, p: metric_values(s[0][0], s[0][1:], metric)
    ours = outcome(lambda s, p: sensitivity(Dual(s[0]), metric), [y], [], q_bar)
    return ours, outcome(written, [y], [], q_bar), outcome(written, [y.double()], [], q_bar)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shape", [(7,), (5, 37), (2, 3, 252), (4, 1)])
def test_against_autograd(metric, k, shape):
    ours, _, exact = both(stacks(*shape, k=k, scale=2.0), metric)
    assert ours[0].shape == (k, *shape[:-1])
    assert_exact(ours[0], exact[0], tolerance=1e-12, floor=1e-12)
    assert_exact(ours[1][0], exact[1][0], tolerance=1e-12, floor=1e-12)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_dtypes(metric, dtype):
    ours, eager, exact = both(stacks(5, 63, k=2, scale=2.0), metric, dtype)
    assert ours[0].dtype == torch.float32 and ours[1][0].dtype == dtype
    assert_within_budget(ours[0], eager[0], exact[0], "q")
    assert_within_budget(ours[1][0], eager[1][0], exact[1][0], "gradient")


@pytest.mark.parametrize("metric", ["fisher", "probs"])
@pytest.mark.parametrize("offset", [0.0, 1e2, 1e3])
def test_a_common_offset_of_the_tangent_drops_out(metric, offset):
    y = torch.randn(2, 6, 500, dtype=torch.float32)
    y[1] = (y[1] + offset).round(decimals=3)
    ours, _, exact = both(y, metric, torch.float32)
    assert_exact(ours[0], exact[0], "q", tolerance=1e-5)
    assert_exact(ours[1][0], exact[1][0], "gradient", tolerance=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_large_and_masked_logits(metric):
    y = stacks(6, 11, k=2)
    y[0, :3] *= 1e4  # one-hot probabilities
    y[0, 3:, ::2] = -torch.inf  # words that cannot be drawn
    y[1:, 3:, ::2] = 0.0
    q_bar = torch.ones(2, 6, dtype=torch.float64)
    q, (gradient,) = outcome(lambda s, p: sensitivity(Dual(s[0]), metric), [y], [], q_bar)
    assert torch.isfinite(q).all() and torch.isfinite(gradient).all()
    assert_exact(q[:, 3:], metric_values(y[0, 3:, 1::2], y[1:, 3:, 1::2], metric), tolerance=1e-12)


def test_fisher_is_the_second_order_term_of_the_divergence():
    y = stacks(4, 9)
    t = 1e-4
    p, moved = y[0].log_softmax(-1), (y[0] + t * y[1]).log_softmax(-1)
    divergence = (p.exp() * (p - moved)).sum(-1)
    assert_exact(sensitivity(Dual(y), "fisher")[0], 2 * divergence / t**2, tolerance=1e-3)


def test_non_contiguous_and_empty():
    ours, _, exact = both(stacks(5, 7, 3).transpose(1, 3), "fisher")
    assert_exact(ours[1][0], exact[1][0], tolerance=1e-12)
    for metric in METRICS:
        y = torch.zeros(2, 0, 5, requires_grad=True)
        sensitivity(Dual(y), metric).sum().backward()
        assert y.grad.shape == (2, 0, 5)
    assert sensitivity(Dual(torch.zeros(2, 3, 0)), "l2").tolist() == [[0.0, 0.0, 0.0]]


def test_coverage():
    with coverage() as cov:
        sensitivity(Dual(torch.randn(2, 3, 5)), "probs")
    assert [op for op, _ in cov.entries] == ["sensitivity"]


def test_errors():
    y = Dual(torch.randn(2, 3, 5))
    with pytest.raises(ValueError, match="metric must be one of l2, logits, fisher, probs, got 'kl'"):
        sensitivity(y, "kl")
    with pytest.raises(TypeError, match="y must be a Dual, got Tensor without tangents"):
        sensitivity(torch.randn(3, 5), "l2")
    with pytest.raises(ValueError, match="non-empty last axis"):
        sensitivity(Dual(torch.randn(2)), "l2")
    with pytest.raises(ValueError, match="non-empty last axis"):
        sensitivity(Dual(torch.zeros(2, 3, 0)), "fisher")


def test_a_large_vocabulary_keeps_float32_accuracy():
    """torch's float32 softmax on a CPU does not sum to one over many classes; the budget of eager would hide it."""
    stacked = torch.randn(2, 3, 49152)
    low, exact = (stacked.to(t).requires_grad_() for t in (torch.float32, torch.float64))
    q, q_exact = (sensitivity(Dual(s), "fisher") for s in (low, exact))
    (g,), (g_exact,) = (torch.autograd.grad(value.sum(), s) for value, s in ((q, low), (q_exact, exact)))
    assert (q - q_exact).norm() < 2e-6 * q_exact.norm()
    assert (g - g_exact).norm() < 4e-6 * g_exact.norm()


def softmax_formula(x, dim):
    e = torch.exp(x - x.detach().amax(dim, keepdim=True))
    return e / e.sum(dim, keepdim=True)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_softmax(k, dim):
    op, formula = (lambda x: softmax(x, dim)), (lambda x: softmax_formula(x, dim))
    check(op, formula, [stacks(5, 37, 3, k=k, scale=2.0)])
    check(op, formula, [stacks(3, 7, 5, k=k).transpose(1, 3)])
    check_low(op, lambda x: x.softmax(dim), [stacks(4, 6, 50, k=k, scale=2.0)], [], torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softmax_in_low_dtypes(dtype):
    check_low(lambda x: softmax(x), lambda x: x.softmax(-1), [stacks(13, 50, k=2, scale=2.0)], [], dtype)


def test_softmax_of_masked_rows_and_offsets():
    x = stacks(6, 11)
    x[0, :, ::2] = -torch.inf
    x[0, 0] = -torch.inf
    y = softmax(Dual(x.clone()))
    assert torch.isnan(y.stacked[:, 0]).all()
    torch.testing.assert_close(y.primal, x[0].softmax(-1), equal_nan=True)
    assert not y.stacked[:, 1:, ::2].any()
    low = torch.randn(2, 6, 500)
    low[1] = (low[1] * 64).round() / 64
    moved = low + torch.tensor([0.0, 1e3]).view(2, 1, 1)
    assert_exact(softmax(Dual(moved)).stacked, softmax(Dual(low.double())).stacked, tolerance=1e-6)


def test_torch_softmax_of_a_dual_is_this_op():
    x = Dual(stacks(3, 5))
    with coverage() as cov:
        results = [torch.softmax(x, -1), x.softmax(1), torch.nn.functional.softmax(x, dim=-1)]
    assert [op for op, _ in cov.entries] == ["softmax"] and cov.rows()[0][2] == 3
    assert all(torch.equal(r.stacked, softmax(x).stacked) for r in results)
    with torch.autocast("cpu", torch.bfloat16):
        assert softmax(Dual(torch.randn(2, 3, 5).bfloat16())).dtype == torch.float32


def test_softmax_errors_and_empties():
    assert softmax(Dual(torch.zeros(2, 0, 5))).shape == (0, 5)
    assert softmax(Dual(torch.zeros(2, 5, 0))).shape == (5, 0)
    with pytest.raises(TypeError, match="x must be a Dual, got Tensor: use torch.softmax"):
        softmax(torch.randn(3))
    with pytest.raises(IndexError, match=r"dim must be an axis of x with shape \(3,\), got 1"):
        softmax(Dual(torch.randn(2, 3)), 1)
