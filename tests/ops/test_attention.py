"""Attention: output, tangents and all gradients against float64 forward mode of a formula written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_exact, assert_within_budget
from ops.attention_checks import OPTIONS, TANGENTS, Case, check, formula, make
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from aajr_kernels.dual import Dual
from aajr_kernels.ops.attention import attention, reference, tiling
from aajr_kernels.ops.attention.options import Options


@pytest.fixture(params=["whole", "small"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in one tile, and many small tiles with remainders in every direction."""
    if request.param == "small":
        monkeypatch.setattr(tiling, "TILE_ROWS", 8)
        monkeypatch.setattr(tiling, "TILE_NUMEL", 40)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("tangents", TANGENTS, ids=str)
def test_output_and_gradients(tiles, tangents, options):
    check(make(tangents), **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "mask", ["square", "padding", (13, 11), (4, 1, 11), (2, 4, 13, 11), (2, 1, 13, 1)], ids=str
)
def test_masks_and_learned_bias(tiles, mask, options):
    case = make((2, 2, 2), mask)
    if (
        isinstance(mask, tuple) and mask[-1] == 1
    ):  # a bias per row: its gradient vanishes, all are small numbers
        with torch.no_grad():
            case.leaves["mask"].clamp_(min=-3.0)
    check(case, **options)


@pytest.mark.parametrize("tangents", [(2, 2, 2), (0, 0, 0), (0, 2, 0), (0, 0, 2)], ids=str)
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_bias_with_tangents(tangents, softcap):
    check(make(tangents, (4, 13, 11), mask_tangents=2), softcap=softcap, causal=True)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (37, 37, 8, 8), (5, 252, 16, 3), (123, 7, 3, 16)], ids=str)
def test_odd_sizes_and_groups(heads, sizes):
    check(make(sizes=(1, *heads, *sizes)), causal="lower_right" if sizes[0] < sizes[1] else True)


@pytest.mark.parametrize("rows", [1, 5], ids=["one tile", "tiles"])
def test_dropout_is_the_formula_with_the_mask_that_was_drawn(monkeypatch, rows):
    if rows > 1:
        monkeypatch.setattr(tiling, "TILE_ROWS", 8)
    case = make((2, 2, 2))
    options: dict[str, Any] = {"softcap": 2.0, "causal": "lower_right"}
    # with the identity as values the output is the dropped weights themselves
    eye = torch.eye(11, dtype=torch.float64).expand(2, 2, 11, 11)
    probe = {n: case.leaves[n].detach() for n in ("q", "k")}
    torch.manual_seed(7)
    kept = attention(Dual(probe["q"]), Dual(probe["k"]), eye, dropout=0.4, **options).primal
    weights = formula(probe["q"][0], probe["k"][0], eye, **options)
    dropped = torch.where(weights > 0, kept / weights.clamp(min=1e-300), 1.0)
    assert set(dropped[weights > 0].round(decimals=6).unique().tolist()) == {0.0, round(1 / 0.6, 6)}
    torch.manual_seed(7)
    actual = case.ours(dropout=0.4, **options)
    expected = case.oracle(dropped=dropped, **options)
    assert_exact(actual, expected, tolerance=1e-12)
    out_bar = torch.randn_like(expected)
    expected_gradients, got = case.gradients(expected, out_bar), case.gradients(actual, out_bar)
    for name, gradient in expected_gradients.items():
        assert_exact(got[name], gradient, name, tolerance=1e-11)


def test_dropout_under_checkpoint_draws_the_same_mask():
    case = make()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(Dual(q), Dual(k), Dual(v), dropout=0.5).stacked

    torch.manual_seed(3)
    plain = call(*case.leaves.values())
    after = torch.randint(1 << 30, ())
    torch.manual_seed(3)
    replayed = checkpoint(call, *case.leaves.values(), use_reentrant=False)
    assert torch.randint(1 << 30, ()) == after
    out_bar = torch.randn_like(plain)
    expected_gradients, got = case.gradients(plain, out_bar), case.gradients(replayed, out_bar)
    assert all(torch.equal(expected_gradients[n], got[n]) for n in expected_gradients)
    assert not torch.equal(call(*case.leaves.values()), call(*case.leaves.values()))
    assert not attention(
        Dual(case.leaves["q"]), case.leaves["k"][0], case.leaves["v"][0], dropout=1.0
    ).stacked.any()


