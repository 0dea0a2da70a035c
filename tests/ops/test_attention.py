"""Attention: output, tangents and all gradients against float64 forward mode of a formula written out by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import budgets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from aajr_kernels.dual import Dual
from aajr_kernels.ops.attention import api, attention, reference

FULL = (1, 1, 1)


def formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool | str = False,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    dropped: Tensor | None = None,
) -> Tensor:
    """Attention from elementary operations, with keys and values repeated and rows without a key set to zero."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q.shape[-1] ** -0.5 if scale is None else scale) * q @ k.mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    rows, keys = scores.shape[-2:]
    allowed = torch.ones(rows, keys, dtype=torch.bool)
    if causal:
        last = torch.arange(rows)[:, None] + (keys - rows if causal == "lower_right" else 0)
        allowed = torch.arange(keys) <= last
        if window is not None:
            allowed = allowed & (torch.arange(keys) > last - window)
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        allowed = allowed & (mask > -math.inf)
        scores = scores + torch.where(mask > -math.inf, mask, 0.0)
    top = scores.detach().masked_fill(~allowed, -3e4).amax(-1, keepdim=True)
    weights = torch.exp(torch.where(allowed, scores - top, 0.0)) * allowed
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total == 0, 1.0, total)
    return (weights if dropped is None else weights * dropped) @ v


@dataclass
class Case:
    """Leaves ``[1 | 1+K, ...]``: a leading 1 is a plain tensor."""

    leaves: dict[str, Tensor]
    mask: Tensor | None = None  # a boolean mask, which has no gradient

    def at(self, x: Tensor, index: int) -> Tensor:
        return x[index] if x.shape[0] > 1 else torch.zeros_like(x[0])

    @property
    def tangents(self) -> int:
        return max(x.shape[0] for x in self.leaves.values()) - 1

    def to(self, dtype: torch.dtype) -> Case:
        leaves = {n: x.detach().to(dtype).requires_grad_(x.requires_grad) for n, x in self.leaves.items()}
        return Case(leaves, self.mask)

    def ours(self, **options: Any) -> Tensor:
        args = {n: Dual(x) if x.shape[0] > 1 else x[0] for n, x in self.leaves.items()}
        if self.mask is not None:
            args["mask"] = self.mask
        out = attention(**args, **options)
        return out.stacked if isinstance(out, Dual) else out[None]

    def oracle(self, **options: Any) -> Tensor:
        names = list(self.leaves)

        def call(*values: Tensor) -> Tensor:
            args = dict(zip(names, values, strict=True))
            return formula(args["q"], args["k"], args["v"], args.get("mask", self.mask), **options)

        primals = tuple(x[0] for x in self.leaves.values())
        rows = [call(*primals)]
        for j in range(1, 1 + self.tangents):
            rows.append(torch.func.jvp(call, primals, tuple(self.at(x, j) for x in self.leaves.values()))[1])
        return torch.stack(rows)

    def gradients(self, out: Tensor, out_bar: Tensor) -> dict[str, Tensor | None]:
        grads = torch.autograd.grad(out, list(self.leaves.values()), out_bar, allow_unused=True)
        return dict(zip(self.leaves, grads, strict=True))


