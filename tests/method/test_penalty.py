"""aligned_penalty against the independent oracle: metrics, forms, units, reductions, heads, and bad input."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from assertions import assert_exact
from torch import nn

import aajr_kernels as aajr
from aajr_kernels import Dual
from aajr_kernels.method.expected import expected_cotangents
from aajr_kernels.method.options import PenaltyOptions
from aajr_kernels.testing import oracle

B, T, C, V, HIDDEN = 2, 5, 6, 11, 7
MASK = torch.tensor([[True, True, True, False, False], [True, True, True, True, True]])


class Policy(nn.Module):
    """A small non-linear policy with a layer norm, so that PyTorch's own reverse-over-forward would be wrong."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.up = nn.Linear(C, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, V)
        self.to(dtype)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape))

    def hidden(self, x):
        return self.norm(torch.tanh(self.up(x)))

    def forward(self, x):
        return self.head(self.hidden(x))


def problem(k: int = 1, dtype: torch.dtype = torch.float64):
    policy = Policy(dtype)
    x = torch.randn(B, T, C, dtype=dtype, requires_grad=True)
    v = torch.randn(k, B, T, C, dtype=dtype, requires_grad=True)
    return policy, x, v


def expected_q(func, x, v, metric):
    with oracle.oracle_mode():
        primal, tangents = oracle.jvp(func, x, v)
    return primal, oracle.metric_values(primal, tangents, metric)


def same_gradients(loss, expected, leaves):
    ours = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad(expected, leaves, retain_graph=True, allow_unused=True)
    for i, (a, b) in enumerate(zip(ours, theirs)):
        a, b = (torch.zeros_like(leaves[i]) if g is None else g for g in (a, b))
        assert_exact(a, b, f"gradient {i}", floor=1e-6)
    assert any(b is not None and b.abs().max() > 0 for b in theirs)


@pytest.mark.parametrize("metric", oracle.METRICS)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("head", [False, True])
def test_metrics_and_all_gradients(metric, k, head):
    policy, x, v = problem(k)
    leaves = [x, v, *policy.parameters()]
    if head and metric == "l2":
        _, q = expected_q(policy.hidden, x, v, "l2")
    else:
        _, q = expected_q(policy, x, v, metric)
    description = aajr.LMHead(policy.head.weight, policy.head.bias) if head else None
    func = policy.hidden if head else policy
    pen = aajr.aligned_penalty(func, x, v, metric=metric, head=description)
    assert q.mean() > 0
    assert_exact(pen, q.mean(), "penalty")
    same_gradients(pen, q.mean(), leaves)


def test_one_direction_needs_no_leading_axis():
    policy, x, v = problem(1)
    assert torch.equal(aajr.aligned_penalty(policy, x, v[0]), aajr.aligned_penalty(policy, x, v))


