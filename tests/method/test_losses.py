"""lm_loss: cross-entropy per batch row from the kernels of the penalty, against float64 by hand."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_exact, assert_within_budget
from torch import nn

import aajr_kernels as aajr

B, N, C, V = 3, 5, 6, 17


def problem(dtype=torch.float64):
    body = nn.Sequential(nn.Linear(C, C), nn.LayerNorm(C), nn.GELU(), nn.Linear(C, C)).to(dtype)
    head = nn.Linear(C, V).to(dtype)
    x = torch.randn(B, N, C, dtype=dtype)
    labels = torch.randint(V, (B, N))
    labels[0, 2:], labels[2] = -100, -100
    return body, head, x, labels


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_values_and_gradient(reduction, capped):
    body, linear, x, labels = problem()
    head = aajr.LMHead(linear.weight, linear.bias, scale=0.5, softcap=3.0) if capped else linear
    logits = lambda z: 3 * torch.tanh(linear(body(z)) * 0.5 / 3) if capped else linear(body(z))

    def by_hand(z):
        log_p = logits(z) - logits(z).logsumexp(-1, keepdim=True)
        rows = []
        for b in range(B):
            terms = [-log_p[b, i, labels[b, i]] for i in range(N) if labels[b, i] >= 0]
            total = sum(terms, z.new_zeros(()))
            rows.append(total / max(len(terms), 1) if reduction == "mean" else total)
        return torch.stack(rows)

    loss = aajr.lm_loss(body, head=head, labels=labels, reduction=reduction)
    x.requires_grad_()
    assert_exact(loss(x), by_hand(x), "loss")
    assert loss(x)[2] == 0
    leaves = [x, *body.parameters(), *linear.parameters()]
    for probe in (
        torch.ones(B, dtype=x.dtype),
        torch.rand(B, dtype=x.dtype),
    ):  # as expected by the head, and not
        ours = torch.autograd.grad((loss(x) * probe).sum(), leaves)
        theirs = torch.autograd.grad((by_hand(x) * probe).sum(), leaves)
        for i, (a, b) in enumerate(zip(ours, theirs)):
            assert_exact(a, b, f"gradient {i}", floor=1e-8)
    with torch.no_grad():
        assert_exact(loss(x), by_hand(x), "loss without gradient")


def test_a_label_per_row():
    """Hidden states ``[B, C]``, as of a classifier."""
    body, head, x, _ = problem()
    labels = torch.tensor([3, -100, 11])
    loss = aajr.lm_loss(body, head=head, labels=labels)(x[:, 0])
    assert_exact(loss, nn.functional.cross_entropy(head(body(x[:, 0])), labels, reduction="none"), "loss")


def test_ascent_along_it_is_that_along_the_plain_loss():
    body, head, x, labels = problem()
    plain = lambda z: nn.functional.cross_entropy(
        head(body(z)).transpose(1, 2), labels, reduction="none"
    ).sum(-1)
    loss = aajr.lm_loss(body, head=head, labels=labels, reduction="sum")
    options = dict(radius=0.5, steps=3, step_size=0.2, scope="token")
    ours = aajr.ascend(loss, x, module=[body, head], **options)
    assert_exact(ours.points, aajr.ascend(plain, x, **options).points, "points")
    assert all(p.grad is None and p.requires_grad for p in [*body.parameters(), *head.parameters()])


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_float32_on_every_backend(backend, softcap):
    """The head's own sizes: from 128 hidden units on the Triton kernels keep logits for the backward."""
    if (reason := aajr.backends()[backend]) is not None:
        pytest.skip(reason)
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    x, weight = torch.randn(2, 19, 128), torch.randn(300, 128) / 8
    labels = torch.randint(300, (2, 19))
    labels[1, :4] = -100

    def by_hand(dtype):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, weight)]
        z = leaves[0] @ leaves[1].T
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        loss = nn.functional.cross_entropy(z.transpose(1, 2), labels, reduction="none").sum(-1)
        return [loss, *torch.autograd.grad(loss.sum(), leaves)]

    leaves = [t.to(device, copy=True).requires_grad_() for t in (x, weight)]
    with aajr.use_backend(backend):
        loss = aajr.lm_loss(
            lambda d: d,
            head=aajr.LMHead(leaves[1], softcap=softcap),
            labels=labels.to(device),
            reduction="sum",
        )(leaves[0])
        actual = [loss, *torch.autograd.grad(loss.sum(), leaves)]
    for name, ours, eager, exact in zip(
        ("loss", "x", "weight"), actual, by_hand(torch.float32), by_hand(torch.float64)
    ):
        # the logits are rounded, and the loss is of their size
        assert_within_budget(ours.detach().cpu(), eager.detach(), exact.detach(), name, ulps=16.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(head=nn.Tanh()), TypeError, "head must be an LMHead"),
        (dict(labels=[1]), TypeError, "labels must be a tensor of class indices"),
        (dict(labels=torch.zeros(B, N)), TypeError, "labels must be a tensor of class indices"),
        (dict(reduction="max"), ValueError, "reduction must be one of mean, sum, got 'max'"),
        (
            dict(func=lambda d: d.detach()),
            TypeError,
            "func must return hidden states that depend on its argument",
        ),
        (dict(labels=torch.zeros(B, N + 1, dtype=torch.long)), ValueError, "labels must have shape"),
    ],
)
def test_bad_input(change, error, message):
    body, head, x, labels = problem()
    arguments = dict(func=body, head=head, labels=labels) | change
    with pytest.raises(error, match=message):
        aajr.lm_loss(arguments.pop("func"), **arguments)(x)