def test_penalty_gradient_against_finite_differences():
    case = make(mask=(4, 13, 11))

    def penalty(out: Tensor) -> Tensor:
        return (out[1] ** 2).sum() + (out[0] * torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)).sum()

    grads = torch.autograd.grad(penalty(case.ours(causal=True, softcap=2.0)), list(case.leaves.values()))
    for (name, leaf), grad in zip(case.leaves.items(), grads, strict=True):
        direction = torch.randn_like(leaf)
        values = []
        for step in (1e-5, -1e-5):
            moved = {**case.leaves, name: (leaf + step * direction).detach()}
            values.append(penalty(Case(moved).ours(causal=True, softcap=2.0)).item())
        expected = (values[0] - values[1]) / 2e-5
        assert abs(expected - (grad * direction).nan_to_num().sum().item()) < 1e-7 * (1 + abs(expected)), name


def test_rows_without_a_key_are_zero_and_pass_no_gradient():
    case = make((2, 2, 2), "square", sizes=(1, 2, 1, 6, 4, 3, 3))
    for options in (
        {"causal": "lower_right"},
        {"causal": "lower_right", "softcap": 1.0},
    ):  # rows 0 and 1 are empty
        out = case.ours(**options)
        assert not out[:, :, :, :2].any()
        grads = case.gradients(out, torch.randn_like(out))
        assert all(torch.isfinite(x).all() for x in grads.values())
        assert not grads["q"][:, :, :, :2].any() and grads["q"][:, :, :, 2:].any()


@pytest.mark.parametrize("low", [torch.finfo(torch.float32).min, -1e9, -1e4])
def test_a_row_of_large_negative_bias_is_an_ordinary_row(low):
    case = make(size=6.0).to(torch.float32)
    bias = torch.zeros(2, 1, 13, 11)
    bias[0, :, :4] = low
    bias[1, :, :, :5] = low
    out = attention(*(Dual(case.leaves[n]) for n in "qkv"), mask=bias).stacked
    plain = F.scaled_dot_product_attention(
        *(case.leaves[n][0].repeat_interleave(1 if n == "q" else 2, 1) for n in "qkv"), attn_mask=bias
    )
    assert (out[0] - plain).abs().max() < 1e-3 * plain.abs().max()
    out_bar = torch.zeros_like(out)
    out_bar[0] = torch.randn_like(plain)
    got = case.gradients(out, out_bar)
    exact_gradients = case.gradients(plain, out_bar[0])
    for name in "qkv":
        assert_exact(got[name][0], exact_gradients[name][0], name, tolerance=2e-3)
        assert not got[name][1:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1.0, 4.0])
@pytest.mark.parametrize(
    "options", [{"causal": True}, {"softcap": 5.0}, {"causal": True, "window": 9}], ids=str
)
def test_low_dtypes_within_the_error_budget(dtype, size, options):
    low = make((2, 2, 2), sizes=(1, 4, 2, 40, 40, 16, 16), size=size).to(dtype)
    exact = low.to(torch.float64)
    expected, eager, actual = exact.oracle(**options), low.oracle(**options), low.ours(**options)
    assert actual.dtype == dtype
    for j in range(3):
        assert_within_budget(actual[j], eager[j], expected[j], f"output {j}")
    out_bar = torch.randn_like(expected).to(dtype)
    exact_gradients = exact.gradients(expected, out_bar.double())
    poor, got = low.gradients(eager, out_bar), low.gradients(actual, out_bar)
    for name in exact_gradients:
        assert got[name].dtype == dtype
        assert_within_budget(got[name][0], poor[name][0], exact_gradients[name][0], name)
        assert_within_budget(got[name][1:], poor[name][1:], exact_gradients[name][1:], name + " tangents")


