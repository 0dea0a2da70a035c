"""Triton activations beyond the shared suite: strides, missing parts, numbers that are not finite."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

pytest.importorskip("triton")
from backends.triton.checks import DEVICE, DTYPES, QUIET, compare, draw, same_bits

from aajr_kernels.ops.activation import reference
from aajr_kernels.ops.activation import triton as ours

pytestmark = pytest.mark.filterwarnings(QUIET)


def check(name: str, args: tuple) -> None:
    got = compare(ours, reference, name, args)
    expected = getattr(reference, name)(*args)
    for mine, theirs in zip(got, expected if isinstance(expected, tuple) else (expected,)):
        assert mine is None or mine.stride() == theirs.stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", reference.POINTWISE)
def test_pointwise(kind, dtype):
    for k, size in ((0, 1), (1, 1031), (3, 37)):
        x = draw(1 + k, 2, size, dtype=dtype, scale=3.0)
        check("pointwise_fwd", (x, kind))
        check("pointwise_bwd", (draw(*x.shape, dtype=dtype), x, kind))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", reference.GATES)
@pytest.mark.parametrize("counts", [(1, 1), (1, 0), (0, 1), (3, 3), (3, 0), (0, 3)])
def test_gated(kind, dtype, counts):
    gate, up = (draw(1 + k, 3, 37, dtype=dtype, scale=1.5) for k in counts)
    check("gated_fwd", (gate, up, kind))
    h_bar = draw(1 + max(counts), 3, 37, dtype=dtype)
    for needs in itertools.product((True, False), repeat=2):
        check("gated_bwd", (h_bar, gate, up, kind, *needs))


def views(dtype: torch.dtype):
    """Tensors [2, ...] whose memory is laid out in every way the callers produce."""
    both = draw(2, 3, 4, 74, dtype=dtype)
    yield both[..., :37], both[..., 37:]
    yield both[:, :, 1:3, 1:38], both[:, :, :2, 37:]  # rows that do not follow each other, misaligned
    yield both.transpose(2, 3), both.transpose(2, 3)  # dense in another order
    yield both.permute(0, 3, 1, 2), both.permute(0, 3, 1, 2).contiguous()  # two orders
    yield both.movedim(0, 1)[:2], both.movedim(0, 1)[1:]  # stack axis inside
    yield both[:1].expand(2, -1, -1, -1), both[:, :1, :1, :1].expand_as(both)  # strides of 0
    yield both[..., :1], both[..., 1:2]
    yield both[..., ::2], both[..., 1::2]
    yield both.view(2, 3, 1, 2, 1, 2, 1, 37, 1, 2), both.view(2, 3, 1, 2, 1, 2, 1, 37, 1, 2)  # ten axes
    yield both[:, 0, 0, 0], both[:, 0, 0, 1]  # scalars


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_are_read_in_place(dtype, monkeypatch):
    pairs = list(views(dtype))
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: pytest.fail("copied"))
    for gate, up in pairs:
        h_bar = draw(*gate.shape, dtype=dtype)
        check("gated_fwd", (gate, up, "silu"))
        check("gated_bwd", (h_bar, gate, up, "silu", True, True))
        check("pointwise_bwd", (h_bar, up, "gelu"))


@pytest.mark.parametrize("kind", reference.POINTWISE)
def test_numbers_that_are_not_finite_propagate_as_in_the_reference(kind):
    x = torch.tensor([math.inf, -math.inf, math.nan, 3e38, -3e38, 1e-45, -0.0, 20.0], device=DEVICE).repeat(3)
    tangents = torch.ones(24, device=DEVICE)
    tangents[8], tangents[17] = math.inf, math.nan
    stack, y_bar = torch.stack([x, tangents]), torch.ones(2, 24, device=DEVICE)
    for mine, theirs in (
        (ours.pointwise_fwd(stack, kind), reference.pointwise_fwd(stack, kind)),
        (ours.pointwise_bwd(y_bar, stack, kind), reference.pointwise_bwd(y_bar, stack, kind)),
    ):
        usual = torch.isfinite(stack).all(0)
        assert torch.equal(torch.isfinite(mine)[:, usual], torch.isfinite(theirs)[:, usual])
        torch.testing.assert_close(mine[:, usual], theirs[:, usual])
        assert torch.equal(torch.isnan(mine[0])[torch.isnan(x)], torch.isnan(theirs[0])[torch.isnan(x)])
    y, expected = ours.pointwise_fwd(stack, kind)[0], reference.pointwise_fwd(stack, kind)[0]
    torch.testing.assert_close(y, expected, equal_nan=True)


@pytest.mark.parametrize("kind", ["gelu", "silu", "gelu_tanh", "tanh", "sigmoid"])
def test_tails_keep_their_digits(kind):
    x = torch.linspace(-9.0, 9.0, 4001, device=DEVICE)
    stack = torch.stack([x, torch.ones_like(x)])
    mine, exact = ours.pointwise_fwd(stack, kind), reference.pointwise_fwd(stack.double(), kind)
    if kind == "tanh":  # the truth cancels in 1 - tanh² even in float64
        exact[1] = x.double().cosh() ** -2
    error = (mine - exact).abs() / exact.abs().clamp(min=1e-30)
    assert error[0].max() < (2e-5 if kind == "gelu_tanh" else 3e-6)
    far = (x + 0.75).abs() > 0.7  # where f' passes through zero an absolute error remains
    assert error[1][far].max() < 2e-5


@pytest.mark.parametrize("shape", [(2, 0), (2, 0, 3), (2, 3, 0), (1, 0)])
def test_empty(shape):
    x = draw(*shape)
    assert ours.pointwise_fwd(x, "gelu").shape == shape
    assert ours.gated_bwd(x, x, x, "silu", True, True)[0].shape == shape


def test_a_stride_beyond_two_to_the_31():
    """One element of memory seen as a huge tensor: offsets are 64 bits wide."""
    x = torch.ones(1, device=DEVICE).expand(2, 3, 1 << 31)[:, :, :: 1 << 30]
    torch.testing.assert_close(ours.pointwise_fwd(x, "relu"), torch.ones(2, 3, 2, device=DEVICE))


def test_bitwise_repeatable():
    gate, up, h_bar = (draw(2, 7, 1031) for _ in range(3))
    runs = [ours.gated_bwd(h_bar, gate, up, "gelu", True, True) for _ in range(2)]
    assert same_bits(*runs)
