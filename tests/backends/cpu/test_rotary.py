"""The native rotary embedding beyond the shared suite: layouts, broadcast tables, tails, sums over broadcast axes."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_within_budget

from aajr_kernels.backends import cpu as native
from aajr_kernels.ops.rotary import reference

pytest.importorskip("aajr_kernels._native")
from aajr_kernels.ops.rotary import cpu as ours

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def heads(k, batch, count, length, size, dtype=torch.float32):
    """As attention sees it: [1 + K, B, H, N, D] in the memory of [1 + K, B, N, H, D]."""
    return draw(1 + k, batch, length, count, size, dtype=dtype).transpose(2, 3)


def compare(x, g, cos, sin, interleaved):
    wide = [t.double() for t in (x, g, cos, sin)]
    for t, wide_t, transposed, name in (
        (x, wide[0], False, "y"),
        (g, wide[1], True, "x_bar"),
    ):
        mine = ours.rotate(t, cos, sin, interleaved, transposed)
        eager = reference.rotate(t, cos, sin, interleaved, transposed)
        exact = reference.rotate(wide_t, *wide[2:], interleaved, transposed)
        assert mine.dtype == x.dtype and mine.shape == x.shape
        assert_within_budget(mine, eager, exact, name)
    mine = ours.rotary_tables_bwd(g, x, cos, sin, interleaved)
    eager = reference.rotary_tables_bwd(g, x, cos, sin, interleaved)
    exact = reference.rotary_tables_bwd(wide[1], wide[0], wide[2], wide[3], interleaved)
    for name, a, b, c in zip(("cos_bar", "sin_bar"), mine, eager, exact):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert_within_budget(a, b, c, name)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "rotated"), [(2, 2), (64, 64), (37, 6), (37, 36), (80, 46), (16, 0)])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_sizes_and_tails(vectors, dtype, size, rotated, interleaved, k):
    x, g = heads(k, 2, 3, 5, size, dtype), heads(k, 2, 3, 5, size, dtype)
    cos, sin = draw(2, 1, 5, rotated, dtype=dtype), draw(2, 1, 5, rotated, dtype=dtype)
    compare(x, g, cos, sin, interleaved)


@pytest.mark.parametrize("shape", [(1, 1, 5), (1, 3, 1), (2, 1, 1), (2, 3, 5), (5,), (3, 5), (1,), ()])
@pytest.mark.parametrize("tables", [torch.float32, torch.float16])
def test_broadcast_tables(vectors, shape, tables):
    x, g = heads(2, 2, 3, 5, 20), draw(3, 2, 3, 5, 20)
    compare(x, g, draw(*shape, 14, dtype=tables), draw(*shape, 14, dtype=tables), False)


def test_tables_of_two_dtypes_and_strides(vectors):
    x, g = heads(1, 2, 3, 5, 16, torch.bfloat16), heads(1, 2, 3, 5, 16, torch.bfloat16)
    compare(x, g, draw(5, 16), draw(5, 16, dtype=torch.bfloat16), True)
    compare(x, g, draw(2, 1, 1, 16).expand(2, 1, 5, 16), draw(16, 5).t().expand(2, 1, 5, 16), False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_are_read_in_place_and_kept(vectors, dtype, monkeypatch):
    fused = draw(2, 2, 5, 9, 24, dtype=dtype)  # queries and keys of one product
    cos, sin = draw(2, 1, 5, 24, dtype=dtype), draw(2, 1, 5, 24, dtype=dtype)
    expected = ours.rotate(fused[..., 2:5, :].transpose(2, 3).contiguous(), cos, sin, False, False)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: pytest.fail("copied"))
    for x in (fused[..., 2:5, :].transpose(2, 3), fused[..., 2:5, :].clone().transpose(2, 3)):
        y = ours.rotate(x, cos, sin, False, False)
        assert torch.equal(y, expected)
        assert y.transpose(2, 3).is_contiguous()


def test_strides_of_zero_and_a_last_axis_that_is_not_dense(vectors):
    cos, sin = draw(5, 6), draw(5, 6)
    for g in (
        draw(2, 2, 1, 5, 6).expand(2, 2, 3, 5, 6),
        draw(1).expand(2, 2, 3, 5, 6),
        draw(2, 2, 3, 6, 5).mT,
    ):
        expected = reference.rotate(g.contiguous(), cos, sin, False, True)
        torch.testing.assert_close(ours.rotate(g, cos, sin, False, True), expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_more_axes_than_the_module_takes(vectors, interleaved):
    x, g = draw(2, 1, 2, 1, 2, 1, 2, 1, 3, 10), draw(2, 1, 2, 1, 2, 1, 2, 1, 3, 10)
    compare(x, g, draw(2, 1, 3, 6), draw(2, 1, 3, 6), interleaved)


@pytest.mark.parametrize("shape", [(2, 0, 3, 5, 8), (2, 1, 0, 5, 8), (2, 1, 3, 0, 8)])
def test_empty(vectors, shape):
    x = draw(*shape)
    cos = draw(shape[1], 1, shape[3], 8)
    assert ours.rotate(x, cos, cos, False, False).shape == shape
    cos_bar, sin_bar = ours.rotary_tables_bwd(x, x, cos, cos, False)
    assert cos_bar.shape == sin_bar.shape == cos.shape and not cos_bar.any() and not sin_bar.any()


def test_many_rows_in_one_table(vectors):
    x, g = draw(2, 5000, 4) + 1.0, draw(2, 5000, 4) + 1.0
    compare(x, g, draw(1, 4), draw(1, 4), False)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bitwise_repeatable(vectors, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, g, cos, sin = heads(1, 2, 4, 101, 64), heads(1, 2, 4, 101, 64), draw(1, 101, 64), draw(1, 101, 64)
        compare(x, g, cos, sin, False)
        first = (ours.rotate(x, cos, sin, True, False), *ours.rotary_tables_bwd(g, x, cos, sin, True))
        again = (ours.rotate(x, cos, sin, True, False), *ours.rotary_tables_bwd(g, x, cos, sin, True))
        assert all(torch.equal(a, b) for a, b in zip(first, again))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"y": draw(2, 3, 6)}, "y must have the shape of x"),
        ({"y": draw(2, 3, 8).half()}, "y must be float32, got float16"),
        ({"cos": draw(3, 5)}, "cos must broadcast to the rows of x"),
        ({"cos": draw(3, 10)}, "cos must broadcast to the rows of x"),
        ({"cos": draw(2, 3, 8)}, "cos must broadcast to the rows of x"),
        ({"sin": draw(3, 4)}, "sin must turn as many features as cos"),
        ({"sin": draw(8, 3).t()}, "sin must have stride 1 on its last axis"),
    ],
)
def test_errors(arguments, words):
    tensors = {"x": draw(2, 3, 8), "y": draw(2, 3, 8), "cos": draw(3, 8), "sin": draw(3, 8)} | arguments
    with pytest.raises(ValueError, match=words):
        native.call("rotary", tuple(tensors.values()), (False, False))
