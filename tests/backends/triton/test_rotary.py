"""The Triton rotary embedding beyond the shared suite: layouts, broadcast tables, tails, sums over broadcast axes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from backends.triton.checks import DTYPES, compare, draw, same_bits

from aajr_kernels.ops.rotary import reference
from aajr_kernels.ops.rotary import triton as ours


def heads(k, batch, count, length, size, dtype=torch.float32):
    """As attention sees it: [1 + K, B, H, N, D] in the memory of [1 + K, B, N, H, D]."""
    return draw(1 + k, batch, length, count, size, dtype=dtype).transpose(2, 3)


def check(x, g, cos, sin, interleaved):
    got = compare(ours, reference, "rotate", (x, cos, sin, interleaved, False))
    got += compare(ours, reference, "rotate", (g, cos, sin, interleaved, True))
    return got + compare(ours, reference, "rotary_tables_bwd", (g, x, cos, sin, interleaved))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "turned", "k"), [(2, 2, 0), (64, 64, 1), (37, 6, 3), (80, 46, 1), (16, 0, 1)]
)
def test_sizes_and_tails(dtype, size, turned, interleaved, k):
    x, g = heads(k, 2, 3, 5, size, dtype), heads(k, 2, 3, 5, size, dtype)
    cos, sin = draw(2, 1, 5, turned, dtype=dtype), draw(2, 1, 5, turned, dtype=dtype)
    check(x, g, cos, sin, interleaved)


@pytest.mark.parametrize("shape", [(1, 1, 5), (1, 3, 1), (2, 1, 1), (2, 3, 5), (5,), (3, 5), (1,), ()])
@pytest.mark.parametrize("interleaved", [False, True])
def test_broadcast_tables(shape, interleaved):
    x, g = heads(2, 2, 3, 5, 20), draw(3, 2, 3, 5, 20)
    cos, sin = draw(*shape, 14, dtype=torch.float16), draw(*shape, 14, dtype=torch.float16)
    assert same_bits(check(x, g, cos, sin, interleaved), check(x, g, cos, sin, interleaved))


def test_tables_of_two_dtypes_shapes_and_strides():
    x, g = heads(1, 2, 3, 5, 16, torch.bfloat16), heads(1, 2, 3, 5, 16, torch.bfloat16)
    check(x, g, draw(5, 16), draw(5, 16, dtype=torch.bfloat16), True)
    check(x, g, draw(2, 1, 1, 16).expand(2, 1, 5, 16), draw(16, 5).t().expand(2, 1, 5, 16), False)
    check(x, g, draw(2, 1, 1, 16), draw(5, 16), False)


@pytest.mark.parametrize("interleaved", [False, True])
def test_layouts_are_read_in_place_and_kept(interleaved, monkeypatch):
    fused = draw(2, 2, 5, 9, 24)  # queries and keys of one product
    cos, sin = draw(2, 1, 5, 24), draw(2, 1, 5, 24)
    expected = ours.rotate(fused[..., 2:5, :].transpose(2, 3).contiguous(), cos, sin, interleaved, False)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: pytest.fail("copied"))
    for x in (fused[..., 2:5, :].transpose(2, 3), fused[..., 2:5, :].clone().transpose(2, 3)):
        y = ours.rotate(x, cos, sin, interleaved, False)
        assert torch.equal(y, expected)
        assert y.transpose(2, 3).is_contiguous()


def test_strides_of_zero_and_a_last_axis_that_is_not_dense():
    cos, sin = draw(5, 6), draw(5, 6)
    for g in (
        draw(2, 2, 1, 5, 6).expand(2, 2, 3, 5, 6),
        draw(1).expand(2, 2, 3, 5, 6),
        draw(2, 2, 3, 6, 5).mT,
    ):
        check(heads(1, 2, 3, 5, 6), g, cos, sin, False)


@pytest.mark.slow
def test_many_axes_and_many_rows_in_one_table():
    x, g = draw(2, 1, 2, 1, 2, 1, 2, 1, 3, 10), draw(2, 1, 2, 1, 2, 1, 2, 1, 3, 10)
    check(x, g, draw(2, 1, 3, 6), draw(2, 1, 3, 6), True)
    x, g = draw(2, 150, 4) + 1.0, draw(2, 150, 4) + 1.0
    check(x, g, draw(1, 4), draw(1, 4), False)


@pytest.mark.parametrize("shape", [(2, 0, 3, 5, 8), (2, 1, 0, 5, 8), (2, 1, 3, 0, 8)])
def test_empty(shape):
    x = draw(*shape)
    cos = draw(shape[1], 1, shape[3], 8)
    assert ours.rotate(x, cos, cos, False, False).shape == shape
    cos_bar, sin_bar = ours.rotary_tables_bwd(x, x, cos, cos, False)
    assert cos_bar.shape == sin_bar.shape == cos.shape and not cos_bar.any() and not sin_bar.any()
