"""Packed sequences: every sequence against the float64 formula on its own rows, on every backend and capability."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from assertions import assert_exact, assert_within_budget
from ops.attention_checks import Case, formula, make
from ops.suite import DEVICES, Target, targets
from torch import Tensor

import aajr_kernels as aajr
from aajr_kernels import Dual, coverage
from aajr_kernels.ops.attention import attention
from aajr_kernels.ops.attention import packed as packed_module

Q_LENGTHS, K_LENGTHS = (3, 0, 50, 1, 7, 0), (5, 4, 61, 1, 0, 0)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": True, "softcap": 2.0},
    {"causal": "lower_right", "scale": 0.3},
    {"causal": "lower_right", "window": 4},
    {"causal": True, "window": 9},
]
TANGENTS = [(1, 1, 1), (3, 3, 3), (0, 2, 0), (1, 0, 1), (0, 0, 1)]


def everywhere() -> list:
    """Every target; Triton's interpreter, which takes minutes for all of this, is left to `make test-all`."""
    return [
        pytest.param(t, marks=[pytest.mark.slow] if (t.backend, t.device) == ("triton", "cpu") else [])
        for t in targets("attention")
    ]


@pytest.fixture(params=everywhere(), ids=str)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    if (reason := request.param.why_not("attention")) is not None:
        pytest.skip(reason)
    with request.param.active():
        yield request.param


