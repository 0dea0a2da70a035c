"""Attention with a context: keys and values in two parts, against the formula of the parts put together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from assertions import assert_exact
from ops.attention_checks import OPTIONS, check, make
from ops.suite import DTYPES, Target, targets
from ops.suite import check as check_on
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import aajr_kernels as aajr
from aajr_kernels import sharding
from aajr_kernels.backends import selfcheck
from aajr_kernels.backends.errors import UnsupportedOperation
from aajr_kernels.dual import Dual
from aajr_kernels.ops.attention import attention, reference, tiling
from aajr_kernels.ops.attention.function import kind_of
from aajr_kernels.ops.attention.options import Options
from aajr_kernels.testing.cases.products import CONTEXT


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small tiles with remainders in every direction."""
    monkeypatch.setattr(tiling, "TILE_ROWS", 8)
    monkeypatch.setattr(tiling, "TILE_NUMEL", 40)


#: cases that the interpreter, a thousand times slower, runs daily
DAILY = ("full, D 20, V 12", "other keys end before the queries", "softcap and scale", "bias with tangents")


def suite() -> list:
    """Every case on every backend in one dtype and number of tangents, the others by `make test-all`."""
    return [
        pytest.param(
            case,
            k,
            dtype,
            target,
            id=f"{case}-K{k}-{str(dtype).removeprefix('torch.')}-{target}",
            marks=[]
            if dtype == DTYPES[index % 3]
            and k == (3 if index % 5 == 0 else 1)
            and (target.backend != "triton" or str(case).endswith(DAILY))
            else [pytest.mark.slow],
        )
        for index, case in enumerate(CONTEXT)
        for k in (1, 3)
        for dtype in DTYPES
        for target in targets("attention")
    ]


@pytest.mark.parametrize(("case", "k", "dtype", "target"), suite())
def test_within_the_budget_of_float64(case, k, dtype, target):
    reason = target.why_not("attention")
    if reason is not None:
        pytest.skip(reason)
    check_on(case, target, k, dtype)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "tangents", [(1, 1, 1), (3, 3, 3), (0, 0, 0), (1, 0, 0), (0, 2, 0), (0, 0, 1)], ids=str
)
def test_output_and_gradients(tiles, tangents, options):
    check(make(tangents, context=9), **options)


