"""RMS norm and layer norm of Duals."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_exact, assert_within_budget, relative_error
from ops.op_checks import check, check_low, forward_mode, outcome, stacks

from aajr_kernels import Dual, UnsupportedOperation, coverage, dual
from aajr_kernels.ops.norm import add_layer_norm, add_rms_norm, layer_norm, reference, rms_norm
from aajr_kernels.testing import oracle

EPS = 1e-3


def rms_formula(dims=1, eps=EPS, offset=0.0):
    return lambda x, w=None: oracle.rms_norm(x, x.shape[-dims:], None if w is None else w + offset, eps)


def layer_formula(dims=1, eps=EPS):
    return lambda x, w=None, b=None: oracle.layer_norm(x, x.shape[-dims:], w, b, eps)


def weights(*shape, count=1):
    return [torch.randn(*shape, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("size", [1, 37, 252])
@pytest.mark.parametrize("weighted", [False, True])
def test_rms_norm(k, size, weighted):
    op = lambda x, *w: rms_norm(x, size, *w, eps=EPS)
    check(op, rms_formula(), [stacks(2, 3, size, k=k)], weights(size) if weighted else [])


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("size", [2, 37, 252])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_layer_norm(k, size, count):
    op = lambda x, *w: layer_norm(x, (size,), *w, eps=EPS)
    check(op, layer_formula(), [stacks(2, 3, size, k=k)], weights(size, count=count))


def test_layer_norm_of_one_feature_is_its_bias():
    x = stacks(4, 1).requires_grad_()
    y = layer_norm(Dual(x), 1, *weights(1), bias=torch.ones(1).double())
    assert torch.equal(y.primal, torch.ones(4, 1).double()) and not y.tangents.any()
    y.stacked.sum().backward()
    assert not x.grad.any()


def test_layer_norm_bias_without_weight():
    check(
        lambda x, b: layer_norm(x, 7, None, b),
        lambda x, b: layer_formula(eps=1e-5)(x, None, b),
        [stacks(3, 7)],
        weights(7),
    )


def test_offset_of_the_weight():
    check(
        lambda x, w: rms_norm(x, 9, w, EPS, offset=1.0),
        rms_formula(offset=1.0),
        [stacks(3, 9, k=2)],
        weights(9),
    )


@pytest.mark.parametrize("shape", [(5,), (4, 5), (3, 4, 5)])
def test_several_trailing_axes(shape):
    n = len(shape)
    x = stacks(3, 4, 5, k=2)
    check(lambda x, w: rms_norm(x, shape, w, EPS), rms_formula(n), [x], weights(*shape))
    check(lambda x, w, b: layer_norm(x, shape, w, b, EPS), layer_formula(n), [x], weights(*shape, count=2))


def test_default_epsilon_is_torchs():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.full((2, 1, 8), 1e-8).to(dtype)
        torch.testing.assert_close(rms_norm(Dual(x), 8).primal, F.rms_norm(x[0], (8,)))


def test_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(reference, "_BLOCK_BYTES", 1)  # eight rows a block, the last one short
    x = stacks(21, 6, k=2)
    check(lambda x, w: rms_norm(x, 6, w, EPS), rms_formula(), [x], weights(6))
    check(lambda x, w, b: layer_norm(x, 6, w, b, EPS), layer_formula(), [x], weights(6, count=2))


def test_non_contiguous():
    x = stacks(6, 4, 5).permute(0, 2, 3, 1)
    check(lambda x, w: rms_norm(x, 6, w, EPS), rms_formula(), [x], weights(6))
    check(lambda x, w: layer_norm(x, 6, w, None, EPS), layer_formula(), [x], weights(6))


def test_large_inputs_and_offsets():
    x = stacks(3, 8, k=2)
    check(lambda x, w: rms_norm(x, 8, w, EPS), rms_formula(), [x * 1e4], weights(8))
    x[0] += 1e3
    check(lambda x, w: layer_norm(x, 8, w, None, EPS), layer_formula(), [x], weights(8), tolerance=1e-10)


def test_zero_rows_are_finite():
    x = torch.zeros(2, 3, 4).requires_grad_()
    for op in (rms_norm, layer_norm):
        y = op(Dual(x), 4, torch.ones(4))
        (gradient,) = torch.autograd.grad(y.stacked.sum(), x)
        assert torch.isfinite(y.stacked).all() and torch.isfinite(gradient).all()


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)])
def test_empty(shape):
    x, w = torch.zeros(2, *shape).requires_grad_(), torch.ones(4, requires_grad=True)
    for op in (rms_norm, layer_norm):
        y = op(Dual(x), 4, w)
        assert y.shape == shape
        y.stacked.sum().backward()
        assert not w.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_dtypes(dtype):
    def in_float32(formula):
        # as the eager code of the models does: widen, normalise, round once
        return lambda x, *w: formula(x.float(), *(v.float() for v in w)).to(x.dtype)

    x = stacks(31, 96, k=2, scale=3.0)
    check_low(
        lambda x, w: rms_norm(x, 96, w, EPS),
        in_float32(rms_formula()),
        [x],
        weights(96),
        dtype,
        rms_formula(),
    )
    op, formula = lambda x, w, b: layer_norm(x, 96, w, b, EPS), layer_formula()
    check_low(op, in_float32(formula), [x], weights(96, count=2), dtype, formula)


def test_float32_with_a_large_mean():
    x = stacks(31, 64)
    x[0] += 100.0
    op, formula = lambda x, w: layer_norm(x, 64, w, None, EPS), layer_formula()
    check_low(op, formula, [x], weights(64), torch.float32)


def test_float32_weights_beside_low_inputs():
    x, w = stacks(7, 16).bfloat16(), torch.randn(16)
    for op in (rms_norm, layer_norm):
        leaf = w.clone().requires_grad_()
        y = op(Dual(x), 16, leaf)
        assert y.dtype == torch.bfloat16
        y.stacked.float().sum().backward()
        assert leaf.grad.dtype == torch.float32
        eps = torch.finfo(torch.float32).eps if op is rms_norm else 1e-5
        formula = (rms_formula if op is rms_norm else layer_formula)(eps=eps)
        exact = forward_mode(formula, [x.double()], [w.double()])
        assert_within_budget(y.stacked, exact.bfloat16(), exact)


def test_stock_layer_norm_gradient_is_wrong_and_ours_right():
    x, w, b = stacks(8, 8), *weights(8, count=2)
    cotangent = torch.randn(2, 8, 8, dtype=torch.float64)
    _, right = outcome(lambda s, p: forward_mode(layer_formula(eps=1e-5), s, p), [x], [w, b], cotangent)
    _, ours = outcome(lambda s, p: layer_norm(Dual(s[0]), 8, *p).stacked, [x], [w, b], cotangent)
    stock = lambda x, w, b: F.layer_norm(x, (8,), w, b)
    _, wrong = outcome(lambda s, p: forward_mode(stock, s, p), [x], [w, b], cotangent)
    assert_exact(ours[0], right[0], tolerance=1e-12)
    assert relative_error(wrong[0], right[0]) > 0.01, (
        "PyTorch has repaired layer_norm: the warning in the docs can go"
    )


def test_finite_differences_of_the_squared_tangent():
    x, w = stacks(3, 6), weights(6)[0]

    def penalty(x):
        return layer_norm(Dual(x), 6, w).tangents.square().sum()

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(penalty(leaf), leaf)
    step = torch.randn_like(x)
    h = 1e-5
    slope = (penalty(x + h * step) - penalty(x - h * step)) / (2 * h)
    assert_exact((gradient * step).sum(), slope, tolerance=1e-7)


def test_gradients_nobody_needs_are_skipped():
    x, w, b = stacks(3, 5), *weights(5, count=2)
    for names in ({"x"}, {"w"}, {"b"}, {"x", "w"}):
        leaves = {n: t.clone().requires_grad_(n in names) for n, t in zip("xwb", (x, w, b))}
        y = layer_norm(Dual(leaves["x"]), 5, leaves["w"], leaves["b"]).stacked
        y.square().sum().backward()
        assert {n for n, t in leaves.items() if t.grad is not None} == names
        assert all(torch.isfinite(t.grad).all() for t in leaves.values() if t.grad is not None)


def test_plain_tensors_give_what_torch_gives():
    x, w, b = torch.randn(3, 5), torch.randn(5), torch.randn(5)
    assert torch.equal(rms_norm(x, 5, w), F.rms_norm(x, (5,), w))
    assert torch.equal(layer_norm(x, 5, w, b), F.layer_norm(x, (5,), w, b))
    low = rms_norm(x.bfloat16(), 5, w.bfloat16(), 1e-6, offset=1.0)
    exact = rms_formula(eps=1e-6, offset=1.0)(x.bfloat16().double(), w.bfloat16().double())
    assert low.dtype == torch.bfloat16
    assert_within_budget(low, exact.bfloat16(), exact)


def test_autocast_computes_in_float32():
    x = stacks(3, 5).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert rms_norm(Dual(x), 5, torch.ones(5)).dtype == torch.float32
        assert layer_norm(Dual(x), 5, torch.ones(5).bfloat16()).dtype == torch.float32


def test_coverage():
    with coverage() as cov:
        rms_norm(Dual(torch.randn(2, 3, 5)), 5)
        layer_norm(Dual(torch.randn(2, 3, 5)), 5)
    assert {op for op, _ in cov.entries} == {"rms_norm", "layer_norm"}
    assert math.isclose(cov.share("reference", "native"), 1.0)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x: rms_norm(x, 6), ValueError, r"normalized_shape must be the trailing axes of x"),
        (lambda x: layer_norm(x, ()), ValueError, "normalized_shape"),
        (lambda x: layer_norm(x, (3, 5, 5)), ValueError, "normalized_shape"),
        (lambda x: rms_norm(x, 5, torch.ones(4)), ValueError, r"weight must have shape \(5,\), got \(4,\)"),
        (lambda x: layer_norm(x, 5, None, torch.ones(4)), ValueError, "bias must have shape"),
        (lambda x: layer_norm(x, 5, torch.ones(5).double()), RuntimeError, "weight must have the dtype of x"),
        (lambda x: rms_norm(x, 5, offset=1.0), ValueError, "offset is 1.0 but weight is None"),
        (
            lambda x: rms_norm(x, 5, dual(torch.ones(5), torch.ones(5))),
            UnsupportedOperation,
            "weight is a Dual",
        ),
        (
            lambda x: layer_norm(x, 5, None, dual(torch.ones(5), torch.ones(5))),
            UnsupportedOperation,
            "bias is a",
        ),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call(Dual(torch.randn(2, 3, 5)))


# ------------------------------------------------------------------------------------- sums with a residual stream


def one_stack(pair):
    """Both results of a fused sum and norm as one Dual, so that both cotangents are seen."""
    return Dual(torch.cat([result.stacked for result in pair], -1))


def pair_of(formula):
    def both(x, residual, *w):
        summed = x + residual
        return torch.cat([formula(summed, *w), summed], -1)

    return both


@pytest.mark.parametrize("stacks_of", [(1, 1), (3, 3), (0, 2), (1, 0)])
@pytest.mark.parametrize("size", [2, 37])
def test_add_norms(stacks_of, size):
    x, residual = (stacks(2, 3, size, k=k) for k in stacks_of)
    check(
        lambda x, r, w: one_stack(add_rms_norm(x, r, size, w, EPS, offset=1.0)),
        pair_of(rms_formula(offset=1.0)),
        [x, residual],
        weights(size),
    )
    check(
        lambda x, r, w, b: one_stack(add_layer_norm(x, r, (size,), w, b, EPS)),
        pair_of(layer_formula()),
        [x, residual],
        weights(size, count=2),
    )


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("size", [2, 37])
def test_norms_that_pass_their_input_on(k, size):
    """Without a residual the second result is the input, and both cotangents meet in one backward."""

    def with_input(formula):
        return lambda x, *w: torch.cat([formula(x, *w), x], -1)

    op = lambda x, w: one_stack(add_rms_norm(x, None, size, w, EPS, offset=1.0))
    check(op, with_input(rms_formula(offset=1.0)), [stacks(2, 3, size, k=k)], weights(size))
    op = lambda x, *w: one_stack(add_layer_norm(x, None, (size,), *w, EPS))
    check(op, with_input(layer_formula()), [stacks(2, 3, size, k=k)], weights(size, count=2))
    op = lambda x, w: one_stack(add_rms_norm(x, None, (3, size), w, EPS))
    check(op, with_input(rms_formula(2)), [stacks(2, 3, size, k=k)], weights(3, size))


@pytest.mark.parametrize("used", [(True, False), (False, True)])
def test_norms_that_pass_their_input_on_with_one_cotangent(used):
    x, w = stacks(4, 6), weights(6)[0]
    leaves = [t.clone().requires_grad_() for t in (x, w, x, w)]
    pair = add_rms_norm(Dual(leaves[0]), None, 6, leaves[1], EPS)
    other = rms_norm(Dual(leaves[2]), 6, leaves[3], EPS), Dual(leaves[2])
    for results in (pair, other):
        sum((y.stacked.square()).sum() for y, use in zip(results, used) if use).backward()
    assert torch.equal(pair[1].stacked, x)
    for ours, theirs in zip(leaves[:2], leaves[2:]):
        assert theirs.grad is None if ours.grad is None else torch.equal(ours.grad, theirs.grad)


def test_add_norms_of_several_axes():
    x, residual = stacks(3, 4, 5), stacks(3, 4, 5, k=0)
    check(
        lambda x, r, w: one_stack(add_rms_norm(x, r, (4, 5), w, EPS)),
        pair_of(rms_formula(2)),
        [x, residual],
        weights(4, 5),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_add_norms_in_low_dtypes(dtype):
    def eager(formula):
        # as the models do: the sum is rounded to the dtype, the norm computed in float32
        def both(x, residual, *w):
            summed = x + residual
            return torch.cat([formula(summed.float(), *(v.float() for v in w)).to(x.dtype), summed], -1)

        return both

    x, residual = stacks(31, 96, k=2, scale=3.0), stacks(31, 96, k=2)
    op = lambda x, r, w: one_stack(add_rms_norm(x, r, 96, w, EPS))
    check_low(op, eager(rms_formula()), [x, residual], weights(96), dtype, pair_of(rms_formula()))
    op = lambda x, r, w, b: one_stack(add_layer_norm(x, r, 96, w, b, EPS))
    check_low(
        op, eager(layer_formula()), [x, residual], weights(96, count=2), dtype, pair_of(layer_formula())
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_add_norms_are_the_sum_and_its_norm(dtype):
    x, residual, w = stacks(4, 6).to(dtype), stacks(4, 6).to(dtype), torch.randn(6, dtype=dtype)
    with coverage() as cov:
        normed, summed = add_rms_norm(Dual(x), Dual(residual), 6, w)
    assert {op for op, _ in cov.entries} == {"add_rms_norm"}
    assert torch.equal(summed.stacked, x + residual)
    torch.testing.assert_close(normed.stacked, rms_norm(Dual(x + residual), 6, w).stacked)
    for op, norm in ((add_rms_norm, rms_norm), (add_layer_norm, layer_norm)):
        normed, summed = op(x[0], residual[0], 6, w)
        assert torch.equal(summed, x[0] + residual[0]) and torch.equal(normed, norm(summed, 6, w))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_add_norms_where_one_result_is_unused(dtype):
    x, residual, w = (t.to(dtype).requires_grad_() for t in (stacks(4, 6), stacks(4, 6, k=0), torch.randn(6)))
    leaves = (x, residual, w)
    normed, summed = add_layer_norm(Dual(x), residual[0], 6, w)
    only_sum = torch.autograd.grad(summed.stacked.sum(), leaves, retain_graph=True, allow_unused=True)
    assert torch.equal(only_sum[0], torch.ones_like(x)) and torch.equal(
        only_sum[1], torch.ones_like(residual)
    )
    assert only_sum[2] is None
    got = torch.autograd.grad(normed.stacked.square().sum(), leaves)
    expected = torch.autograd.grad(layer_norm(Dual(x) + residual[0], 6, w).stacked.square().sum(), leaves)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


def test_add_norms_under_autocast_and_with_mixed_dtypes():
    x, residual, w = stacks(3, 5).bfloat16(), stacks(3, 5).float(), torch.ones(5)
    normed, summed = add_rms_norm(Dual(x), Dual(residual), 5, w)
    assert normed.dtype == summed.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        normed, summed = add_rms_norm(Dual(x), Dual(x), 5, w)
        assert normed.dtype == torch.float32 and summed.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x: add_rms_norm(x, torch.randn(5), 5), ValueError, "residual must have the shape of x"),
        (lambda x: add_layer_norm(x, x, 6), ValueError, "normalized_shape must be the trailing axes of x"),
        (lambda x: add_rms_norm(x, x, 5, torch.ones(4)), ValueError, "weight must have shape"),
        (lambda x: add_rms_norm(x, x, 5, offset=1.0), ValueError, "offset is 1.0 but weight is None"),
        (
            lambda x: add_layer_norm(x, x, 5, torch.ones(5).double()),
            RuntimeError,
            "weight must have the dtype",
        ),
        (lambda x: add_layer_norm(x, Dual(torch.randn(3, 3, 5)), 5), ValueError, "1 and 2 tangents"),
        (
            lambda x: add_rms_norm(x, x, 5, dual(torch.ones(5), torch.ones(5))),
            UnsupportedOperation,
            "is a Dual",
        ),
    ],
)
def test_add_norm_errors(call, error, words):
    with pytest.raises(error, match=words):
        call(Dual(torch.randn(2, 3, 5)))