def offsets(lengths: tuple[int, ...], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def packed(
    tangents: tuple[int, int, int], q: tuple[int, ...] = Q_LENGTHS, k: tuple[int, ...] = K_LENGTHS
) -> Case:
    return make(tangents, sizes=(1, 4, 2, sum(q), sum(k), 5, 3))


def bounds(q: tuple[int, ...], k: tuple[int, ...]) -> list[tuple[slice, slice]]:
    starts = [offsets(x, torch.int64).tolist() for x in (q, k)]
    rows, keys = ([slice(*pair) for pair in itertools.pairwise(x)] for x in starts)
    return list(zip(rows, keys))


def part(case: Case, rows: slice, keys: slice) -> Case:
    cuts = {"q": rows, "k": keys, "v": keys}
    return Case({name: x[..., cuts[name], :] for name, x in case.leaves.items()})


def oracle(
    case: Case,
    q: tuple[int, ...] = Q_LENGTHS,
    k: tuple[int, ...] = K_LENGTHS,
    dropped: list[Tensor] | None = None,
    **options: Any,
) -> Tensor:
    """The formula of every sequence by itself; a sequence without queries has no rows, one without keys gives zeros."""
    rows = []
    for i, cut in enumerate(bounds(q, k)):
        one = part(case, *cut)
        n, m = one.leaves["q"].shape[-2], one.leaves["k"].shape[-2]
        if n and m:
            rows.append(one.oracle(**options, dropped=None if dropped is None else dropped[i]))
        else:
            v = one.leaves["v"]
            rows.append(v.new_zeros(1 + case.tangents, 1, one.leaves["q"].shape[2], n, v.shape[-1]))
    return torch.cat(rows, -2)


def compare(case: Case, ours: Case, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert_exact(actual, expected, "output", tolerance=tolerance, floor=1.0)
    out_bar = torch.randn_like(expected)
    expected_gradients, got = (
        case.gradients(expected, out_bar),
        ours.gradients(actual, out_bar.to(actual.dtype)),
    )
    for name, gradient in expected_gradients.items():
        assert gradient is not None and got[name] is not None, name
        assert_exact(got[name], gradient, name, tolerance=10 * tolerance, floor=1.0)


BOTH = (offsets(Q_LENGTHS), offsets(K_LENGTHS, torch.int64))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("tangents", TANGENTS, ids=str)
def test_float64(tangents, options):
    case = packed(tangents)
    compare(case, case, case.ours(cu_seqlens=BOTH, **options), oracle(case, **options), 1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("tangents", TANGENTS, ids=str)
def test_float32(target, tangents, options):
    low = packed(tangents).to(torch.float32)
    exact = low.to(torch.float64)
    with coverage() as seen:
        actual = low.ours(cu_seqlens=BOTH, **options)
    assert {backend for _, backend in seen.entries} == {target.backend}
    compare(exact, low, actual, oracle(exact, **options), 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS[1:4], ids=str)
def test_low_dtypes_within_the_error_budget(target, dtype, options):
    low = packed((3, 3, 3)).to(dtype)
    exact = low.to(torch.float64)
    expected, eager = oracle(exact, **options), oracle(low, **options)
    actual = low.ours(cu_seqlens=BOTH, **options)
    assert actual.dtype == dtype
    out_bar = torch.randn_like(expected).to(dtype)
    exact_gradients = exact.gradients(expected, out_bar.double())
    poor, got = low.gradients(eager, out_bar), low.gradients(actual, out_bar)
    for index in (slice(0, 1), slice(1, None)):
        assert_within_budget(actual[index], eager[index], expected[index], "output")
        for name in exact_gradients:
            assert_within_budget(got[name][index], poor[name][index], exact_gradients[name][index], name)


def test_one_tensor_for_queries_and_keys_is_self_attention(target):
    lengths = (4, 9, 0, 20)
    low = packed((1, 1, 1), lengths, lengths).to(torch.float32)
    exact = low.to(torch.float64)
    actual = low.ours(causal=True, cu_seqlens=offsets(lengths))
    compare(exact, low, actual, oracle(exact, lengths, lengths, causal=True), 2e-5)
    without_batch = attention(
        *(Dual(x[:, 0]) for x in low.leaves.values()), causal=True, cu_seqlens=offsets(lengths)
    )
    assert without_batch.shape == (4, 33, 3) and torch.equal(without_batch.stacked, actual[:, 0])


def test_nobody_waits_for_offsets_while_a_graph_is_captured(monkeypatch):
    """The values of the offsets stay on the device; here, without one, reading them is what must not happen."""
    if (reason := Target("triton").why_not("attention")) is not None:
        pytest.skip(reason)
    device = DEVICES["triton"]
    low = packed((1, 1, 1)).to(torch.float32)
    on = Case({name: x.detach().to(device).requires_grad_() for name, x in low.leaves.items()})
    there = tuple(x.to(device) for x in BOTH)
    exact = low.to(torch.float64)
    with aajr.use_backend("triton"), monkeypatch.context() as patch:
        patch.setattr(packed_module.capture, "is_capturing", lambda device: True)
        patch.setattr(Tensor, "tolist", lambda *_: pytest.fail("read the offsets"))
        with coverage():  # counting work must not read them either
            actual = on.ours(causal=True, cu_seqlens=there)
        plain = attention(*(x[0].detach() for x in on.leaves.values()), causal=True, cu_seqlens=there)
    expected = oracle(exact, causal=True)
    assert_exact(plain.cpu(), expected[0], "plain", tolerance=2e-5, floor=1.0)
    out_bar = torch.randn_like(expected)
    exact_gradients, got = exact.gradients(expected, out_bar), on.gradients(actual, out_bar.to(actual))
    assert_exact(actual.cpu(), expected, "output", tolerance=2e-5, floor=1.0)
    for name, gradient in exact_gradients.items():
        assert_exact(got[name].cpu(), gradient, name, tolerance=2e-4, floor=1.0)


def test_offsets_elsewhere_cannot_be_captured(monkeypatch):
    monkeypatch.setattr(packed_module.capture, "is_capturing", lambda device: True)
    low = packed((1, 1, 1)).to(torch.float32)
    with pytest.raises(
        ValueError, match=r"cu_seqlens_k must be on cpu while a CUDA graph is captured, got meta"
    ):
        low.ours(cu_seqlens=(BOTH[0], BOTH[1].to("meta")))


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (1,), (130, 2)], ids=str)
def test_few_or_no_sequences(target, lengths):
    low = packed((1, 1, 1), lengths, lengths).to(torch.float32)
    actual = low.ours(causal=True, cu_seqlens=offsets(lengths))
    assert actual.shape == (2, 1, 4, sum(lengths), 3)
    exact = low.to(torch.float64)
    if sum(lengths):
        compare(exact, low, actual, oracle(exact, lengths, lengths, causal=True), 2e-5)
    else:
        assert all(x.shape == low.leaves[n].shape for n, x in low.gradients(actual, actual).items())


def test_sequences_do_not_see_each_other(target):
    low = packed((1, 1, 1)).to(torch.float32)
    spoilt = {n: x.detach().clone() for n, x in low.leaves.items()}
    spoilt["k"][..., 9:70, :] = float("nan")
    spoilt["v"][..., 9:70, :] = float("nan")
    out, other = low.ours(cu_seqlens=BOTH), Case(spoilt).ours(cu_seqlens=BOTH)
    keep = torch.tensor([*range(3), *range(53, 61)])
    assert torch.equal(out[..., keep, :], other[..., keep, :]) and other[..., 3:53, :].isnan().all()


def test_dropout_is_the_formula_with_the_mask_that_was_drawn(target):
    low = packed((2, 2, 2)).to(torch.float64 if target.backend == "reference" else torch.float32)
    case, dtype = low.to(torch.float64), low.leaves["q"].dtype
    options: dict[str, Any] = {"softcap": 2.0, "causal": "lower_right"}
    # with zero queries and the identity as values the output is the dropped weights themselves
    eye = torch.eye(sum(K_LENGTHS), dtype=dtype).expand(1, 2, -1, -1)
    zero = low.leaves["q"].detach() * 0
    torch.manual_seed(7)
    kept = attention(
        Dual(zero), low.leaves["k"][0].detach(), eye, dropout=0.4, cu_seqlens=BOTH, **options
    ).primal
    dropped, factors = [], []
    for rows, keys in bounds(Q_LENGTHS, K_LENGTHS):
        weights = kept.double()[..., rows, keys]
        if not weights.numel():
            dropped.append(weights)
            continue
        m = weights.shape[-1]
        plain = formula(zero[:1, 0].double()[..., rows, :], case.leaves["k"][0][..., keys, :].detach(),
                        torch.eye(m, dtype=torch.float64).expand(1, 2, m, m), **options)  # fmt: skip
        dropped.append(torch.where(plain > 0, weights / plain.clamp(min=1e-300), 1.0))
        factors.append(dropped[-1][plain > 0])
    drawn = torch.cat(factors)
    assert ((drawn.abs() < 1e-9) | ((drawn - 1 / 0.6).abs() < 1e-5)).all()
    assert abs((drawn == 0).double().mean().item() - 0.4) < 5 * (0.24 / drawn.numel()) ** 0.5
    torch.manual_seed(7)
    actual = low.ours(dropout=0.4, cu_seqlens=BOTH, **options)
    exact = [torch.where(x < 0.5, 0.0, torch.where(x > 1.5, 1 / 0.6, x)) for x in dropped]
    expected = oracle(case, dropped=exact, **options)
    compare(case, low, actual, expected, 1e-12 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"causal": "lower_right", "window": 3}, {"softcap": 2.0}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_plain_tensors(dtype, options):
    q, k, v = (x[0].detach().to(dtype) for x in packed((0, 0, 0)).leaves.values())
    together = attention(q, k, v, cu_seqlens=BOTH, **options)
    assert not isinstance(together, Dual) and together.dtype == dtype
    alone = [
        attention(q[..., rows, :], k[..., keys, :], v[..., keys, :], **options)
        for rows, keys in bounds(Q_LENGTHS, K_LENGTHS)
    ]
    torch.testing.assert_close(
        together, torch.cat(alone, -2), rtol=0, atol=1e-6 if "softcap" in options else 0
    )
    none = torch.zeros(1, dtype=torch.int64)
    assert attention(q[..., :0, :], k[..., :0, :], v[..., :0, :], cu_seqlens=none).shape == (1, 4, 0, 3)


def test_deterministic_whatever_the_threads(target):
    case = packed((1, 1, 1)).to(torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 1, 2, 3, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(3)
            out = case.ours(causal=True, dropout=0.2, cu_seqlens=BOTH)
            results.append((threads, [out, *case.gradients(out, torch.ones_like(out)).values()]))
    finally:
        torch.set_num_threads(before)
    for (a, one), (b, two) in itertools.pairwise(results):
        if a == b:
            assert all(torch.equal(x, y) for x, y in zip(one, two))
        for x, y in zip(one, two):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_gradients_nobody_needs_and_strided_inputs(target):
    case = packed((1, 1, 1)).to(torch.float32)
    full = case.ours(causal=True, cu_seqlens=BOTH)
    out_bar = torch.randn_like(full)
    expected_gradients = case.gradients(full, out_bar)
    for name in expected_gradients:
        # positions before heads in memory, as a projection leaves them
        leaves = {n: x.detach().transpose(2, 3).contiguous().transpose(2, 3) for n, x in case.leaves.items()}
        leaves[name].requires_grad_()
        out = Case(leaves).ours(causal=True, cu_seqlens=BOTH)
        assert_exact(out, full, tolerance=1e-6)
        (got,) = torch.autograd.grad(out, leaves[name], out_bar)
        assert_exact(got, expected_gradients[name], name, tolerance=1e-5)


def test_work_is_counted_per_sequence():
    case = packed((1, 1, 1))
    with aajr.coverage() as seen:
        case.ours(causal="lower_right", cu_seqlens=BOTH)
    pairs = sum(max(0, min(i + m - n + 1, m)) for n, m in zip(Q_LENGTHS, K_LENGTHS) for i in range(n))
    assert seen.entries["attention", "reference"][1] == 2 * pairs * 4 * 3 * (5 + 3)


def test_errors():
    q, k, v = (Dual(x.detach()) for x in packed((1, 1, 1), (4, 2), (4, 2)).leaves.values())
    fine = offsets((4, 2))

    def fails(error: type[Exception], message: str, *args: Any, cu_seqlens: Any, **options: Any) -> None:
        for wrap in (lambda x: x, lambda x: x.primal):  # plain tensors are held to the same
            with pytest.raises(error, match=message):
                attention(*(wrap(x) for x in args), cu_seqlens=cu_seqlens, **options)

    fails(
        ValueError,
        "mask must be None with cu_seqlens",
        q,
        k,
        v,
        cu_seqlens=fine,
        mask=torch.ones(6, dtype=torch.bool),
    )
    fails(
        ValueError, "must begin with 0 and end with the number of positions, 6", q, k, v, cu_seqlens=fine[:-1]
    )
    fails(ValueError, "must begin with 0", q, k, v, cu_seqlens=fine[1:])
    fails(ValueError, "ascending", q, k, v, cu_seqlens=torch.tensor([0, 7, 6]))
    fails(ValueError, "int32 or int64", q, k, v, cu_seqlens=fine.double())
    fails(ValueError, "int32 or int64", q, k, v, cu_seqlens=fine[None])
    fails(ValueError, "int32 or int64", q, k, v, cu_seqlens=fine[:0])
    fails(TypeError, "cu_seqlens_k must be an int32 or int64 tensor", q, k, v, cu_seqlens=(fine, [0, 6]))
    fails(TypeError, "got int", q, k, v, cu_seqlens=3)
    fails(ValueError, "a pair", q, k, v, cu_seqlens=(fine,))
    fails(ValueError, "equally many sequences, got 2 and 1", q, k, v, cu_seqlens=(fine, offsets((6,))))
    fails(ValueError, "end with the number of keys, 6", q, k, v, cu_seqlens=(fine, offsets((4,))))
    fails(ValueError, "pass a pair", q[..., :4, :], k, v, cu_seqlens=fine)
    two = [x.expand(2, *x.shape[1:]) for x in (q, k, v)]
    fails(ValueError, r"\[H, N, D\] or \[1, H, N, D\]", *two, cu_seqlens=fine)