@pytest.mark.parametrize("options", [{}, {"causal": True, "window": 6, "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("mask", ["square", "padding", (13, 20), (4, 1, 20), (2, 1, 13, 1)], ids=str)
def test_masks_and_learned_bias(tiles, mask, options):
    case = make((2, 2, 2), mask, mask_tangents=0 if isinstance(mask, str) else 2, context=9)
    if mask == (2, 1, 13, 1):  # a bias per query: its gradient vanishes, all are small numbers
        with torch.no_grad():
            case.leaves["mask"].clamp_(min=-3.0)
    check(case, **options)


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "context"),
    [(0, 5, 6, 4), (2, 0, 6, 4), (2, 5, 0, 4), (2, 5, 6, 0), (2, 5, 0, 0)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_empty_parts(batch, queries, keys, context, dtype):
    case = make((1, 1, 1), sizes=(batch, 4, 2, queries, keys, 4, 3), context=context)
    low = case.to(dtype)
    out = low.ours(causal=True)
    if keys + context == 0:  # the formula has no maximum to subtract
        assert out.shape == (2, batch, 4, queries, 3) and not out.any()
        assert not any(x.any() for x in low.gradients(out, torch.ones_like(out)).values())
        return
    expected = case.oracle(causal=True)
    assert_exact(out, expected, tolerance=1e-12 if dtype == torch.float64 else 1e-5, floor=1.0)
    out_bar = torch.randn_like(expected)
    exact, got = case.gradients(expected, out_bar), low.gradients(out, out_bar.to(dtype))
    for name, gradient in exact.items():
        assert_exact(got[name], gradient, name, tolerance=1e-4, floor=1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rows_that_see_the_context_or_the_other_keys_only_or_nothing(dtype):
    case = make((1, 1, 1), sizes=(1, 2, 1, 4, 5, 8, 8), context=6)
    case.mask = torch.ones(1, 1, 4, 11, dtype=torch.bool)
    case.mask[..., 0, :6] = case.mask[..., 1, 6:] = case.mask[..., 2, :] = False
    low, expected = case.to(dtype), case.oracle()
    out, out_bar = low.ours(), torch.randn_like(expected)
    assert not out[..., 2, :].any()
    assert_exact(out, expected, tolerance=1e-12 if dtype == torch.float64 else 1e-5)
    exact, got = case.gradients(expected, out_bar), low.gradients(out, out_bar.to(dtype))
    assert not got["q"][..., 2, :].any()
    for name, gradient in exact.items():
        assert_exact(got[name], gradient, name, tolerance=1e-11 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_plain_tensors(dtype):
    q, k, v, *context = (x[0].detach().to(dtype).requires_grad_() for x in make(context=9).leaves.values())
    out = attention(q, k, v, context=tuple(context), causal="lower_right")
    assert isinstance(out, Tensor)
    joined = [torch.cat(pair, 2) for pair in zip(context, (k, v))]
    expected = attention(q, *joined, causal="lower_right")  # torch's own
    out_bar = torch.randn_like(out)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_exact(out, expected, tolerance=tolerance)
    leaves = (q, k, v, *context)
    for got, exact in zip(
        torch.autograd.grad(out, leaves, out_bar), torch.autograd.grad(expected, leaves, out_bar)
    ):
        assert_exact(got, exact, tolerance=10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_subset_of_the_gradients(dtype):
    case = make((1, 1, 1), (4, 13, 20), context=9).to(dtype)
    full = case.ours(softcap=2.0)
    out_bar = torch.randn_like(full)
    expected = case.gradients(full, out_bar)
    names = list(case.leaves)
    for needed in (*([name] for name in names), names[:4], names[4:], ["q", "context_v"], ["v", "context_v"]):
        for name, leaf in case.leaves.items():
            leaf.requires_grad_(name in needed)
        got = torch.autograd.grad(case.ours(softcap=2.0), [case.leaves[n] for n in needed], out_bar)
        for name, gradient in zip(needed, got):
            assert_exact(gradient, expected[name], name, tolerance=1e-12 if dtype == torch.float64 else 1e-6)


class _Products(TorchDispatchMode):
    """Multiplications of the matrix products, in units of `unit`."""

    def __init__(self, unit: int) -> None:
        super().__init__()
        self.unit, self.count = unit, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm_):
            a, b = [x for x in args if isinstance(x, Tensor)][-2:]
            self.count += a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2] / self.unit
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("tangents", "of_context", "forward", "backward"),
    [(1, True, 4, 10), (1, False, 4, 6), (0, True, 2, 5), (0, False, 2, 3)],
)
def test_tile_products_against_the_context(tangents, of_context, forward, backward):
    """Of the specification; features are many, so that the columns of ones do not count."""
    B, H, N, C, D = 1, 2, 8, 16, 400
    q, k, v = (torch.randn(1 + tangents, B, H, n, D) for n in (N, 0, 0))
    context = torch.randn(2, 1, B, H, C, D)
    options = Options(D**-0.5, context_k=context[0], context_v=context[1])
    with _Products(B * H * N * C * D) as seen:
        saved = reference.attention_fwd(q, k, v, None, options)
    assert round(seen.count, 1) == forward
    needs = (True, True, True, False, of_context, of_context)
    with _Products(B * H * N * C * D) as seen:
        reference.attention_bwd(saved[0], q, k, v, None, *saved, options, needs)
    assert round(seen.count, 1) == backward


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_dropout_is_the_formula_with_the_mask_that_was_drawn(dtype):
    low = make((2, 2, 2), context=9).to(dtype)
    case = low.to(torch.float64)
    options: dict[str, Any] = {"softcap": 2.0, "causal": "lower_right"}
    joined = torch.cat([low.leaves["context_k"][0], low.leaves["k"][0]], 2).detach()
    # with the identity as values the output is the dropped weights themselves, of as many random numbers
    eye = torch.eye(20, dtype=dtype).expand(2, 2, 20, 20)
    q = low.leaves["q"].detach()
    torch.manual_seed(7)
    kept = attention(Dual(q), joined, eye, dropout=0.4, **options).primal
    weights = attention(Dual(q), joined, eye, **options).primal
    dropped = torch.where(weights > 0, kept / weights.clamp(min=1e-30), 1.0).double()
    dropped = torch.where(dropped < 0.5, 0.0, torch.where(dropped > 1.5, 1 / 0.6, dropped))
    torch.manual_seed(7)
    actual, expected = low.ours(dropout=0.4, **options), case.oracle(dropped=dropped, **options)
    assert_exact(actual, expected, tolerance=1e-12 if dtype == torch.float64 else 2e-5)
    out_bar = torch.randn_like(expected)
    exact, got = case.gradients(expected, out_bar), low.gradients(actual, out_bar.to(dtype))
    for name, gradient in exact.items():
        assert_exact(got[name], gradient, name, tolerance=1e-11 if dtype == torch.float64 else 1e-4)


def test_autocast_casts_the_context_too():
    case = make(sizes=(1, 2, 1, 9, 9, 8, 8), context=7).to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = case.ours(causal=True)
    assert torch.equal(out, case.to(torch.bfloat16).ours(causal=True))
    got = case.gradients(out, torch.ones_like(out))
    assert all(got[n].dtype == torch.float32 for n in got)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # raised inside Dynamo
def test_compiles_without_a_graph_break():
    case = make(sizes=(1, 4, 2, 9, 9, 4, 4), context=5).to(torch.float32)
    leaves = list(case.leaves.values())

    def call(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return attention(
            Dual(q), Dual(k), Dual(v), context=(keys[0], values[0]), causal=True, softcap=2.0
        ).stacked

    out, expected = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves), call(*leaves)
    assert_exact(out, expected, tolerance=1e-5)
    for got, gradient in zip(
        torch.autograd.grad(out, leaves, out.detach()), torch.autograd.grad(expected, leaves, out.detach())
    ):
        assert_exact(got, gradient, tolerance=1e-5)


def test_work_is_counted_by_part():
    case = make((1, 1, 1), sizes=(2, 4, 2, 11, 11, 5, 3), context=9)
    with aajr.coverage() as seen:
        case.ours(causal=True)
    after, before = 11 * 12 // 2, 11 * 9
    assert seen.entries["attention", "reference"][1] == 2 * (3 * after + 2 * before) * 2 * 4 * (5 + 3)


def test_shards_are_refused(monkeypatch):
    case = make(context=9)
    monkeypatch.setattr(sharding, "is_dtensor", lambda *tensors: True)
    with pytest.raises(UnsupportedOperation, match=r"context must be None for DTensors: pass local shards"):
        case.ours()


def _bad() -> list[tuple[type[Exception], dict[str, Any], str]]:
    k = torch.randn(2, 3, 2, 7, 6)
    good = torch.randn(3, 2, 4, 6)
    return [
        (TypeError, {"context": good}, r"context must be a pair \(keys, values\) or None, got Tensor"),
        (TypeError, {"context": (good,)}, "context must be a pair"),
        (
            TypeError,
            {"context": (good, Dual(k))},
            "context's values must be a Tensor, got Dual: those with tangents",
        ),
        (TypeError, {"context": (good.long(), good)}, "context's key must be float64"),
        (TypeError, {"context": (good.double(), good)}, "context's key must have the dtype of q"),
        (
            ValueError,
            {"context": (good[:1], good)},
            r"context's key must have the shape of k but for its length",
        ),
        (
            ValueError,
            {"context": (good, good[..., :5])},
            r"shape of v but for its length, \(3, 2, 4, 6\), got",
        ),
        (ValueError, {"context": (good, good[:, :, :3])}, "equally many keys and values, got 4 and 3"),
        (ValueError, {"context": (good, good.to("meta"))}, "context's value must be on the device of q"),
        (ValueError, {"context": (good, good), "mask": torch.zeros(5, 7)}, r"\(3, 4, 5, 11\), got \(5, 7\)"),
        (ValueError, {"context": (good, good), "cu_seqlens": torch.tensor([0, 7])}, "None with cu_seqlens"),
    ]


@pytest.mark.parametrize(
    ("error", "arguments", "message"), _bad(), ids=lambda x: x if isinstance(x, str) else ""
)
def test_error_messages(error, arguments, message):
    q, k = torch.randn(2, 3, 4, 5, 6), torch.randn(2, 3, 2, 7, 6)
    for q_, k_ in ((Dual(q), Dual(k)), (q[0], k[0])):
        with pytest.raises(error, match=message) as caught:
            attention(q_, k_, k_, **arguments)
        assert str(caught.value).startswith("attention: ") and "\n" not in str(caught.value)


def test_the_first_use_check_knows_a_context():
    """Its trial, with the native kernels in place of a device's."""
    if (reason := Target("native").why_not("attention")) is not None:
        pytest.skip(reason)
    case = make((1, 1, 0), (4, 13, 20), context=9).to(torch.float32)
    q, k, v, mask, *context = (x.detach() for x in case.leaves.values())
    options = Options(1.0, offset=9, softcap=2.0).with_context(context)
    kind = selfcheck.Kind(
        *("attention", "attention", "native", q.device, (q.dtype,) * 5), *kind_of(q, k, v, mask, options)
    )
    operands, _ = selfcheck.trial_of(kind)
    assert operands["context_k"].shape[-2] + operands["k"].shape[-2] == operands["mask"].shape[-1]
    share, text = selfcheck.difference(kind)
    assert share <= 1.0, text