@pytest.mark.parametrize("unit", ["token", "sequence"])
@pytest.mark.parametrize("form", ["squared", "threshold", "hinge", "hinge2"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mask", [None, MASK])
def test_forms_units_and_reductions(unit, form, reduction, mask):
    policy, x, v = problem(2)
    _, q = expected_q(policy, x, v, "fisher")
    keep = torch.ones(B, T, dtype=torch.bool) if mask is None else mask
    if unit == "sequence":
        q, keep = (q * keep).sum(-1), keep.any(-1)
    gamma = 0.9 * q.median().item() ** 0.5  # more than half the units are above it, none at the kink
    values = {
        "squared": q,
        "threshold": (q - gamma**2).clamp(min=0),
        "hinge": (q.sqrt() - gamma).clamp(min=0),
        "hinge2": (q.sqrt() - gamma).clamp(min=0) ** 2,
    }[form] * keep
    expected = {"mean": values.sum() / (2 * keep.sum()), "sum": values.sum(), "none": values}[reduction]
    pen = aajr.aligned_penalty(
        policy,
        x,
        v,
        mask=mask,
        unit=unit,
        reduction=reduction,
        form="squared" if form == "threshold" else form,
        gamma=None if form == "squared" else gamma,
    )
    assert pen.shape == expected.shape
    assert_exact(pen, expected, "penalty")
    weights = torch.rand_like(expected)
    same_gradients((pen * weights).sum(), (expected * weights).sum(), [x, v, *policy.parameters()])


def test_integer_mask_means_the_same_and_masked_tokens_do_not_count():
    policy, x, v = problem(1)
    by_bool = aajr.aligned_penalty(policy, x, v, mask=MASK)
    assert torch.equal(by_bool, aajr.aligned_penalty(policy, x, v, mask=MASK.long()))
    with torch.no_grad():
        moved = x + 10 * (~MASK).unsqueeze(-1)
    assert torch.equal(by_bool.detach(), aajr.aligned_penalty(policy, moved, v, mask=MASK).detach())


def test_an_empty_mask_gives_zero():
    policy, x, v = problem(1)
    pen = aajr.aligned_penalty(policy, x, v, mask=torch.zeros(B, T, dtype=torch.bool))
    pen.backward()
    assert pen == 0 and x.grad.abs().max() == 0


def test_denominator_makes_accumulated_parts_equal_the_whole():
    policy, x, v = problem(2)
    whole = aajr.aligned_penalty(policy, x, v, mask=MASK)
    count = MASK.sum()
    parts = [
        aajr.aligned_penalty(policy, x[i : i + 1], v[:, i : i + 1], mask=MASK[i : i + 1], denominator=d)
        for i, d in ((0, count), (1, count.item()))
    ]
    assert_exact(sum(parts), whole, "accumulated")


def test_zero_direction_gives_zero_and_a_zero_gradient_in_every_form():
    policy, x, _ = problem(1)
    for options in ({}, {"form": "hinge", "gamma": 0.0}, {"form": "hinge2", "gamma": 0.0}, {"gamma": 0.0}):
        v = torch.zeros_like(x, requires_grad=True)
        pen = aajr.aligned_penalty(policy, x, v, **options)
        gradients = torch.autograd.grad(pen, [x, v, *policy.parameters()], allow_unused=True)
        assert pen == 0
        assert all(g is None or g.abs().max() == 0 for g in gradients)


@pytest.mark.parametrize("head", [False, True])
def test_task_loss_and_penalty_share_one_forward(head):
    policy, x, v = problem(2)
    labels = torch.randint(V, (B, T))
    labels[0, 3:] = -100
    calls = []
    policy.up.register_forward_hook(lambda *_: calls.append(1))
    primal, q = expected_q(policy, x, v, "fisher")
    nll = nn.functional.cross_entropy(primal.flatten(0, 1), labels.flatten())
    calls.clear()
    if head:
        pen, loss = aajr.aligned_penalty(
            policy.hidden, x, v, head=policy.head, labels=labels, return_primal=True, reduction="mean"
        )
    else:
        pen, logits = aajr.aligned_penalty(policy, x, v, return_primal=True)
        assert isinstance(logits, torch.Tensor)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert len(calls) == 1
    assert_exact(loss, nll, "cross-entropy")
    same_gradients(0.7 * loss + 1.3 * pen, 0.7 * nll + 1.3 * q.mean(), [x, v, *policy.parameters()])


def test_denominator_divides_the_cross_entropy_of_tokens():
    policy, x, v = problem(1)
    labels = torch.randint(V, (B, T))
    options = dict(head=policy.head, labels=labels, return_primal=True)
    _, mean = aajr.aligned_penalty(policy.hidden, x, v, **options)
    _, part = aajr.aligned_penalty(policy.hidden, x, v, denominator=40, **options)
    assert_exact(part, mean * B * T / 40, "cross-entropy")


def test_head_with_scale_and_softcap():
    policy, x, v = problem(2)
    head = aajr.LMHead(policy.head.weight, policy.head.bias, scale=0.5, softcap=3.0)
    func = lambda h: 3.0 * torch.tanh(policy(h) * 0.5 / 3.0)
    _, q = expected_q(func, x, v, "fisher")
    pen = aajr.aligned_penalty(policy.hidden, x, v, head=head)
    assert_exact(pen, q.mean(), "penalty")
    same_gradients(pen, q.mean(), [x, v, *policy.parameters()])


def test_a_model_output_is_measured_by_its_logits():
    policy, x, v = problem(1)
    func = lambda d: SimpleNamespace(logits=policy(d))
    assert torch.equal(aajr.aligned_penalty(func, x, v), aajr.aligned_penalty(policy, x, v))


class Cache:
    """Something that pytree does not know, as the key-value cache in a model's output."""

    def __init__(self, layers):
        self.layers = layers


def test_the_primal_holds_no_dual_where_pytree_cannot_look():
    policy, x, v = problem()

    def func(d):
        hidden = policy.hidden(d)
        return SimpleNamespace(logits=policy.head(hidden), cache=Cache([Cache(hidden)]), size=3)

    _, output = aajr.aligned_penalty(func, x, v, return_primal=True)
    assert type(output.logits) is torch.Tensor and output.size == 3
    torch.testing.assert_close(output.cache.layers[0].layers, policy.hidden(x), rtol=0, atol=1e-14)
    assert output.cache.layers[0].layers.requires_grad


def test_bad_labels():
    policy, x, v = problem()
    options = dict(head=policy.head, return_primal=True)
    with pytest.raises(TypeError, match="labels must be a tensor of class indices, got list"):
        aajr.aligned_penalty(policy.hidden, x, v, labels=[1], **options)
    labels = torch.zeros(B, T, dtype=torch.long, device="meta")
    with pytest.raises(ValueError, match="labels must be on the device of the hidden states"):
        aajr.aligned_penalty(policy.hidden, x, v, labels=labels, **options)


def test_gradient_against_finite_differences_of_the_penalty():
    policy, x, v = problem(1)
    parameters = dict(policy.named_parameters())
    directions = {name: torch.randn_like(p) for name, p in parameters.items()}
    value = lambda: aajr.aligned_penalty(policy, x, v, gamma=0.1, form="hinge2")
    gradients = torch.autograd.grad(value(), list(parameters.values()), allow_unused=True)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions.values()) if g is not None)
    assert abs(oracle.finite_difference(value, parameters, directions) / slope.item() - 1) < 1e-7


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(v=torch.randn(B, T, C + 1, dtype=torch.float64)), ValueError, "v must have the shape of x"),
        (dict(v=torch.randn(B, T, C)), TypeError, "v must have the dtype of x"),
        (
            dict(v=torch.zeros(B, T, C, dtype=torch.float64, device="meta")),
            ValueError,
            "v must be on the device of x",
        ),
        (dict(v=torch.zeros(0, B, T, C, dtype=torch.float64)), ValueError, "K = 0"),
        (dict(v=torch.full((B, T, C), math.nan, dtype=torch.float64)), ValueError, "v holds NaN"),
        (dict(x=torch.zeros(B, T, C, dtype=torch.long)), TypeError, "x must be floating point"),
        (dict(x=[1.0]), TypeError, "x must be a torch.Tensor"),
        (dict(metric="kl"), ValueError, "metric must be one of"),
        (dict(form="cubed"), ValueError, "form must be one of"),
        (dict(unit="word"), ValueError, "unit must be one of"),
        (dict(reduction="max"), ValueError, "reduction must be one of"),
        (dict(form="hinge"), ValueError, "gamma must be given"),
        (dict(gamma=-1.0), ValueError, "gamma must be a finite number"),
        (dict(gamma=math.nan), ValueError, "gamma must be a finite number"),
        (dict(denominator=3, reduction="sum"), ValueError, "denominator applies to"),
        (dict(denominator=0), ValueError, "denominator must be positive"),
        (dict(mask=torch.ones(B, T)), TypeError, "mask must be a bool or integer"),
        (dict(mask=torch.ones(B, T + 1, dtype=torch.bool)), ValueError, "mask must have shape"),
        (
            dict(labels=torch.zeros(B, T, dtype=torch.long), return_primal=True),
            ValueError,
            "labels need head=",
        ),
        (dict(labels=torch.zeros(B, T, dtype=torch.long)), ValueError, "return_primal=True returns: pass it"),
        (dict(func=lambda d: d.detach()), ValueError, "does not depend on its input x"),
        (dict(func=lambda d: torch.ones(B, T, V)), ValueError, "does not depend on its input x"),
        (dict(func=lambda d: d.sum()), ValueError, "at least one axis"),
        (dict(func=lambda d: (d, d)), TypeError, "func must return a tensor or a model output with .logits"),
        (dict(func=lambda d: SimpleNamespace(last_hidden_state=d)), TypeError, "with head="),
        (
            dict(func=lambda d: SimpleNamespace(logits=d), head=nn.Linear(C, V)),
            TypeError,
            "func must return hidden",
        ),
        (dict(head=nn.Tanh()), TypeError, "head must be an LMHead"),
    ],
)
def test_bad_input_is_one_sentence_that_names_the_argument(change, error, message):
    policy, x, v = problem(1)
    arguments = dict(func=policy, x=x, v=v[0]) | change
    with pytest.raises(error, match=message) as raised:
        aajr.aligned_penalty(**arguments)
    assert "\n" not in str(raised.value)


