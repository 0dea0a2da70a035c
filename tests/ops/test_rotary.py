"""Rotary position embedding of Duals."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_exact
from ops.op_checks import check, check_low, forward_mode, stacks

from aajr_kernels import Dual, UnsupportedOperation, coverage, dual
from aajr_kernels.ops.rotary import rotary


def tables(*shape: int) -> list[torch.Tensor]:
    """cos and sin that no angle could give: every entry is its own, so that a swap shows."""
    return [torch.randn(*shape, dtype=torch.float64), torch.randn(*shape, dtype=torch.float64)]


def formula(interleaved=False, axis: int | None = 1):
    """Rotation as a matrix on the features: entry [i, j] of the turn is the sign with which x_i enters y_j."""

    def rotate(x, cos, sin):
        if axis is not None:
            cos, sin = cos.unsqueeze(axis), sin.unsqueeze(axis)
        size = cos.shape[-1]
        turn = torch.zeros(size, size, dtype=x.dtype)
        for pair in range(size // 2):
            a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + size // 2)
            turn[b, a], turn[a, b] = -1.0, 1.0
        head = x[..., :size]
        return torch.cat([head * cos + (head @ turn) * sin, x[..., size:]], dim=-1)

    return rotate


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("size", [8, 6, 2])
def test_against_forward_mode(k, interleaved, size):
    op = lambda x, c, s: rotary(x, c, s, interleaved=interleaved)
    check(op, formula(interleaved), [stacks(2, 3, 5, 8, k=k)], tables(2, 5, size))


def test_tables_of_one_batch_and_other_axes():
    check(rotary, formula(), [stacks(2, 3, 5, 8, k=2)], tables(1, 5, 8))
    op = lambda x, c, s: rotary(x, c, s, unsqueeze_dim=2)
    check(op, formula(axis=2), [stacks(2, 5, 3, 8)], tables(2, 5, 4))
    op = lambda x, c, s: rotary(x, c, s, unsqueeze_dim=None)
    check(op, formula(axis=None), [stacks(2, 3, 5, 8)], tables(5, 8))
    check(op, formula(axis=None), [stacks(8)], tables(8))


@pytest.mark.parametrize("interleaved", [False, True])
def test_non_contiguous(interleaved):
    x = stacks(2, 5, 3, 8).transpose(2, 3)  # the heads are cut out of one projection
    op = lambda x, c, s: rotary(x, c, s, interleaved=interleaved)
    check(op, formula(interleaved), [x], [t.transpose(1, 2) for t in tables(2, 8, 5)])


@pytest.mark.parametrize("shape", [(0, 3, 5, 8), (2, 3, 0, 8)])
def test_empty(shape):
    x = torch.zeros(2, *shape).requires_grad_()
    y = rotary(Dual(x), torch.ones(shape[0], shape[2], 8), torch.ones(shape[0], shape[2], 8))
    assert y.shape == shape
    y.stacked.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_dtypes(dtype):
    angles = torch.randn(2, 7, 16)
    params = [angles.cos(), angles.sin()]
    check_low(rotary, formula(), [stacks(2, 3, 7, 20, k=2)], params, dtype)


def test_float32_tables_beside_low_inputs_keep_the_dtype():
    x, (cos, sin) = stacks(2, 3, 7, 8).bfloat16(), (t.float() for t in tables(2, 7, 8))
    y = rotary(Dual(x), cos, sin)
    assert y.dtype == torch.bfloat16
    exact = forward_mode(formula(), [x.double()], [cos.double(), sin.double()])
    assert_exact(y.stacked, exact, tolerance=2**-8)


def test_plain_tensors():
    x, (cos, sin) = stacks(2, 3, 5, 8), tables(2, 5, 6)
    for interleaved in (False, True):
        op = lambda x: rotary(x, cos, sin, interleaved=interleaved)
        y, tangent = torch.func.jvp(op, (x[0],), (x[1],))
        ours = op(Dual(x))
        torch.testing.assert_close(ours.primal, y)
        torch.testing.assert_close(ours.tangent, tangent)


@pytest.mark.parametrize(("family", "interleaved"), [("llama", False), ("cohere", True)])
def test_layouts_of_hugging_face(family, interleaved):
    modeling = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    q, cos, sin = torch.randn(2, 3, 5, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    theirs, _ = modeling.apply_rotary_pos_emb(q, q, cos, sin)
    torch.testing.assert_close(rotary(q, cos, sin, interleaved=interleaved), theirs)


def test_tables_without_gradient_save_no_input():
    x = stacks(2, 3, 5, 8).requires_grad_()
    y = rotary(Dual(x), *tables(2, 5, 8)).stacked
    assert all(t is None or t.shape != x.shape for t in y.grad_fn.saved_tensors)


def test_coverage():
    with coverage() as cov:
        rotary(Dual(torch.randn(2, 1, 1, 3, 4)), torch.ones(1, 3, 4), torch.ones(1, 3, 4))
    assert [op for op, _ in cov.entries] == ["rotary"]


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((2, 5, 6), (2, 5, 8)), r"sin must have the shape of cos"),
        (((2, 5, 7), (2, 5, 7)), "even last axis"),
        (((2, 5, 10), (2, 5, 10)), "even last axis of at most the features"),
        (((2, 4, 8), (2, 4, 8)), "cos must broadcast"),
        (((1, 2, 3, 5, 8), (1, 2, 3, 5, 8)), "cos must broadcast"),
    ],
)
def test_shape_errors(shapes, words):
    with pytest.raises(ValueError, match=words):
        rotary(Dual(torch.randn(2, 2, 3, 5, 8)), torch.ones(shapes[0]), torch.ones(shapes[1]))


def test_dual_tables_raise():
    table = torch.ones(2, 5, 8)
    with pytest.raises(UnsupportedOperation, match="cos is a Dual"):
        rotary(Dual(torch.randn(2, 2, 3, 5, 8)), dual(table, table), table)
    with pytest.raises(UnsupportedOperation, match="sin is a Dual"):
        rotary(torch.randn(2, 3, 5, 8), table, dual(table, table))