def make(
    tangents: tuple[int, int, int] = FULL,
    mask: tuple[int, ...] | str | None = None,
    *,
    sizes: tuple[int, ...] = (2, 4, 2, 13, 11, 5, 3),
    mask_tangents: int = 0,
    size: float = 1.0,
) -> Case:
    B, H, HK, N, M, D, V = sizes
    shapes = {"q": (B, H, N, D), "k": (B, HK, M, D), "v": (B, HK, M, V)}
    leaves = {
        name: size * torch.randn(1 + kk, *shape, dtype=torch.float64)
        for kk, (name, shape) in zip(tangents, shapes.items(), strict=True)
    }
    boolean = None
    if isinstance(mask, str):
        boolean = torch.rand(B, 1, N if mask == "square" else 1, M) > 0.3
        boolean[0, 0, 0] = False  # an empty row, or a batch row without keys
    elif mask is not None:
        leaves["mask"] = torch.randn(1 + mask_tangents, *mask, dtype=torch.float64)
        leaves["mask"][0, ..., : M // 3].masked_fill_(
            torch.rand_like(leaves["mask"][0, ..., : M // 3]) > 0.6, -math.inf
        )
    return Case({n: x.requires_grad_() for n, x in leaves.items()}, boolean)


def check(case: Case, **options: Any) -> None:
    expected = case.oracle(**options)
    actual = case.ours(**options)
    budgets.assert_exact(actual, expected, "output", tolerance=1e-12, floor=1.0)
    out_bar = torch.randn_like(expected)
    wanted, got = case.gradients(expected, out_bar), case.gradients(actual, out_bar)
    for name, gradient in wanted.items():
        assert gradient is not None and got[name] is not None, name
        budgets.assert_exact(got[name], gradient, name, tolerance=1e-11, floor=1.0)


TANGENTS = [FULL, (3, 3, 3), (2, 0, 0), (0, 2, 0), (0, 0, 2), (1, 1, 0), (0, 1, 1), (1, 0, 1)]
OPTIONS = [
    {},
    {"scale": 0.3, "softcap": 1.5},
    {"causal": True},
    {"causal": "lower_right", "softcap": 2.0},
    {"causal": "lower_right", "window": 3},
    {"causal": True, "window": 4, "softcap": 1.0},
]


@pytest.fixture(params=["whole", "small"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in one tile, and many small tiles with remainders in every direction."""
    if request.param == "small":
        monkeypatch.setattr(reference, "_TILE_ROWS", 8)
        monkeypatch.setattr(reference, "_TILE_NUMEL", 40)


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
        monkeypatch.setattr(reference, "_TILE_ROWS", 8)
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
    budgets.assert_exact(actual, expected, tolerance=1e-12)
    out_bar = torch.randn_like(expected)
    wanted, got = case.gradients(expected, out_bar), case.gradients(actual, out_bar)
    for name, gradient in wanted.items():
        budgets.assert_exact(got[name], gradient, name, tolerance=1e-11)


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
    wanted, got = case.gradients(plain, out_bar), case.gradients(replayed, out_bar)
    assert all(torch.equal(wanted[n], got[n]) for n in wanted)
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
    wanted = case.gradients(plain, out_bar[0])
    for name in "qkv":
        budgets.assert_exact(got[name][0], wanted[name][0], name, tolerance=2e-3)
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
        budgets.assert_within_budget(actual[j], eager[j], expected[j], f"output {j}")
    out_bar = torch.randn_like(expected).to(dtype)
    wanted = exact.gradients(expected, out_bar.double())
    poor, got = low.gradients(eager, out_bar), low.gradients(actual, out_bar)
    for name in wanted:
        assert got[name].dtype == dtype
        budgets.assert_within_budget(got[name][0], poor[name][0], wanted[name][0], name)
        budgets.assert_within_budget(got[name][1:], poor[name][1:], wanted[name][1:], name + " tangents")


def test_large_scores_and_a_common_offset_stay_within_the_budget():
    for shift in (0.0, 30.0):
        low = make(sizes=(1, 2, 1, 33, 64, 16, 8), size=3.0).to(torch.float32)
        with torch.no_grad():
            low.leaves["k"][:] += shift  # every score and its tangent far from zero
        exact = low.to(torch.float64)
        expected, eager, actual = exact.oracle(), low.oracle(), low.ours()
        out_bar = torch.randn_like(expected)
        budgets.assert_within_budget(actual, eager, expected, "output")
        wanted = exact.gradients(expected, out_bar)
        poor, got = low.gradients(eager, out_bar.float()), low.gradients(actual, out_bar.float())
        for name in wanted:
            budgets.assert_within_budget(got[name], poor[name], wanted[name], f"{name} at offset {shift}")


def test_linear_in_the_tangents_and_adjoint():
    case = make((2, 2, 2), "square")
    out = case.ours(causal=True)
    mixed = Case({n: torch.stack([x[0], 2 * x[1] - 3 * x[2]]) for n, x in case.leaves.items()}, case.mask)
    budgets.assert_exact(mixed.ours(causal=True)[1], 2 * out[1] - 3 * out[2], tolerance=1e-12)
    cotangent = torch.randn_like(out[0])
    out_bar = torch.zeros_like(out)
    out_bar[0] = (
        cotangent  # the primal's cotangent alone is ordinary reverse mode, the transpose of forward mode
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
        wanted = case.gradients(full, out_bar)[name]
        for other, leaf in case.leaves.items():
            leaf.requires_grad_(other == name)
        (got,) = torch.autograd.grad(case.ours(softcap=2.0), [case.leaves[name]], out_bar)
        budgets.assert_exact(got, wanted, name, tolerance=1e-12)
    case = make()
    stacks = [case.leaves[n].detach() for n in "qkv"]
    options = reference.Options(1.0)
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


@pytest.mark.parametrize("sizes", [(0, 2, 1, 3, 3), (1, 2, 1, 0, 3), (1, 2, 1, 3, 0)], ids=str)
def test_empty_inputs(sizes):
    case = make(sizes=(*sizes, 4, 5))
    out = case.ours(causal=True)
    assert out.shape == (2, sizes[0], 2, sizes[3], 5) and not out.any()
    grads = case.gradients(out, torch.ones_like(out))
    assert all(grads[n].shape == x.shape and not grads[n].any() for n, x in case.leaves.items())


@pytest.mark.parametrize("options", [*OPTIONS, {"causal": True, "mask": torch.rand(13, 11) > 0.3}], ids=str)
def test_plain_tensors_in_plain_tensors_out(options):
    case = make()
    q, k, v = (x[0].detach().requires_grad_() for x in case.leaves.values())
    out = attention(q, k, v, **options)
    assert isinstance(out, Tensor)
    expected = formula(q, k, v, **options)
    budgets.assert_exact(out, expected, tolerance=1e-12)
    assert torch.allclose(attention(Dual(case.leaves["q"]), k, v, **options).primal, out)
    out_bar = torch.randn_like(out)
    for got, wanted in zip(
        torch.autograd.grad(out, (q, k, v), out_bar),
        torch.autograd.grad(expected, (q, k, v), out_bar),
        strict=True,
    ):
        budgets.assert_exact(got, wanted, tolerance=1e-11)


def test_plain_tensors_with_bias_and_no_keys():
    case = make((0, 0, 0), (4, 13, 11))
    q, k, v, bias = (x[0] for x in case.leaves.values())
    budgets.assert_exact(attention(q, k, v, mask=bias, causal=True), formula(q, k, v, bias, causal=True))
    longer = attention(v.repeat_interleave(2, 1), v[:, :, :4], v[:, :, :4], causal="lower_right")
    assert not longer[:, :, :7].any() and longer[:, :, 7:].all()


def test_transforms_of_torch_give_the_right_tangent_or_an_error():
    case = make()
    q, k, v = (x[0].detach() for x in case.leaves.values())
    for options in ({}, {"softcap": 2.0}, {"causal": True, "window": 2}):
        try:
            tangent = torch.func.jvp(
                lambda x, o=options: attention(x, k, v, **o), (q,), (torch.ones_like(q),)
            )[1]
        except (RuntimeError, NotImplementedError):
            continue
        expected = torch.func.jvp(lambda x, o=options: formula(x, k, v, **o), (q,), (torch.ones_like(q),))[1]
        budgets.assert_exact(tangent, expected)
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises((RuntimeError, NotImplementedError)):
            attention(x, k, v, softcap=2.0)
    with pytest.raises(RuntimeError):
        torch.func.vmap(lambda x: attention(x, k, v, softcap=2.0))(torch.stack([q, q]))


class _Largest(TorchDispatchMode):
    """The largest tensor any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // max(1, x.element_size()))
        return result


def test_memory_is_linear_in_the_length(monkeypatch):
    monkeypatch.setattr(reference, "_TILE_ROWS", 16)
    monkeypatch.setattr(reference, "_TILE_NUMEL", 1 << 12)
    largest = {}
    for n in (256, 512):
        case = make(sizes=(1, 2, 1, n, n, 4, 4)).to(torch.float32)
        with _Largest() as recorder:
            out = case.ours(causal=True)
            case.gradients(out, out.detach())
        largest[n] = recorder.numel
    assert largest[512] <= 16 * 512 < 512 * 512 // 16
    assert largest[512] <= 2 * largest[256]


def test_autocast_casts_products_and_keeps_the_mask():
    case = make(sizes=(1, 2, 1, 9, 9, 8, 8)).to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = case.ours(causal=True)
    assert out.dtype == torch.bfloat16
    low = case.to(torch.bfloat16)
    assert torch.equal(out, low.ours(causal=True))
    got = case.gradients(out, torch.ones_like(out))
    assert all(got[n].dtype == torch.float32 for n in "qkv")


def test_two_runs_are_bitwise_equal():
    case = make((2, 2, 2), "square").to(torch.float32)
    runs = []
    for _ in range(2):
        out = case.ours(softcap=3.0)
        runs.append([out, *case.gradients(out, torch.ones_like(out)).values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # raised inside Dynamo
def test_compiles_without_a_graph_break():
    case = make(sizes=(1, 4, 2, 9, 9, 4, 4))
    leaves = list(case.leaves.values())

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(Dual(q), Dual(k), Dual(v), causal=True, softcap=2.0).stacked

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    out, expected = compiled(*leaves), call(*leaves)
    budgets.assert_exact(out, expected)
    for got, wanted in zip(
        torch.autograd.grad(out, leaves, out.detach()),
        torch.autograd.grad(expected, leaves, out.detach()),
        strict=True,
    ):
        budgets.assert_exact(got, wanted)


def _bad() -> list[tuple[str, type[Exception], dict[str, Any], str]]:
    q, k = torch.randn(2, 1, 4, 5, 6), torch.randn(2, 1, 2, 7, 6)
    good: dict[str, Any] = {"q": Dual(q), "k": Dual(k), "v": Dual(k)}
    return [
        ("no tensor", TypeError, {**good, "v": 3}, "v must be a Tensor or a Dual, got int"),
        ("integers", TypeError, {**good, "k": k[0].long()}, "k must be float64"),
        ("dtype", TypeError, {**good, "k": Dual(k.double())}, "k must have the dtype of q"),
        ("two axes", ValueError, {**good, "q": Dual(q[:, 0, 0])}, "q must be .*heads"),
        ("batch", ValueError, {**good, "k": Dual(k.expand(2, 3, 2, 7, 6))}, "batch axes"),
        ("length", ValueError, {**good, "v": Dual(k[..., :3, :])}, "k and v must agree"),
        ("features", ValueError, {**good, "k": Dual(k[..., :4])}, "equally many features"),
        ("heads", ValueError, {**good, "q": Dual(q[:, :, :3])}, "multiple"),
        ("K", ValueError, {**good, "k": Dual(k[[0, 1, 1]])}, "1 and 2 tangents"),
        (
            "mask shape",
            ValueError,
            {**good, "mask": torch.zeros(5, 6)},
            r"mask must be broadcastable .*\(5, 6\)",
        ),
        ("mask axes", ValueError, {**good, "mask": torch.zeros(1, 1, 1, 5, 7)}, "mask must be broadcastable"),
        ("mask dtype", TypeError, {**good, "mask": torch.ones(5, 7).long()}, "mask must be bool"),
        ("mask type", TypeError, {**good, "mask": [[True]]}, "mask must be a Tensor"),
        ("causal", ValueError, {**good, "causal": "left"}, "causal must be"),
        ("softcap", ValueError, {**good, "softcap": 0.0}, "softcap must be positive"),
        ("window", ValueError, {**good, "window": 3}, "needs causal"),
        ("window size", ValueError, {**good, "window": 0, "causal": True}, "window must be a positive int"),
        ("dropout", ValueError, {**good, "dropout": 1.5}, "dropout must be a probability"),
        ("device", ValueError, {**good, "k": Dual(k.to("meta"))}, "k must be on the device of q"),
    ]


@pytest.mark.parametrize("bad", _bad(), ids=lambda bad: bad[0])
def test_error_messages(bad):
    _, error, arguments, message = bad
    with pytest.raises(error, match=message) as caught:
        attention(**arguments)
    assert str(caught.value).startswith(("attention: ", "Duals with")) and "\n" not in str(caught.value)


@pytest.mark.parametrize("offset", [None, 0, -3, 4])
@pytest.mark.parametrize("window", [None, 1, 5])
def test_visible_pairs_counts_what_the_mask_leaves(offset, window):
    key, last = torch.arange(7), torch.arange(9)[:, None] + (offset or 0)
    if offset is None:
        assert api._visible_pairs(9, 7, None, None) == 63
        return
    allowed = (key <= last) & (key > last - (window or 100))
    assert api._visible_pairs(9, 7, offset, window) == allowed.sum().item()
