"""Native reductions beyond the shared suite: storage types, capabilities, strides, tails, offsets, huge rows."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from assertions import assert_within_budget

from aajr_kernels.backends import cpu as native
from aajr_kernels.ops.sensitivity import METRICS, reference

pytest.importorskip("aajr_kernels._native")
from aajr_kernels.ops.sensitivity import cpu as kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def compare(name: str, args: tuple, floor: float = 0.0) -> None:
    """A function of both backends on the same tensors, the truth in float64."""
    double = tuple(a.double() if isinstance(a, torch.Tensor) else a for a in args)
    got, eager, exact = (
        getattr(module, name)(*values)
        for module, values in ((kernels, args), (reference, args), (reference, double))
    )
    assert got.dtype == eager.dtype
    for k in range(got.shape[0]):  # a tangent may not hide behind the primal
        assert_within_budget(got[k], eager[k], exact[k], f"{name} {k}", floor=max(floor, 1e-30))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_sensitivity(metric, dtype, vectors):
    for k, size in itertools.product((1, 3), (1, 5, 37, 252, 1031)):
        y = (2.0 * torch.randn(1 + k, 2, 3, size)).to(dtype)
        floor = 1e-3 if size == 1 else 0.0  # one class: the sensitivity is zero
        compare("sensitivity_fwd", (y, metric), floor)
        compare("sensitivity_bwd", (torch.randn(k, 2, 3), y, metric), floor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax(dtype, vectors):
    for k, size in itertools.product((0, 1, 3), (1, 5, 37, 252, 1031)):
        x = (2.0 * torch.randn(1 + k, 2, 3, size)).to(dtype)
        floor = 1e-3 if size == 1 else 0.0
        compare("softmax_fwd", (x,), floor)
        compare("softmax_bwd", (torch.randn(x.shape).to(dtype), x), floor)


def views(dtype: torch.dtype):
    """Stacks whose memory is laid out in every way the callers produce."""
    y = torch.randn(2, 3, 4, 80).to(dtype)
    yield y[..., 1:38]  # rows apart, misaligned
    yield y.transpose(1, 2)
    yield y.transpose(2, 3)
    yield y.movedim(0, 1)[:2]
    yield y[..., ::2]
    yield y[:1].expand(3, -1, -1, -1)
    yield y.view(2, 1, 3, 1, 2, 2, 1, 1, 1, 80)
    yield y[:, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype, vectors):
    for y in views(dtype):
        cotangent = torch.randn(y.shape).to(dtype)
        q_bar = torch.randn(y.shape[0], *y.shape[1:-1]).movedim(0, -1).contiguous().movedim(-1, 0)[1:]
        for metric in ("l2", "fisher", "probs"):
            compare("sensitivity_fwd", (y, metric))
            compare("sensitivity_bwd", (q_bar, y, metric))
        compare("softmax_fwd", (y,))
        compare("softmax_bwd", (cotangent, y))
        compare("softmax_bwd", (cotangent.movedim(1, -1).contiguous().movedim(-1, 1), y))


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_a_common_offset_of_the_tangent_cancels_exactly(offset, vectors):
    """ż + offset where the sum is exact: not one bit of a result may change."""
    y = torch.randn(2, 6, 500)
    y[1] = (y[1] * 64).round() / 64
    moved = y.clone()
    moved[1] += offset
    q_bar, cotangent = torch.ones(1, 6), torch.randn(2, 6, 500)
    for metric in ("fisher", "probs"):
        assert torch.equal(kernels.sensitivity_fwd(y, metric), kernels.sensitivity_fwd(moved, metric))
        assert torch.equal(
            kernels.sensitivity_bwd(q_bar, y, metric), kernels.sensitivity_bwd(q_bar, moved, metric)
        )
    assert torch.equal(kernels.softmax_fwd(y), kernels.softmax_fwd(moved))
    assert torch.equal(kernels.softmax_bwd(cotangent, y), kernels.softmax_bwd(cotangent, moved))


def test_the_tangent_at_the_largest_logit_may_be_an_outlier(vectors):
    """Nothing cancels although the reference point is far from the mean."""
    y = torch.randn(2, 4, 1000)
    y[1].scatter_(-1, y[0].argmax(-1, keepdim=True), 1e3)
    for metric in ("fisher", "probs"):
        compare("sensitivity_fwd", (y, metric))
        compare("sensitivity_bwd", (torch.ones(1, 4), y, metric))


def test_many_classes_sum_to_one(vectors):
    x = torch.randn(2, 2, 131_073)
    y, exact = kernels.softmax_fwd(x), reference.softmax_fwd(x.double())
    assert (y[0].double().sum(-1) - 1.0).abs().max() < 1e-6
    assert (y - exact).norm() < 1e-6 * exact.norm()
    q, q_exact = kernels.sensitivity_fwd(x, "fisher"), reference.sensitivity_fwd(x.double(), "fisher")
    torch.testing.assert_close(q.double(), q_exact, rtol=4e-6, atol=0)


def test_non_finite_logits_as_in_torch(vectors):
    for size in (5, 40, 600):
        x = torch.randn(2, 6, size)
        x[0, 0] = -math.inf  # nothing to choose
        x[0, 1, 1:] = -math.inf  # one choice
        x[0, 2, 2] = math.inf
        x[0, 3, size - 1] = math.nan
        x[0, 4] = -1e4  # what is behind a short row must not be seen
        y = kernels.softmax_fwd(x)
        torch.testing.assert_close(y[0], x[0].softmax(-1), equal_nan=True)
        assert torch.isfinite(y[:, [1, 4, 5]]).all() and torch.isnan(y[1, [0, 2, 3]]).all()
        q = kernels.sensitivity_fwd(x, "fisher")
        assert torch.isnan(q[0, [0, 2, 3]]).all() and q[0, 1] == 0.0 and torch.isfinite(q[0, 4:]).all()
        gradient = kernels.softmax_bwd(torch.ones_like(x), x)
        assert torch.isfinite(gradient[:, [1, 4, 5]]).all()


def test_threads_do_not_change_a_bit():
    y, cotangent, q_bar = torch.randn(2, 67, 331), torch.randn(2, 67, 331), torch.randn(1, 67)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(
                [kernels.sensitivity_fwd(y, m) for m in METRICS]
                + [kernels.sensitivity_bwd(q_bar, y, m) for m in METRICS]
                + [kernels.softmax_fwd(y), kernels.softmax_bwd(cotangent, y)]
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_empty():
    for shape in ((2, 0, 5), (2, 3, 0), (2, 0)):
        y = torch.zeros(shape)
        assert kernels.sensitivity_fwd(y, "l2").tolist() == torch.zeros(1, *shape[1:-1]).tolist()
        assert kernels.sensitivity_bwd(torch.ones(1, *shape[1:-1]), y, "l2").shape == shape
        assert kernels.softmax_bwd(y, kernels.softmax_fwd(y)).shape == shape
    assert kernels.sensitivity_fwd(torch.zeros(1, 3, 5), "fisher").shape == (0, 3)
    assert not kernels.sensitivity_bwd(torch.zeros(0, 3), torch.randn(1, 3, 5), "fisher").any()


def test_errors():
    y = torch.randn(2, 3, 5)
    with pytest.raises(ValueError, match=r"q must have shape \[1, 3\], got \[1, 4\]"):
        native.call("sensitivity_fwd", (y, torch.empty(1, 4)), (1,))
    with pytest.raises(ValueError, match="q must be float32, got bfloat16"):
        native.call("sensitivity_fwd", (y, torch.empty(1, 3).bfloat16()), (1,))
    with pytest.raises(ValueError, match="metric must be the code of a metric"):
        native.call("sensitivity_fwd", (y, torch.empty(1, 3)), (7,))
    with pytest.raises(ValueError, match="y must have a last axis with elements"):
        native.call("sensitivity_fwd", (y[..., :0], torch.empty(1, 3)), (1,))
    with pytest.raises(ValueError, match="y must have stride 1 on its last axis"):
        native.call("softmax_fwd", (y, torch.empty(2, 3, 10)[..., ::2]))
    with pytest.raises(ValueError, match="y must have 2 stacked tensors of the shape of x"):
        native.call("softmax_fwd", (y, torch.empty(2, 3, 4)))
    with pytest.raises(ValueError, match="x_bar must have 2 stacked|must not be None"):
        native.call("softmax_bwd", (y, y, None))