def test_directions_with_different_numbers_meet():
    policy, x, v = problem(2)
    other = aajr.dual(x.detach(), torch.randn(3, B, T, C, dtype=torch.float64))
    with pytest.raises(ValueError, match="2 and 3 tangents"):
        aajr.aligned_penalty(lambda d: policy(d) + policy(other), x, v)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(weight=torch.ones(3)), ValueError, "weight of LMHead must be"),
        (dict(weight=None), TypeError, "weight of LMHead must be a plain tensor"),
        (dict(weight=torch.ones(3, 2), bias=torch.ones(2)), ValueError, "bias of LMHead"),
        (dict(weight=torch.ones(3, 2), softcap=0.0), ValueError, "softcap of LMHead"),
    ],
)
def test_bad_heads(arguments, error, message):
    with pytest.raises(error, match=message):
        aajr.LMHead(**arguments)


def test_two_runs_are_bitwise_equal():
    policy, x, v = problem(2, torch.float32)
    runs = []
    for _ in range(2):
        pen = aajr.aligned_penalty(policy.hidden, x, v, head=policy.head)
        runs.append([pen, *torch.autograd.grad(pen, [x, v, *policy.parameters()], allow_unused=True)])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*runs))


def test_cotangents_of_a_single_token_are_known_before_the_backward():
    """A hidden state without a batch is one unit, also where a sequence is."""
    for unit in ("token", "sequence"):
        options = PenaltyOptions(gamma=0.5, unit=unit)
        expected = expected_cotangents(Dual(torch.randn(3, C)), options, None)
        q = torch.tensor([0.1, 4.0], requires_grad=True)
        assert expected is not None
        (gradient,) = torch.autograd.grad(options.reduce(q), q)
        assert torch.equal(expected(q.detach(), slice(None))[0], gradient)