def test_large_scores_and_a_common_offset_stay_within_the_budget():
    for shift in (0.0, 30.0):
        low = make(sizes=(1, 2, 1, 33, 64, 16, 8), size=3.0).to(torch.float32)
        with torch.no_grad():
            low.leaves["k"][:] += shift  # every score and its tangent far from zero
        exact = low.to(torch.float64)
        expected, eager, actual = exact.oracle(), low.oracle(), low.ours()
        out_bar = torch.randn_like(expected)
        assert_within_budget(actual, eager, expected, "output")
        exact_gradients = exact.gradients(expected, out_bar)
        poor, got = low.gradients(eager, out_bar.float()), low.gradients(actual, out_bar.float())
        for name in exact_gradients:
            assert_within_budget(got[name], poor[name], exact_gradients[name], f"{name} at offset {shift}")


def test_linear_in_the_tangents_and_adjoint():
    case = make((2, 2, 2), "square")
    out = case.ours(causal=True)
    mixed = Case({n: torch.stack([x[0], 2 * x[1] - 3 * x[2]]) for n, x in case.leaves.items()}, case.mask)
    assert_exact(mixed.ours(causal=True)[1], 2 * out[1] - 3 * out[2], tolerance=1e-12)
    cotangent = torch.randn_like(out[0])
    out_bar = torch.zeros_like(out)
    out_bar[0] = (
        cotangent  # only the primal's cotangent: ordinary reverse mode, the transpose of forward mode
    )
    grads = case.gradients(out, out_bar)
    pulled = sum((grads[n][0] * x[1]).sum() for n, x in case.leaves.items())
    assert torch.allclose(pulled, (cotangent * out[1]).sum(), rtol=1e-12)
    assert not any(grads[n][1:].any() for n in grads)


def test_gradients_nobody_needs_are_skipped():
    for name in ("q", "k", "v", "mask"):
        case = make((2, 2, 2), (4, 13, 11))
        full = case.ours(softcap=2.0)
        out_bar = torch.randn_like(full)
        expected_gradient = case.gradients(full, out_bar)[name]
        for other, leaf in case.leaves.items():
            leaf.requires_grad_(other == name)
        (got,) = torch.autograd.grad(case.ours(softcap=2.0), [case.leaves[name]], out_bar)
        assert_exact(got, expected_gradient, name, tolerance=1e-12)
    case = make()
    stacks = [case.leaves[n].detach() for n in "qkv"]
    options = Options(1.0)
    out, *saved = reference.attention_fwd(*stacks, None, options)
    grads = reference.attention_bwd(out, *stacks, None, out, *saved, options, (False, False, True, False))
    assert grads[0] is None and grads[1] is None and grads[2] is not None and grads[3] is None


def test_layouts_and_batch_axes():
    case = make((2, 2, 2), sizes=(4, 4, 2, 6, 6, 5, 3))
    q, k, v = (x.detach() for x in case.leaves.values())
    out = attention(Dual(q), Dual(k), Dual(v), causal=True).stacked
    transposed = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    assert torch.equal(attention(*map(Dual, transposed), causal=True).stacked, out)
    split = attention(*(Dual(x.unflatten(1, (2, 2))) for x in (q, k, v)), causal=True)
    assert split.shape == (2, 2, 4, 6, 3) and torch.allclose(split.stacked.flatten(1, 2), out)
    single = attention(*(Dual(x[:, 1]) for x in (q, k, v)), causal=True)
    assert single.shape == (4, 6, 3) and torch.allclose(single.stacked, out[:, 1])
    mask = torch.rand(2, 1, 1, 6, 6) > 0.2
    masked = attention(*(Dual(x.unflatten(1, (2, 2))) for x in (q, k, v)), mask=mask).stacked
    wide = mask.expand(2, 2, 1, 6, 6).reshape(4, 1, 6, 6)
    assert torch.allclose(masked.flatten(1, 2), attention(Dual(q), Dual(k), Dual(v), mask=wide).stacked)
