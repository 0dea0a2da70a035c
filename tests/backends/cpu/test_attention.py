"""Attention beyond the shared suite: dropout, broadcast bias gradients, strides, head sizes, thread counts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_exact
from ops.attention_checks import Case, make
from torch import Tensor

from aajr_kernels.dual import Dual
from aajr_kernels.ops.attention import attention

SUBSETS = list(itertools.product([True, False], repeat=4))


def compare(case: Case, tolerance: float = 2e-5, expected: Tensor | None = None, **options: Any) -> None:
    """Output and all gradients of a float32 case against the float64 formula of the same numbers."""
    exact = case.to(torch.float64)
    dropped = options.pop("dropped", None)
    expected = exact.oracle(dropped=dropped, **options)
    out_bar = torch.randn_like(expected)
    if dropped is not None:
        torch.manual_seed(7)
        options["dropout"] = 1 - 1 / dropped.max().item()
    actual = case.ours(**options)
    assert_exact(actual, expected, "output", tolerance=tolerance, floor=1.0)
    exact_gradients = exact.gradients(expected, out_bar)
    got = case.gradients(actual, out_bar.to(actual.dtype))
    for name, gradient in exact_gradients.items():
        assert gradient is not None and got[name] is not None, name
        assert got[name].dtype == case.leaves[name].dtype
        scale = max(1.0, gradient[torch.isfinite(gradient)].abs().max().item()) if gradient.numel() else 1.0
        assert_exact(got[name], gradient, name, tolerance=tolerance, floor=scale)


def low(*args: Any, **kwargs: Any) -> Case:
    return make(*args, **kwargs).to(torch.float32)


# -- dropout ----------------------------------------------------------------------------------------------------------


def drawn(case: Case, probability: float) -> Tensor:
    """The mask of the seed 7: with equal scores and the identity as values, M times the output is the mask."""
    batch, heads, rows = case.leaves["q"].shape[1:4]
    key_heads, keys = case.leaves["k"].shape[2:4]
    zero = Dual(torch.zeros(2, batch, heads, rows, 4))
    eye = torch.eye(keys).expand(batch, key_heads, keys, keys)
    torch.manual_seed(7)
    return (
        keys
        * attention(zero, torch.zeros(batch, key_heads, keys, 4), eye, dropout=probability).primal.double()
    )


@pytest.mark.parametrize("probability", [0.1, 0.9])
def test_the_dropout_mask_is_that_of_a_plain_call(capability, probability):
    case = low(sizes=(3, 4, 2, 61, 150, 4, 4))
    mask = drawn(case, probability)
    eye, weights = torch.eye(150).expand(3, 4, 150, 150), torch.zeros(3, 4, 61, 4)
    torch.manual_seed(7)
    plain = F.scaled_dot_product_attention(weights, torch.zeros(3, 4, 150, 4), eye, dropout_p=probability)
    torch.testing.assert_close(mask, 150 * plain.double(), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("options", [{}, {"causal": "lower_right", "softcap": 2.0, "window": 40}], ids=str)
@pytest.mark.parametrize("tangents", [(1, 1, 1), (3, 3, 3), (0, 0, 1)], ids=str)
def test_dropout_is_one_mask_forward_and_backward(capability, tangents, options):
    case = low(tangents, (4, 61, 150), sizes=(2, 4, 2, 61, 150, 5, 3))
    mask = drawn(case, 0.4)
    compare(case, 5e-5, dropped=torch.where(mask > 0.5, 1 / 0.6, 0.0), **options)


def test_dropout_of_all_weights_leaves_zeros(capability):
    case = low(sizes=(2, 4, 2, 61, 150, 4, 4))
    assert not attention(*(Dual(x.detach()) for x in case.leaves.values()), dropout=1.0).stacked.any()


# -- bias -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "moves",
    [pytest.param(0, id="plain bias", marks=pytest.mark.slow), pytest.param(2, id="bias with tangents")],
)
@pytest.mark.parametrize(
    "subset", SUBSETS, ids=lambda s: "".join(n for n, kept in zip("BHNM", s) if kept) or "one"
)
def test_bias_gradients_on_every_subset_of_axes(capability, threads, subset, moves):
    full = (2, 4, 53, 141)
    case = make((2, 2, 2), None, sizes=(2, 4, 2, 53, 141, 5, 3))
    shape = [n if kept else 1 for n, kept in zip(full, subset)]
    case.leaves["mask"] = (0.5 * torch.randn(1 + moves, *shape, dtype=torch.float64)).requires_grad_()
    case = case.to(torch.float32)
    options: dict[str, Any] = {"causal": "lower_right", "window": 70, "softcap": 3.0}
    compare(case, 5e-5, **options)
    results = []
    for count in (1, 1, 2, 2, 3, 3):
        threads(count)
        out = case.ours(**options)
        results.append([out, *case.gradients(out, torch.ones_like(out)).values()])
    for first, second in (
        itertools.batched(results, 2) if hasattr(itertools, "batched") else zip(*[iter(results)] * 2)
    ):
        assert all(torch.equal(x, y) for x, y in zip(first, second))


@pytest.mark.parametrize("bias_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bias_of_another_dtype(capability, dtype, bias_dtype):
    case = make((1, 1, 1), (4, 13, 11), mask_tangents=1).to(dtype)
    case.leaves["mask"] = case.leaves["mask"].detach().to(bias_dtype).requires_grad_()
    exact = case.to(torch.float64)
    expected, actual = exact.oracle(softcap=2.0), case.ours(softcap=2.0)
    out_bar = torch.randn_like(expected).to(dtype)
    exact_gradients, got = exact.gradients(expected, out_bar.double()), case.gradients(actual, out_bar)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    assert_exact(actual, expected, "output", tolerance=tolerance, floor=1.0)
    for name, gradient in exact_gradients.items():
        assert got[name].dtype == case.leaves[name].dtype
        rounding = max(tolerance, torch.finfo(got[name].dtype).eps)
        assert_exact(got[name], gradient, name, tolerance=rounding, floor=1.0)


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    ],
    ids=["transposed", "every other", "batch inside"],
)
@pytest.mark.parametrize("boolean", [False, True])
def test_masks_of_any_strides(capability, layout, boolean):
    case = make((1, 1, 1), sizes=(2, 4, 2, 13, 30, 5, 3)).to(torch.float32)
    values = torch.randn(2, 4, 13, 30)
    mask = layout(values > -0.5) if boolean else layout(values)
    case.mask = mask
    exact = case.to(torch.float64)
    exact.mask = mask if boolean else mask.double()
    expected, actual = exact.oracle(), case.ours()
    assert_exact(actual, expected, tolerance=2e-5, floor=1.0)
    out_bar = torch.randn_like(expected)
    exact_gradients, got = exact.gradients(expected, out_bar), case.gradients(actual, out_bar.float())
    for name in exact_gradients:
        assert_exact(got[name], exact_gradients[name], name, tolerance=2e-5, floor=1.0)


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [(16, 40), (40, 16), (80, 80), (96, 7), (256, 33), (9, 256)], ids=str)
@pytest.mark.parametrize("rows", [(1, 131), (50, 7), (129, 128)], ids=str)
def test_head_sizes_and_unequal_lengths(capability, features, rows):
    compare(low((1, 1, 1), sizes=(1, 2, 1, *rows, *features)), 5e-5, causal="lower_right")


@pytest.mark.parametrize("tangents", [(4, 4, 4), (4, 0, 0), (0, 4, 0), (0, 0, 4), (9, 9, 9)], ids=str)
def test_many_tangents(capability, tangents):
    compare(low(tangents, sizes=(1, 2, 1, 50, 20, 8, 5)), causal=True, softcap=2.0)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 100, 40, 8, 5), (1, 5, 1, 30, 150, 8, 5)], ids=str)
def test_more_threads_than_heads(capability, threads, sizes):
    case = low((1, 1, 1), sizes=sizes)
    for count in (2, 3, 7):
        threads(count)
        compare(case, causal="lower_right")
        results = []
        for _ in range(3):
            out = case.ours(causal="lower_right")
            results.append([out, *case.gradients(out, torch.ones_like(out)).values()])
        assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other))


@pytest.mark.parametrize("bias", [None, (4, 13, 11), (2, 1, 1, 11)], ids=str)
@pytest.mark.parametrize("axis", ["B", "N", "M", "D", "V", "NM"])
def test_axes_of_size_zero(capability, axis, bias):
    B, N, M, D, V = (
        0 if name in axis else n for name, n in (("B", 2), ("N", 13), ("M", 11), ("D", 5), ("V", 3))
    )
    case = make((2, 2, 2), sizes=(B, 4, 2, N, M, D, V)).to(torch.float32)
    if bias is not None:
        sizes = {2: B, 13: N, 11: M, 4: 4, 1: 1}
        case.leaves["mask"] = torch.randn(1, *(sizes[n] for n in bias)).requires_grad_()
    out = case.ours(scale=0.5, causal="lower_right", dropout=0.1)
    assert out.shape == (3, B, 4, N, V)
    gradients = case.gradients(out, torch.ones_like(out))
    for name, leaf in case.leaves.items():
        assert gradients[name].shape == leaf.shape and torch.isfinite(gradients[name]).all()
    if axis != "D":  # over no features all scores are equal: values still have gradients
        assert not out.any() and not any(x.any() for x in gradients.values())


def test_empty_and_fully_masked_rows(capability):
    case = low((2, 2, 2), sizes=(2, 4, 2, 60, 20, 5, 3))
    case.mask = torch.rand(2, 1, 60, 20) > 0.3
    case.mask[0, 0, 45:50] = False
    options: dict[str, Any] = {"causal": "lower_right", "softcap": 2.0}  # rows 0 to 39 see no key
    compare(case, **options)
    out = case.ours(**options)
    grads = case.gradients(out, torch.randn_like(out))
    assert not out[:, :, :, :40].any() and not out[:, 0, :, 45:50].any()
    assert not grads["q"][:, :, :, :40].any() and grads["q"][:, :, :, 50:].any()
    case.mask = torch.zeros(2, 1, 60, 20, dtype=torch.bool)
    out = case.ours()
    assert not out.any() and not any(x.any() for x in case.gradients(out, torch.randn_like(out)).values())
    # the same by a bias of -inf
    bias = torch.full((60, 1), -torch.inf).index_fill(0, torch.arange(3), 0.0).expand(60, 20)
    out = attention(*(Dual(x) for x in case.leaves.values()), mask=bias).stacked
    assert out[:, :, :, :3].any() and not out[:, :, :, 3:].any()
    assert all(torch.isfinite(x).all() for x in case.gradients(out, torch.randn_like(out)).values())


# -- strides ----------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one head for all": lambda x: x[:, :, :1].expand_as(x),
    "one batch row for all": lambda x: x[:, :1].expand_as(x),
    "one row for all": lambda x: x[:, :, :, :1].expand_as(x),
    "one number for all": lambda x: x[..., :1].expand_as(x),
    "equal tangents": lambda x: x[:1].expand_as(x),
    "last axis not dense": lambda x: x.mT.contiguous().mT,
    "every other feature": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "stack inside": lambda x: x.movedim(0, 3).contiguous().movedim(3, 0),
    "odd start": lambda x: torch.cat([x[..., :1], x], -1)[..., 1:],
    "heads in rows": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_strides(capability, layout, dtype):
    case = make((1, 1, 1), sizes=(2, 4, 2, 50, 21, 10, 6)).to(dtype)
    views = {name: layout(x) for name, x in case.leaves.items()}
    dense = {name: x.detach().clone().contiguous().requires_grad_() for name, x in views.items()}
    out, dense_out = Case(views).ours(causal=True), Case(dense).ours(causal=True)
    assert torch.equal(out, dense_out)
    out_bar = layout(torch.randn_like(out))
    got = Case(views).gradients(out, out_bar)
    expected = Case(dense).gradients(dense_out, out_bar.contiguous())
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_a_nan_shows_in_every_row_that_depends_on_it(capability):
    # in a query it stays in its row; in a key or value it may reach queries of the same tile that do not see it (0
    # times NaN), as in torch's flash kernel, but no query that does see it is spared, and other tiles are not touched
    case = low(sizes=(1, 2, 1, 50, 300, 5, 3))
    options: dict[str, Any] = {"causal": True}
    clean = case.ours(**options)
    with torch.no_grad():
        case.leaves["q"][0, 0, 0, 7, 0] = float("nan")
    out, others = case.ours(**options), [i for i in range(50) if i != 7]
    assert out[:, 0, 0, 7].isnan().all()
    assert torch.equal(out[:, :, :, others], clean[:, :, :, others])
    for name in ("k", "v"):
        poisoned = low(sizes=(1, 2, 1, 50, 300, 5, 3))
        with torch.no_grad():
            poisoned.leaves[name][0, 0, 0, 15, 0] = float("nan")
        column = slice(None) if name == "k" else 0
        assert poisoned.ours(**options)[:, :, :, 15:, column].isnan().all()
    last = low(sizes=(1, 2, 1, 50, 300, 5, 3))
    clean = last.ours(**options)
    with torch.no_grad():
        last.leaves["k"][:, :, :, 299], last.leaves["v"][:, :, :, 299] = float("nan"), float("nan")
    assert torch.equal(last.ours(**options), clean)
