"""Native norms beyond the shared suite: strides, tails, partial sums, offsets that cancel."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_within_budget

from aajr_kernels.backends import cpu as native
from aajr_kernels.ops.norm import reference

pytest.importorskip("aajr_kernels._native")
from aajr_kernels.ops.norm import cpu as ours

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def both(module, x, g, weight, bias, offset=0.0, needs=(True, True, True)):
    """Outputs and gradients of RMS norm (no bias) or layer norm."""
    centred = bias is not None
    y, stats, _ = module.norm_fwd(x, weight, bias, 1e-5, offset, centred)
    return y, *module.norm_bwd(g, x, weight, stats, offset, centred, *needs)


def compare(x, g, weight, bias, offset=0.0):
    got = both(ours, x, g, weight, bias, offset)
    eager = both(reference, x, g, weight, bias, offset)
    wide = [None if t is None else t.double() for t in (x, g, weight, bias)]
    exact = both(reference, *wide, offset)
    for name, mine, theirs, truth in zip(("y", "x_bar", "w_bar", "b_bar"), got, eager, exact):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
        assert_within_budget(mine, theirs, truth, name)


def draw(*shape, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(shape)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 3, 37, 64, 252, 507])
@pytest.mark.parametrize("k", [0, 1, 2, 3, 4])
def test_sizes_and_tails(vectors, dtype, size, k):
    x, g, weight, bias = (
        draw(*s, dtype=dtype) for s in ((1 + k, 5, size), (1 + k, 5, size), (size,), (size,))
    )
    compare(x, g, weight, None, offset=1.0)
    if size > 1:  # one feature is its own mean: what is left is rounding
        compare(x, g, weight, bias)


def test_long_rows_and_many_rows(vectors):
    for rows, size in ((2, 70_001), (3000, 5)):
        x, g, weight, bias = draw(2, rows, size), draw(2, rows, size), draw(size), draw(size)
        x += 0.5
        g += 0.5
        compare(x, g, weight, bias)
        compare(x, g, weight, None)


@pytest.mark.parametrize("shift", [1e3, -1e3])
def test_a_large_mean_cancels_nothing(vectors, shift):
    x, g, weight, bias = draw(3, 7, 384), draw(3, 7, 384), draw(384), draw(384)
    x[:, :4] += shift
    g[:, 3:] += shift
    compare(x, g, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_are_read_in_place(vectors, dtype, monkeypatch):
    wide = draw(2, 3, 4, 5, 90, dtype=dtype)
    x, g = wide[..., 1:38].transpose(1, 2), wide.flip(0)[..., 40:77].permute(0, 3, 1, 2, 4)[:, :4, :, :3]
    g = g.reshape(2, 4, 3, 3, 37)[:, :, :, :1].expand(2, 4, 3, 5, 37)  # stride 0 within the batch
    weight, bias = draw(37, dtype=dtype), draw(37, dtype=dtype)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: pytest.fail("copied"))
    got = both(ours, x, g, weight, bias)
    monkeypatch.undo()
    expected = both(ours, x.contiguous(), g.contiguous(), weight, bias)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_a_last_axis_that_is_not_dense(vectors):
    x, g, weight, bias = (
        draw(2, 9, 6).transpose(1, 2),
        draw(2, 6, 1).expand(2, 6, 9),
        draw(18)[::2],
        draw(1).expand(9),
    )
    compare(x, g, weight, bias)


def test_more_axes_than_the_module_takes(vectors):
    shape = (2, 1, 2, 1, 2, 1, 2, 1, 3, 10)
    compare(draw(*shape), draw(*shape), draw(10), draw(10))


@pytest.mark.parametrize("shape", [(2, 0, 4), (2, 3, 0), (3, 0, 2, 4), (2, 5)])
def test_empty_and_no_batch(vectors, shape):
    x, g, weight = draw(*shape), draw(*shape), draw(shape[-1])
    y, x_bar, w_bar, b_bar = both(ours, x, g, weight, weight)
    assert y.shape == x_bar.shape == shape
    if x.numel() == 0:
        assert not w_bar.any() and not b_bar.any() and w_bar.shape == weight.shape


def test_gradients_nobody_needs(vectors):
    x, g, weight, bias = draw(2, 70, 33), draw(2, 70, 33), draw(33), draw(33)
    every = both(ours, x, g, weight, bias)
    for needs in ((True, False, False), (False, True, False), (False, False, True), (False, True, True)):
        some = both(ours, x, g, weight, bias, needs=needs)
        for need, got, expected in zip(needs, some[1:], every[1:]):
            assert (got is not None) == need
            assert got is None or torch.equal(got, expected)
    for weight_, bias_ in ((None, bias), (weight, None), (None, None)):
        y, *_ = ours.norm_fwd(x, weight_, bias_, 1e-5, 0.0, True)
        one = weight_ if weight_ is not None else torch.ones(33)
        zero = bias_ if bias_ is not None else torch.zeros(33)
        assert torch.equal(y, ours.norm_fwd(x, one, zero, 1e-5, 0.0, True)[0])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bitwise_repeatable(vectors, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, g, weight, bias = draw(2, 301, 252), draw(2, 301, 252), draw(252), draw(252)
        compare(x, g, weight, bias)
        first = both(ours, x, g, weight, bias)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, both(ours, x, g, weight, bias)))
    finally:
        torch.set_num_threads(before)


def test_rows_that_are_not_finite_stay_alone(vectors):
    x, g, weight, bias = draw(2, 4, 37), draw(2, 4, 37), draw(37), draw(37)
    x[0, 1, 5], x[1, 2, 36], x[0, 3, 0] = float("inf"), float("nan"), float("nan")
    for b in (None, bias):
        y, x_bar, *_ = both(ours, x, g, weight, b)
        expected_y, expected, *_ = both(reference, x, g, weight, b)
        assert torch.equal(torch.isfinite(y), torch.isfinite(expected_y))
        assert torch.equal(torch.isfinite(x_bar), torch.isfinite(expected))
        assert torch.isfinite(y[:, 0]).all() and not torch.isfinite(y[:, 3]).any()


def test_weights_of_another_dtype(vectors):
    x, g, weight, bias = (
        draw(2, 9, 40, dtype=torch.bfloat16),
        draw(2, 9, 40, dtype=torch.bfloat16),
        draw(40),
        draw(40),
    )
    compare(x, g, weight, bias.bfloat16())
    compare(x, g, weight.half(), bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [(2, 2), (1, 3), (4, 1), (1, 1)])
def test_sum_and_norm(vectors, dtype, counts):
    weight, bias = draw(37, dtype=dtype), draw(37, dtype=dtype)
    x, residual = (
        draw(counts[0], 5, 3, 40, dtype=dtype)[..., 1:38].transpose(1, 2),
        draw(counts[1], 3, 5, 37, dtype=dtype),
    )
    g, sum_bar = (
        draw(max(counts), 3, 5, 37, dtype=dtype),
        draw(max(counts), 5, 3, 50, dtype=dtype)[..., :37].transpose(1, 2),
    )
    results = []
    for module, cast in ((ours, lambda t: t), (reference, lambda t: t), (reference, torch.Tensor.double)):
        x_, residual_, weight_, bias_, g_, sum_bar_ = map(cast, (x, residual, weight, bias, g, sum_bar))
        y, stats, summed = module.norm_fwd(x_, weight_, bias_, 1e-5, 0.0, True, residual_)
        # at the rounded sum: how the rounding moves the rest is no error of the kernel
        at = cast(results[0][1]) if results else summed
        if results:
            y, stats, _ = module.norm_fwd(at, weight_, bias_, 1e-5, 0.0, True)
        bars = module.norm_bwd(g_, at, weight_, stats, 0.0, True, True, True, True, sum_bar_)
        results.append((y, summed, *bars))
    assert torch.equal(results[0][1], results[1][1])
    for mine, theirs, truth in zip(*results):
        assert_within_budget(mine, theirs, truth)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"y": draw(2, 3, 5)}, "y must have the shape of x"),
        ({"stats": draw(2, 4)}, r"stats must have shape \[2, 3\], got \[2, 4\]"),
        ({"weight": draw(5)}, r"weight must have shape \[4\], got \[5\]"),
        ({"y": draw(2, 3, 4).half()}, "y must be float32, got float16"),
        ({"x": draw(2, 3, 8)[..., ::2]}, "x must have stride 1 on its last axis"),
        ({"y": draw(2, 4, 3).transpose(1, 2)}, "y must be contiguous"),
        ({"x": draw(4)}, "x must be"),
    ],
)
def test_errors(arguments, words):
    tensors = {"x": draw(2, 3, 4), "y": draw(2, 3, 4), "stats": draw(2, 3), "weight": draw(4)} | arguments
    with pytest.raises(ValueError, match=words):
        native.call("norm_fwd", (*tensors.values(), None, None, None), (False,), (1e-5, 0.0))
