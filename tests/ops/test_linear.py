"""The linear layer of Duals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_within_budget
from ops.op_checks import check, check_low, stacks

import aajr_kernels as aajr
from aajr_kernels import Dual, UnsupportedOperation, coverage, dual
from aajr_kernels.ops.linear import linear, projections


def affine(x, w, b=None):
    y = (x.unsqueeze(-2) * w).sum(-1)
    return y if b is None else y + b


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_against_forward_mode(k, batch, bias):
    params = [torch.randn(4, 7).double()] + ([torch.randn(4).double()] if bias else [])
    check(linear, affine, [stacks(*batch, 7, k=k)], params)


@pytest.mark.parametrize("sizes", [(1, 1), (37, 1), (1, 37), (252, 123)])
def test_odd_sizes(sizes):
    check(linear, affine, [stacks(3, sizes[0])], [torch.randn(sizes[1], sizes[0]).double()])


def test_vector_weight_drops_the_last_axis():
    x, w, b = stacks(2, 3, 5, k=2), torch.randn(5).double(), torch.randn(()).double()
    check(linear, lambda x, w, b: (x * w).sum(-1) + b, [x], [w, b])


def test_non_contiguous():
    check(linear, affine, [stacks(5, 3, 4).transpose(1, 3)], [torch.randn(5, 9).double()[:, ::2].t()])


def test_cotangent_of_a_sum_is_expanded_memory():
    x, w = stacks(3, 5).requires_grad_(), torch.randn(4, 5).double().requires_grad_()
    linear(Dual(x), w).stacked.sum().backward()
    torch.testing.assert_close(w.grad, x.detach().sum((0, 1)).expand(4, 5))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (3, 0)])
def test_empty(shape):
    x = torch.zeros(2, *shape).requires_grad_()
    w, b = torch.randn(4, shape[-1], requires_grad=True), torch.randn(4, requires_grad=True)
    y = linear(Dual(x), w, b)
    assert y.stacked.shape == (2, *shape[:-1], 4)
    y.stacked.sum().backward()
    assert x.grad.shape == x.shape and not w.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_dtypes(dtype):
    params = [torch.randn(33, 65), torch.randn(33)]
    check_low(linear, lambda x, w, b: F.linear(x, w, b), [stacks(17, 65, k=2)], params, dtype)


@pytest.mark.parametrize("backend", [b for b, why in aajr.backends().items() if why is None and b != "cuda"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_that_cancels_the_product_meets_it_before_it_is_rounded(backend, dtype):
    x, w = torch.randn(3, 16, 64).to(dtype), torch.randn(32, 64).to(dtype)
    b = -F.linear(x[0, 0], w)
    exact = F.linear(x[0].double(), w.double(), b.double())
    with aajr.use_backend(backend):
        y = linear(Dual(x), w, b)
    assert_within_budget(y.primal[0], F.linear(x[0], w, b)[0], exact[0])
    assert_within_budget(y.tangents, F.linear(x[1:], w), F.linear(x[1:].double(), w.double()))


def test_weight_gradient_accumulates_in_float32():
    # 4096 rows of equal sign: an accumulator in bfloat16 would stop growing at 256 times its unit
    x = torch.ones(2, 4096, 1, dtype=torch.bfloat16)
    w = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    b = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)
    linear(Dual(x), w, b).stacked.sum().backward()
    assert w.grad.item() == 8192 and b.grad.item() == 4096


def test_gradients_nobody_needs_are_skipped():
    x, w, b = stacks(3, 5), torch.randn(4, 5).double(), torch.randn(4).double()
    for names in ({"x"}, {"w"}, {"b"}, {"x", "b"}):
        leaves = {n: t.clone().requires_grad_(n in names) for n, t in zip("xwb", (x, w, b))}
        y = linear(Dual(leaves["x"]), leaves["w"], leaves["b"]).stacked
        saved = [t for t in y.grad_fn.saved_tensors if t is not None]
        assert len(saved) == ("x" in names) + ("w" in names)
        y.square().sum().backward()
        assert {n for n, t in leaves.items() if t.grad is not None} == names


def together(x, w1, b1, w2, w3):
    return Dual(torch.cat([y.stacked for y in projections(x, [(w1, b1), (w2, None), (w3, None)])], -1))


def apart(x, w1, b1, w2, w3):
    return torch.cat([affine(x, w1, b1), affine(x, w2), affine(x, w3)], -1)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_projections_of_one_input(k, batch):
    params = [torch.randn(*shape).double() for shape in ((4, 7), (4,), (37, 7), (1, 7))]
    check(together, apart, [stacks(*batch, 7, k=k)], params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projections_in_low_dtypes(dtype):
    params = [torch.randn(*shape).double() for shape in ((14, 37), (14,), (20, 37), (9, 37))]
    eager = lambda x, *p: torch.cat([F.linear(x, *p[:2]), F.linear(x, p[2]), F.linear(x, p[3])], -1)
    check_low(together, eager, [stacks(31, 37, k=2)], params, dtype, apart)


def test_projections_that_are_frozen_or_not_used():
    x, *weights = stacks(3, 5), *(torch.randn(4, 5).double() for _ in range(3))
    outcomes = []
    for run in (projections, lambda x, layers: [linear(x, *layer) for layer in layers]):
        leaves = [t.clone().requires_grad_(i != 1) for i, t in enumerate((x, *weights))]
        first, _, third = run(Dual(leaves[0]), [(w, None) for w in leaves[1:]])
        (first.stacked.square().sum() + third.stacked.cos().sum()).backward()
        outcomes.append([t.grad for t in leaves])
    assert [g is None for g in outcomes[0]] == [False, True, True, False]
    for ours, theirs in zip(*outcomes):
        assert ours is theirs is None or torch.allclose(ours, theirs, 1e-12, 1e-12)


def test_plain_projections_give_what_torch_gives():
    x, w, b = torch.randn(2, 5), torch.randn(4, 5), torch.randn(4)
    assert all(map(torch.equal, projections(x, [(w, b), (w, None)]), [F.linear(x, w, b), F.linear(x, w)]))


def test_plain_tensors_give_what_torch_gives():
    x, w, b = torch.randn(2, 5), torch.randn(4, 5), torch.randn(4)
    assert torch.equal(linear(x, w, b), F.linear(x, w, b))
    _, tangent = torch.func.jvp(lambda x: linear(x, w, b), (x,), (x,))
    torch.testing.assert_close(tangent, x @ w.t())


def test_transformed_duals_raise_instead_of_losing_a_tangent():
    w = torch.randn(4, 5)

    def of_dual(x):
        return linear(Dual(torch.stack([x, x])), w).stacked.sum()

    with pytest.raises(RuntimeError):
        torch.func.jvp(of_dual, (torch.randn(5),), (torch.randn(5),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
        of_dual(torch.autograd.forward_ad.make_dual(torch.randn(5), torch.randn(5)))


def test_autocast_uses_the_low_dtype():
    x, w = stacks(3, 5).float(), torch.randn(4, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(Dual(x), w)
    assert y.dtype == torch.bfloat16
    y.stacked.float().sum().backward()
    assert w.grad.dtype == torch.float32


def test_coverage_counts_the_product():
    with coverage() as cov:
        linear(Dual(torch.randn(3, 2, 5)), torch.randn(4, 5))
    assert [op for op, _ in cov.entries] == ["linear"]
    assert list(cov.entries.values()) == [[1, 2.0 * 3 * 2 * 5 * 4]]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(weight=torch.zeros(4, 6)), ValueError, r"weight must be \[out, 5\].*\(4, 6\)"),
        (dict(weight=torch.zeros(2, 4, 5)), ValueError, "weight"),
        (dict(weight=torch.zeros(4, 5), bias=torch.zeros(5)), ValueError, "bias must have shape"),
        (dict(weight=torch.zeros(4, 5).double()), RuntimeError, "weight must have the dtype of x"),
        (
            dict(weight=torch.zeros(4, 5), bias=torch.zeros(4).double()),
            RuntimeError,
            "bias must have the dtype",
        ),
        (dict(weight=dual(torch.zeros(4, 5), torch.zeros(4, 5))), UnsupportedOperation, "weight is a Dual"),
    ],
)
def test_errors(arguments, error, words):
    with pytest.raises(error, match=words):
        linear(Dual(torch.zeros(2, 3, 5)), **arguments)
