"""The native linear layer beyond the shared suite: the bias of the primal, its gradient, products of low dtypes."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_within_budget

from aajr_kernels.backends import cpu as native
from aajr_kernels.ops.linear import reference

pytest.importorskip("aajr_kernels._native")
from aajr_kernels.ops.linear import cpu as ours

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def both(module, x, g, weight, bias, needs=(True, True, True)):
    y = module.linear_fwd(x, weight, bias)
    return y, *module.linear_bwd(g, x if needs[1] else None, weight if needs[0] else None, needs[2])


def compare(x, g, weight, bias):
    got, eager = both(ours, x, g, weight, bias), both(reference, x, g, weight, bias)
    exact = both(reference, *(t.double() for t in (x, g, weight, bias)))
    for name, mine, theirs, truth in zip(("y", "x_bar", "w_bar", "b_bar"), got, eager, exact):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
        assert_within_budget(mine, theirs, truth, name)


@pytest.mark.parametrize("widened", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", [1, 37, 252])
@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (1, 2, 1, 2, 1, 2, 1, 2)])
def test_shapes(vectors, dtype, out, batch, widened, monkeypatch):
    monkeypatch.setattr(ours, "_widen", lambda dtype: widened and dtype != torch.float32)
    for k in (0, 1, 3):
        x, g = draw(1 + k, *batch, 9, dtype=dtype), draw(1 + k, *batch, out, dtype=dtype)
        compare(x, g, draw(out, 9, dtype=dtype), draw(out, dtype=dtype))


def test_strides(vectors):
    x, g = draw(2, 7, 4, 6)[..., :3].transpose(1, 2), draw(2, 4, 7, 10)[..., 5:]
    compare(x, g, draw(3, 5).t(), draw(10)[::2])
    compare(x, draw(1).expand(2, 4, 7, 5), draw(5, 3), draw(1).expand(5))


def test_the_bias_gradient_of_many_rows(vectors):
    for dtype in DTYPES:
        g = draw(2, 5000, 7, dtype=dtype) + 1.0
        _, _, mine = ours.linear_bwd(g, None, None, True)
        _, _, eager = reference.linear_bwd(g, None, None, True)
        assert_within_budget(mine, eager, g[0].double().sum(0))


def test_skipped_gradients_and_no_bias(vectors):
    x, g, weight, bias = draw(2, 5, 6), draw(2, 5, 4), draw(4, 6), draw(4)
    assert torch.equal(ours.linear_fwd(x, weight, None), reference.linear_fwd(x, weight, None))
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        some = both(ours, x, g, weight, bias, needs)
        assert tuple(t is not None for t in some[1:]) == needs


@pytest.mark.parametrize("sizes", [(0, 6, 4), (5, 0, 4), (5, 6, 0)])
def test_empty(vectors, sizes):
    rows, size, out = sizes
    compare(draw(2, rows, size), draw(2, rows, out), draw(out, size), draw(out))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bitwise_repeatable(vectors, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, g, weight, bias = draw(2, 401, 16), draw(2, 401, 252), draw(252, 16), draw(252)
        compare(x, g, weight, bias)
        first, again = both(ours, x, g, weight, bias), both(ours, x, g, weight, bias)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("name", "tensors", "words"),
    [
        ("linear_bias", (draw(2, 3, 4), draw(2, 3, 5), draw(5)), "product must have the shape of y"),
        ("linear_bias", (draw(2, 4), draw(2, 4), draw(5)), r"bias must have shape \[4\]"),
        ("linear_bias", (draw(2, 4).half(), draw(2, 4), draw(4)), "product must be float32, got float16"),
        ("linear_bias", (draw(4, 2).t(), draw(2, 4), draw(4)), "product must be contiguous"),
        ("column_sum", (draw(2, 3, 4), draw(5)), r"sum must have shape \[4\]"),
        ("column_sum", (draw(2, 4, 3).mT, draw(4)), "x must have stride 1"),
    ],
)
def test_errors(name, tensors, words):
    with pytest.raises(ValueError, match=words):
        native.call(name, tensors)
