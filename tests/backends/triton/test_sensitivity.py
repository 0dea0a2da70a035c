"""Triton reductions beyond the shared suite: blocks of a row and their merging, offsets, strides, infinities."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

pytest.importorskip("triton")
from assertions import assert_within_budget
from backends.triton.checks import DEVICE, DTYPES, QUIET, draw, same_bits

from aajr_kernels.ops.sensitivity import METRICS, reference
from aajr_kernels.ops.sensitivity import triton as ours

pytestmark = pytest.mark.filterwarnings(QUIET)


def rows_apart(name: str, args: tuple, floor: float = 0.0) -> None:
    """A function of both backends, the truth in float64; a tangent may not hide behind the primal."""
    double = tuple(a.double() if isinstance(a, torch.Tensor) else a for a in args)
    runs = ((ours, args), (reference, args), (reference, double))
    got, eager, exact = (getattr(module, name)(*values) for module, values in runs)
    assert (got.dtype, got.shape) == (eager.dtype, eager.shape)
    for k, row in enumerate(zip(got, eager, exact)):
        assert_within_budget(*row, f"{name} {k}", floor=max(floor, 1e-30))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "k"), [(1, 1), (5, 3), (37, 1), (1031, 3), (5001, 1)])
def test_sizes(dtype, size, k):
    y = draw(1 + k, 1, 2, size, dtype=dtype, scale=2.0)
    floor = 1e-3 if size == 1 else 0.0  # one class: the sensitivity is zero
    for metric in METRICS:
        rows_apart("sensitivity_fwd", (y, metric), floor)
        rows_apart("sensitivity_bwd", (draw(k, 1, 2), y, metric), floor)
    rows_apart("softmax_fwd", (y,), floor)
    rows_apart("softmax_bwd", (draw(*y.shape, dtype=dtype), y), floor)
    rows_apart("softmax_fwd", (y[:1],), floor)
    rows_apart("softmax_bwd", (draw(1, 1, 2, size, dtype=dtype), y[:1]), floor)


def views(dtype: torch.dtype):
    """Stacks whose memory is laid out in every way the callers produce."""
    y = draw(2, 2, 3, 12, dtype=dtype)
    yield y[..., 1:8]  # rows apart, misaligned
    yield y.transpose(1, 2)
    yield y.transpose(2, 3)
    yield y.movedim(0, 1)[:2]
    yield y[..., ::2]
    yield y[:1].expand(3, -1, -1, -1)
    yield y.view(2, 1, 2, 1, 3, 1, 1, 2, 1, 6)
    yield y[:, 0, 0]


@pytest.mark.slow
def test_strides_are_read_in_place():
    for y in views(torch.bfloat16):
        q_bar = draw(y.shape[0] - 1, *y.shape[1:-1]).movedim(0, -1).contiguous().movedim(-1, 0)
        rows_apart("sensitivity_bwd", (q_bar, y, "fisher"))
        rows_apart("sensitivity_fwd", (y, "fisher"))
        cotangent = draw(*y.shape, dtype=torch.bfloat16).movedim(1, -1).contiguous().movedim(-1, 1)
        rows_apart("softmax_bwd", (cotangent, y))


@pytest.mark.parametrize(("offset", "size"), [(1e2, 500), (1e4, 9000)])
def test_a_common_offset_of_the_tangent_cancels_exactly(offset, size):
    """ż + offset where the sum is exact: not one bit of a result may change."""
    y = draw(2, 1, size)
    y[1] = (y[1] * 64).round() / 64
    moved = y.clone()
    moved[1] += offset
    q_bar, cotangent = torch.ones(1, 1, device=DEVICE), draw(2, 1, size)
    for metric in ("fisher", "probs"):
        assert torch.equal(ours.sensitivity_fwd(y, metric), ours.sensitivity_fwd(moved, metric))
        a, b = (ours.sensitivity_bwd(q_bar, t, metric) for t in (y, moved))
        assert torch.equal(a, b)
    assert torch.equal(ours.softmax_fwd(y), ours.softmax_fwd(moved))
    assert torch.equal(ours.softmax_bwd(cotangent, y), ours.softmax_bwd(cotangent, moved))


@pytest.mark.parametrize("size", [1000, 9000])
def test_the_tangent_at_the_largest_logit_may_be_an_outlier(size):
    """Nothing cancels although the reference point is far from the mean."""
    y = draw(2, 1, size)
    y[1].scatter_(-1, y[0].argmax(-1, keepdim=True), 1e3)
    for metric in ("fisher", "probs"):
        rows_apart("sensitivity_fwd", (y, metric))
        rows_apart("sensitivity_bwd", (torch.ones(1, 1, device=DEVICE), y, metric))


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_blocks_of_very_different_mass(order):
    """Logits that rise or fall by hundreds from block to block: old blocks fade, later ones do not overflow."""
    ramp = torch.linspace(-300.0, 300.0, 9000, device=DEVICE)
    y = draw(2, 2, 9000)
    y[0] += ramp if order == "rising" else ramp.flip(0)
    for metric in ("fisher", "probs"):
        rows_apart("sensitivity_fwd", (y, metric))
        rows_apart("sensitivity_bwd", (torch.ones(1, 2, device=DEVICE), y, metric))
    rows_apart("softmax_bwd", (draw(2, 2, 9000), y))


def test_a_vocabulary_sums_to_one():
    x = draw(2, 1, 131_073)
    y, exact = ours.softmax_fwd(x), reference.softmax_fwd(x.double())
    assert (y[0].double().sum(-1) - 1.0).abs().max() < 1e-6
    assert (y - exact).norm() < 1e-6 * exact.norm()
    q, q_exact = ours.sensitivity_fwd(x, "fisher"), reference.sensitivity_fwd(x.double(), "fisher")
    torch.testing.assert_close(q.double(), q_exact, rtol=4e-6, atol=0)


@pytest.mark.parametrize("size", [5, pytest.param(5000, marks=pytest.mark.slow)])
def test_logits_that_are_not_finite_as_in_torch(size):
    x = draw(2, 6, size)
    x[0, 0] = -math.inf  # nothing to choose
    x[0, 1, 1:] = -math.inf  # one choice
    x[0, 2, 2] = math.inf
    x[0, 3, size - 1] = math.nan
    x[0, 4] = -1e4  # what is behind a short row must not be seen
    x[0, 5, : size // 2] = -math.inf  # a first block without mass
    y = ours.softmax_fwd(x)
    torch.testing.assert_close(y[0], x[0].softmax(-1), equal_nan=True)
    assert torch.isfinite(y[:, [1, 4, 5]]).all() and torch.isnan(y[1, [0, 2, 3]]).all()
    for metric in ("fisher", "probs"):
        q = ours.sensitivity_fwd(x, metric)
        assert torch.isnan(q[0, [0, 2, 3]]).all() and q[0, 1] == 0.0 and torch.isfinite(q[0, 4:]).all()
        assert torch.isfinite(ours.sensitivity_bwd(torch.ones_like(q), x, metric)[:, [1, 4, 5]]).all()
    gradient = ours.softmax_bwd(torch.ones_like(x), x)
    assert torch.isfinite(gradient[:, [1, 4, 5]]).all()
    rows_apart("softmax_bwd", (draw(2, 1, size), x[:, 5:]))
    rows_apart("sensitivity_fwd", (x[:, 5:], "probs"))


def test_bitwise_repeatable():
    y, cotangent, q_bar = draw(2, 2, 5000), draw(2, 2, 5000), draw(1, 2)
    runs = [
        (*(ours.sensitivity_bwd(q_bar, y, m) for m in METRICS), ours.softmax_bwd(cotangent, y))
        for _ in range(2)
    ]
    assert same_bits(*runs)


def test_empty():
    for shape in ((2, 0, 5), (2, 3, 0), (2, 0)):
        y = draw(*shape)
        assert ours.sensitivity_fwd(y, "l2").tolist() == torch.zeros(1, *shape[1:-1]).tolist()
        q_bar = torch.ones(1, *shape[1:-1], device=DEVICE)
        assert ours.sensitivity_bwd(q_bar, y, "l2").shape == shape
        assert ours.softmax_bwd(y, ours.softmax_fwd(y)).shape == shape
    assert ours.sensitivity_fwd(draw(1, 3, 5), "fisher").shape == (0, 3)
    assert not ours.sensitivity_bwd(draw(0, 3), draw(1, 3, 5), "fisher").any()
    for metric, size in itertools.product(METRICS, (0, 5)):
        assert ours.sensitivity_fwd(draw(3, 0, size), metric).shape == (2, 0)
