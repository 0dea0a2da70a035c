"""Gradients of the streamed head computed within the forward, from cotangents that are expected.

They must be those of the two-pass backward, whatever arrives in the end, and be used for every penalty whose slope is
known from q alone.
"""

from __future__ import annotations

import pytest
import torch
from ops.op_checks import record_calls

from aajr_kernels import Dual, LMHead, aligned_penalty
from aajr_kernels.ops.head import function, lm_head_sensitivity

pytest.importorskip("aajr_kernels._native")

from aajr_kernels.ops.head import cpu as kernels

T, V, C = 310, 290, 24


@pytest.fixture
def passes(monkeypatch):
    """Names of the head's functions, in the order they ran."""
    return record_calls(monkeypatch, kernels, ("head_fwd", "head_bwd", "head_joint"))


def problem(k=1, **options):
    h, w = torch.randn(1 + k, T, C), torch.randn(V, C) * 0.2
    return [t.requires_grad_() for t in (h, w, torch.randn(V))], options


def gradients(leaves, expected, q_bar, nll_bar, options):
    result = lm_head_sensitivity(Dual(leaves[0]), *leaves[1:], expected=expected, **options)
    outputs, bars = (result, (q_bar, nll_bar)) if isinstance(result, tuple) else ((result,), (q_bar,))
    return [*outputs, *torch.autograd.grad(outputs, leaves, bars)]


def agree(ours, theirs, tolerance=1e-6):
    for a, b in zip(ours, theirs):
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("metric", ["fisher", "probs", "logits"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("labelled", [False, True])
def test_same_as_two_passes(vectors, passes, metric, k, labelled):
    leaves, options = problem(k, metric=metric, scale=0.7)
    if labelled:
        options["labels"] = torch.randint(V, (T,)).masked_fill_(torch.rand(T) < 0.1, -100)
    q_bar, nll_bar = torch.rand(k, T), torch.rand(T)
    expected = lambda q, rows: (2.0 * q_bar[:, rows], 2.0 * nll_bar[rows] if labelled else None)
    ours = gradients(leaves, expected, q_bar, nll_bar, options)
    assert passes[0] == "head_joint" and "head_bwd" not in passes
    agree(ours, gradients(leaves, None, q_bar, nll_bar, options))


@pytest.mark.parametrize("labelled", [False, True])
def test_other_cotangents_than_expected(passes, labelled):
    leaves, options = problem()
    if labelled:
        options["labels"] = torch.randint(V, (T,))
    bars = (torch.rand(1, T), torch.rand(T))
    wrong = [lambda q, rows: (torch.ones_like(q), torch.ones_like(q[0]) if labelled else None)]
    wrong += [lambda q, rows: (torch.zeros_like(q), None)]
    if labelled:
        wrong += [lambda q, rows: (bars[0][:, rows], 2.0 * bars[1][rows])]
    truth = gradients(leaves, None, *bars, options)
    for expected in wrong:
        passes.clear()
        ours = gradients(leaves, expected, *bars, options)
        assert passes.count("head_bwd") == 1
        assert all(torch.equal(a, b) for a, b in zip(ours, truth))


def test_the_graph_can_be_used_twice():
    leaves, _ = problem()
    q = lm_head_sensitivity(Dual(leaves[0]), *leaves[1:], expected=lambda q, rows: (torch.ones_like(q), None))
    runs = [torch.autograd.grad(3.0 * q.sum(), leaves, retain_graph=True) for _ in range(3)]
    for again in runs[1:]:
        agree(again, runs[0])


def test_not_without_gradients(passes):
    leaves, _ = problem()
    expected = lambda q, rows: (torch.ones_like(q), None)
    with torch.no_grad():
        lm_head_sensitivity(Dual(leaves[0]), *leaves[1:], expected=expected)
    lm_head_sensitivity(Dual(leaves[0].detach()), leaves[1].detach(), expected=expected)
    assert "head_joint" not in passes


def test_where_it_does_not_pay_the_passes_stay_two(passes):
    for options in (dict(softcap=5.0), dict(metric="l2", labels=torch.randint(V, (T,)))):
        leaves, _ = problem()
        result = lm_head_sensitivity(
            Dual(leaves[0]), leaves[1], expected=lambda q, rows: (torch.ones_like(q), None), **options
        )
        (result if torch.is_tensor(result) else result[0]).sum().backward()
        assert passes.count("head_bwd") == 1
        passes.clear()


def test_common_factor():
    a = torch.rand(2, 5) + 0.1
    assert function.common_factor((3.0 * a, None), (a, None)) == pytest.approx(3.0)
    assert function.common_factor((3.0 * a, a[0]), (a, None)) is None
    assert function.common_factor((3.0 * a, None), (a, a[0])) is None
    assert function.common_factor((None, a[0]), (torch.zeros_like(a), a[0])) == 1.0
    assert function.common_factor((a * torch.nan, None), (a, None)) is None
    assert function.common_factor((a, None), (torch.zeros_like(a), None)) is None
    assert function.common_factor((0.0 * a, None), (0.0 * a, None)) == 1.0  # a hinge that is met everywhere


SHAPES = [
    {},
    dict(reduction="sum"),
    dict(gamma=0.3),
    dict(gamma=0.3, form="hinge"),
    dict(gamma=0.3, form="hinge2"),
    dict(mask=True),
    dict(mask=True, denominator=7.0),
    dict(unit="sequence"),
    dict(unit="sequence", mask=True),
]


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("k", [1, 2])
def test_penalties_are_foreseen(passes, options, labelled, k, monkeypatch):
    options = dict(options)
    x, v = torch.randn(5, 62, C), torch.randn(k, 5, 62, C) if k > 1 else torch.randn(5, 62, C)
    w = (torch.randn(V, C) * 0.2).requires_grad_()
    body = torch.nn.Linear(C, C)
    if options.get("mask"):
        options["mask"] = torch.rand(5, 62) < 0.7
        options["mask"][1] = False
    labels = torch.randint(V, (5, 62)).masked_fill_(torch.rand(5, 62) < 0.2, -100) if labelled else None

    def step(**more):
        result = aligned_penalty(body, x, v, head=LMHead(w), **options, **more)
        if labels is None:
            return [result, *torch.autograd.grad(result, (w, body.weight))]
        penalty, loss = result
        return [penalty, loss, *torch.autograd.grad(0.3 * penalty + loss, (w, body.weight))]

    def objective(weight):
        more = dict(labels=labels, return_primal=True, penalty_weight=weight) if labelled else {}
        return step(**more)

    foreseen = objective(0.3)
    assert passes[0] == "head_joint" and "head_bwd" not in passes
    monkeypatch.setattr(kernels, "head_joint", lambda *args: None)
    agree(foreseen, objective(0.3), 2e-6)
    if labelled:  # an unknown or a wrong weight of the penalty changes nothing
        monkeypatch.undo()
        agree(objective(None), foreseen, 2e-6)
        agree(objective(0.5), foreseen, 2e-6)
