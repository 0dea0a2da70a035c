"""Native activations beyond the shared suite: every storage type and vectors, strides, tails, missing parts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from assertions import assert_within_budget

from aajr_kernels.backends import cpu as native
from aajr_kernels.ops.activation import reference

pytest.importorskip("aajr_kernels._native")
from aajr_kernels.ops.activation import cpu as kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def compare(name: str, args: tuple) -> None:
    """A function of both backends on the same tensors, the truth in float64."""
    double = tuple(a.double() if isinstance(a, torch.Tensor) else a for a in args)
    got, eager, exact = (
        getattr(module, name)(*values)
        for module, values in ((kernels, args), (reference, args), (reference, double))
    )
    for i, (g, e, x) in enumerate(zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, eager, exact)))):
        if x is None:
            assert g is None
            continue
        assert g.dtype == e.dtype and g.stride() == e.stride()
        # an element may not hide behind the norm of the others
        torch.testing.assert_close(g, x.to(g.dtype), rtol=8 * torch.finfo(g.dtype).eps, atol=2e-5)
        assert_within_budget(g, e, x, f"{name} {i}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", reference.POINTWISE)
def test_pointwise(kind, dtype, vectors):
    for k, size in itertools.product((0, 1, 3), (1, 5, 37, 507)):
        x = (3.0 * torch.randn(1 + k, 2, size)).to(dtype)
        compare("pointwise_fwd", (x, kind))
        compare("pointwise_bwd", (torch.randn(x.shape).to(dtype), x, kind))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", reference.GATES)
def test_gated(kind, dtype, vectors):
    for (gates, ups), size in itertools.product(((1, 1), (1, 0), (0, 1), (3, 3), (3, 0), (0, 3)), (5, 252)):
        gate, up = (2.0 * torch.randn(1 + gates, 3, size)).to(dtype), torch.randn(1 + ups, 3, size).to(dtype)
        compare("gated_fwd", (gate, up, kind))
        h_bar = torch.randn(1 + max(gates, ups), 3, size).to(dtype)
        for needs in ((True, True), (True, False), (False, True), (False, False)):
            compare("gated_bwd", (h_bar, gate, up, kind, *needs))


def views(dtype: torch.dtype):
    """Tensors [2, ...] whose memory is laid out in every way the callers produce."""
    both = torch.randn(2, 3, 4, 74, dtype=torch.float32).to(dtype)
    yield both[..., :37], both[..., 37:]
    yield both[:, :, 1:3, 1:38], both[:, :, :2, 37:]  # rows that do not follow each other, misaligned
    yield both.transpose(2, 3), both.transpose(2, 3)  # dense in another order: no copy
    yield both.permute(0, 3, 1, 2), both.permute(0, 3, 1, 2).contiguous()  # two orders
    yield both.movedim(0, 1)[:2], both.movedim(0, 1)[1:]  # stack axis inside
    yield both[:1].expand(2, -1, -1, -1), both[:, :1, :1, :1].expand_as(both)  # strides of 0
    yield both[..., :1], both[..., 1:2]
    yield both[..., ::2], both[..., 1::2]
    yield both.view(2, 3, 4, 37, 2)[..., 0], both.view(2, 3, 4, 37, 2)[..., 1]
    yield both.view(2, 3, 1, 2, 1, 2, 1, 37, 1, 2), both.view(2, 3, 1, 2, 1, 2, 1, 37, 1, 2)  # ten axes
    yield both[:, 0, 0, 0], both[:, 0, 0, 1]  # scalars


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype, vectors):
    for gate, up in views(dtype):
        h_bar = torch.randn(gate.shape).to(dtype)
        compare("gated_fwd", (gate, up, "silu"))
        compare("gated_bwd", (h_bar, gate, up, "silu", True, True))
        compare("pointwise_fwd", (up, "gelu"))
        compare("pointwise_bwd", (h_bar, up, "gelu"))


def test_halves_of_a_projection_are_not_copied(monkeypatch):
    both = torch.randn(2, 5, 64)
    seen = []
    monkeypatch.setattr(native, "call", lambda name, tensors, ints: seen.extend(tensors))
    kernels.gated_fwd(both[..., :32], both[..., 32:], "silu")
    assert seen[0].data_ptr() == both.data_ptr() and seen[1].data_ptr() == both[..., 32:].data_ptr()


@pytest.mark.parametrize("kind", reference.POINTWISE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_low_number(kind, dtype, vectors):
    """All 65536 numbers, infinities and NaN among them: the float32 result rounded once, or its neighbour."""
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    ones = torch.ones_like(x)
    y = kernels.pointwise_fwd(torch.stack([x, ones]), kind)
    truth = reference.pointwise_fwd(torch.stack([x, ones]).double(), kind)
    finite = torch.isfinite(x)
    tiny = 2.0 * 2.0 ** (-133 if dtype == torch.bfloat16 else -24)
    torch.testing.assert_close(
        y[:, finite], truth[:, finite].to(dtype), rtol=1.01 * torch.finfo(dtype).eps, atol=max(tiny, 1e-7)
    )
    torch.testing.assert_close(y[0, ~finite], truth[0, ~finite].to(dtype), equal_nan=True)


@pytest.mark.parametrize("kind", reference.POINTWISE)
def test_non_finite_numbers_propagate_as_in_the_reference(kind, vectors):
    x = torch.tensor([math.inf, -math.inf, math.nan, 3e38, -3e38, 1e-45, -0.0, 20.0]).repeat(3)
    tangents = torch.ones(24)
    tangents[8], tangents[17] = math.inf, math.nan
    stack, y_bar = torch.stack([x, tangents]), torch.ones(2, 24)
    for ours, theirs in (
        (kernels.pointwise_fwd(stack, kind), reference.pointwise_fwd(stack, kind)),
        (kernels.pointwise_bwd(y_bar, stack, kind), reference.pointwise_bwd(y_bar, stack, kind)),
    ):
        usual = torch.isfinite(stack).all(0)
        assert torch.equal(torch.isfinite(ours)[:, usual], torch.isfinite(theirs)[:, usual])
        torch.testing.assert_close(ours[:, usual], theirs[:, usual])
        assert torch.equal(torch.isnan(ours[0])[torch.isnan(x)], torch.isnan(theirs[0])[torch.isnan(x)])
    y, y_reference = kernels.pointwise_fwd(stack, kind)[0], reference.pointwise_fwd(stack, kind)[0]
    torch.testing.assert_close(y, y_reference, equal_nan=True)


@pytest.mark.parametrize("kind", ["gelu", "silu", "gelu_tanh", "tanh", "sigmoid"])
def test_tails_keep_their_digits(kind, vectors):
    x = torch.linspace(-9.0, 9.0, 4001)
    stack = torch.stack([x, torch.ones_like(x)])
    ours, exact = kernels.pointwise_fwd(stack, kind), reference.pointwise_fwd(stack.double(), kind)
    if kind == "tanh":  # the truth cancels in 1 - tanh² even in float64
        exact[1] = x.double().cosh() ** -2
    # where f' passes through zero an absolute error remains
    error = (ours - exact).abs() / exact.abs().clamp(min=1e-30)
    assert error[0].max() < 3e-6 if kind != "gelu_tanh" else error[0].max() < 2e-5
    far = (x + 0.75).abs() > 0.7
    assert error[1][far].max() < 2e-5


def test_nothing_is_written_outside(vectors):
    for dtype, size in itertools.product(DTYPES, (1, 7, 33, 100)):
        memory = torch.full((2, 3, size + 2), 9.0, dtype=dtype)
        x = torch.randn(2, 3, size).to(dtype)
        native.call("pointwise_fwd", (x, memory[..., 1:-1]), (2,))
        assert (memory[..., 0] == 9.0).all() and (memory[..., -1] == 9.0).all()
        torch.testing.assert_close(memory[..., 1:-1], kernels.pointwise_fwd(x, "silu"))


def test_threads_do_not_change_a_bit():
    gate, up, h_bar = (torch.randn(2, 67, 1031) for _ in range(3))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            h = kernels.gated_fwd(gate, up, "gelu")
            results.append((h, *kernels.gated_bwd(h_bar, gate, up, "gelu", True, True)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("shape", [(2, 0), (2, 0, 3), (2, 3, 0), (1, 0)])
def test_empty(shape):
    x = torch.zeros(shape)
    assert kernels.pointwise_fwd(x, "gelu").shape == shape
    assert kernels.gated_bwd(x, x, x, "silu", True, True)[0].shape == shape


def test_a_stride_beyond_two_to_the_31():
    """One element of memory seen as a huge tensor: offsets are 64 bits wide."""
    x = torch.ones(1).expand(2, 3, 1 << 31)[:, :, :: 1 << 30]
    torch.testing.assert_close(kernels.pointwise_fwd(x, "relu"), torch.ones(2, 3, 2))


def test_errors():
    x, y = torch.randn(2, 5), torch.empty(2, 5)
    with pytest.raises(ValueError, match="kind must be the code of an activation"):
        native.call("pointwise_fwd", (x, y), (99,))
    with pytest.raises(ValueError, match="y must have 2 stacked tensors of the shape of x"):
        native.call("pointwise_fwd", (x, y[:1]), (0,))
    with pytest.raises(ValueError, match="y must be float32, got bfloat16"):
        native.call("pointwise_fwd", (x, y.bfloat16()), (0,))
    with pytest.raises(ValueError, match="x must be float32, bfloat16 or float16, got int64"):
        native.call("pointwise_fwd", (x.long(), y), (0,))
    with pytest.raises(ValueError, match="must not be None"):
        native.call("pointwise_fwd", (x, None), (0,))
    with pytest.raises(ValueError, match="of an activation that gates"):
        native.call("gated_fwd", (x, x, y), (4,))
    with pytest.raises(ValueError, match="same number of tangents, or one of them none"):
        native.call("gated_fwd", (torch.randn(3, 5), x, torch.empty(3, 5)), (2,))
    with pytest.raises(ValueError, match="up_bar must have 1 stacked tensors"):
        native.call("gated_bwd", (x, x[:1], x, None, y), (2,))
