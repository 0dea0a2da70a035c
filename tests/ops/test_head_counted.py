"""Tokens of the head that neither the mask nor a label counts: results of the whole, at the price of the others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_exact
from ops.op_checks import forward_mode, record_calls, stacks

import aajr_kernels as aajr
from aajr_kernels import Dual, LMHead, coverage, lm_head_sensitivity
from aajr_kernels.backends import choice
from aajr_kernels.method.baselines import METHODS, baseline_penalty
from aajr_kernels.ops.head import METRICS, reference
from aajr_kernels.ops.head import counted as counting
from aajr_kernels.testing.oracle import metric_values

B, N, C, V = 3, 7, 5, 23
FORMS = ["gathered", "in front"]
NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(bool(choice.backends()["native"]), reason="no native module")
)


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Rows of the tokens that count, or all rows with these in front and their number in a tensor."""
    if request.param == "in front":
        monkeypatch.setattr(counting, "_is_known", lambda device: False)
    return request.param


def selection():
    """A mask and labels that overlap, with a batch row that neither touches."""
    mask, labels = torch.rand(B, N) < 0.4, torch.randint(V, (B, N))
    labels.masked_fill_(torch.rand(B, N) < 0.6, -100)
    mask[1], labels[1] = False, -100
    mask[0, :3], labels[0, :3] = torch.tensor([True, True, False]), torch.tensor([-100, 4, 9])
    return mask, labels


def written_out(h, w, b, metric, mask, labels):
    """q and nll of all tokens from logits in memory, zeros where they do not count."""

    def logits(h, w, b):
        return 3.0 * torch.tanh(0.7 * (h @ w.t() + b) / 3.0)

    z = forward_mode(logits, [h], [w, b]) if len(h) > 1 else logits(h, w, b)
    if len(h) == 1 or metric == "l2":
        q = h[1:].square().sum(-1)
    else:
        q = metric_values(z[0], z[1:], metric)
    q = q if mask is None else torch.where(mask, q, 0.0)
    if labels is None:
        return [q]
    nll = F.cross_entropy(z[0].flatten(0, -2), labels.flatten(), reduction="none", ignore_index=-100)
    return [q, nll.view(labels.shape)]


def gradients(outputs, bars, leaves):
    total = sum((y * bar).sum() for y, bar in zip(outputs, bars, strict=True))
    return torch.autograd.grad(total, leaves, allow_unused=True)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("has", ["mask", "mask, labels", "labels"])
def test_the_whole_with_zeros_where_nothing_counts(form, metric, k, has):
    mask, labels = selection()
    mask, labels = mask if "mask" in has else None, labels if "labels" in has else None
    nothing = torch.ones(B, N, dtype=torch.bool)
    nothing &= True if labels is None else labels == -100
    nothing &= (mask is None and k == 0) if mask is None or k == 0 else ~mask
    w, b = torch.randn(V, C).double(), torch.randn(V).double()
    h = stacks(B, N, C, k=k) if k else torch.randn(1, B, N, C, dtype=torch.float64)
    poisoned = h.detach().clone()
    if not (labels is None and k == 0):
        poisoned[:, nothing] = torch.nan  # nothing there is looked at
    options = dict(metric=metric, scale=0.7, softcap=3.0, labels=labels, mask=mask)
    results = []
    for rows, run in ((poisoned, None), (h, written_out)):
        leaves = [t.detach().clone().requires_grad_() for t in (rows, w, b)]
        if run is None:
            outputs = lm_head_sensitivity(Dual(leaves[0]), *leaves[1:], **options)
            outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        else:
            outputs = run(*leaves, metric, mask, labels)
        generator = torch.Generator().manual_seed(4)
        bars = [torch.rand(y.shape, generator=generator, dtype=y.dtype) + 0.5 for y in outputs]
        results.append([*outputs, *gradients(outputs, bars, leaves)])
    for name, ours, exact in zip(("q", "nll", "h", "w", "b")[-len(results[0]) :], *results, strict=True):
        if exact is None or ours is None:
            assert ours is None or not ours.any(), name
            continue
        assert_exact(ours, exact, name, tolerance=1e-12, floor=1e-9)
    if mask is not None:
        assert not results[0][0][:, ~mask].any()
    if results[0][-3] is not None and nothing.any():
        assert not results[0][-3][:, nothing].any()


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_the_call_with_the_other_rows_left_out(backend, joint, dtype):
    tokens, size, words = 300, 24, 301
    h, w, b = (torch.randn(*shape).to(dtype) for shape in ((2, tokens, size), (words, size), (words,)))
    mask, labels = torch.rand(tokens) < 0.3, torch.randint(words, (tokens,))
    labels.masked_fill_(torch.rand(tokens) < 0.6, -100)
    keep = (labels != -100) | mask
    bars = torch.rand(1, tokens) * mask, torch.rand(tokens)

    def run(h, labels, bars, mask=None):
        leaves = [t.detach().clone().requires_grad_() for t in (h, w, b)]
        expected = (lambda q, at: (bars[0][:, at], bars[1][at])) if joint else None
        with aajr.use_backend(backend):
            outputs = lm_head_sensitivity(
                Dual(leaves[0]), *leaves[1:], labels=labels, mask=mask, expected=expected
            )
        return [*outputs, *torch.autograd.grad(outputs, leaves, bars)]

    whole = run(h, labels, bars, mask)
    part = run(h[:, keep], labels[keep], (bars[0][:, keep], bars[1][keep]))
    part[0] = torch.where(mask[keep], part[0], 0.0)
    for axis, (ours, theirs) in zip((1, 0, 1, None, None), zip(whole, part)):
        assert torch.equal(ours if axis is None else ours[(slice(None),) * axis + (keep,)], theirs)
    assert whole[2][:, keep].any() and not whole[2][:, ~keep].any()


def test_only_rows_that_count_reach_the_kernels(monkeypatch):
    seen = []
    kernels = choice.implementation("head", choice.select_backend("head", torch.zeros(1)))
    for name in ("head_fwd", "head_bwd", "head_joint"):
        if hasattr(kernels, name):
            inner = getattr(kernels, name)
            monkeypatch.setattr(
                kernels, name, lambda h, *args, run=inner: seen.append(h.shape[1]) or run(h, *args)
            )
    x, v, w = torch.randn(2, 50, C), torch.randn(2, 50, C), torch.randn(V, C, requires_grad=True)
    mask, labels = torch.zeros(2, 50, dtype=torch.bool), torch.full((2, 50), -100)
    mask[0, :20], labels[1, :10] = True, 3
    body = torch.nn.Linear(C, C)
    head = LMHead(w)
    calls = {
        30: lambda: sum(
            aajr.aligned_penalty(body, x, v, head=head, labels=labels, mask=mask, return_primal=True)
        ),
        20: lambda: aajr.aligned_penalty(body, x, v, head=head, mask=mask),
        10: lambda: aajr.lm_loss(body, head=head, labels=labels)(x).sum(),
        100: lambda: lm_head_sensitivity(Dual(torch.stack([x, v])), w, labels=labels)[0].sum(),
    }
    for rows, call in calls.items():
        seen.clear()
        with coverage() as cov:
            call().backward()
        assert seen and set(seen) == {rows}
        ((count, flops),) = (entry for key, entry in cov.entries.items() if key[0] == "lm_head_sensitivity")
        assert (count, flops) == (1, 2.0 * (1 if rows == 10 else 2) * rows * C * V)


def test_a_trajectory_and_the_losses_of_its_ascent():
    """Equal to 1e-12 with the same labels and mask by hand: everything counts, zero weights elsewhere."""
    mask, labels = selection()
    body = torch.nn.Sequential(torch.nn.Linear(C, C), torch.nn.Tanh()).double()
    x, w = torch.randn(B, N, C).double(), torch.randn(V, C).double().requires_grad_()
    loss = aajr.lm_loss(body, head=LMHead(w), labels=labels)
    traj = aajr.ascend(loss, x, radius=1.0, steps=2, step_size=0.5, module=body, scope="token")

    def by_hand(x):
        z = body(x) @ w.t()
        nll = F.cross_entropy(z.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
        return nll.view(B, N).sum(1) / (labels != -100).sum(1).clamp(min=1)

    plain = aajr.ascend(by_hand, x, radius=1.0, steps=2, step_size=0.5, module=body, scope="token")
    assert_exact(traj.points, plain.points, tolerance=1e-12)
    penalty, aux = aajr.trajectory_penalty(
        body, x, traj, head=LMHead(w), labels=labels, mask=mask, batch_steps=2, return_primal=True
    )
    ours = torch.autograd.grad(penalty + aux.primal, (w, body[0].weight))
    exact = torch.zeros((), dtype=torch.float64)
    for point, u in zip(traj.points[:-1], traj.directions):
        z, z_tan = aajr.jvp(lambda d: body(d) @ w.t(), (point,), (u,))
        q = metric_values(z, z_tan.unsqueeze(0), "fisher")[0]
        exact = exact + torch.where(mask, q, 0.0).sum() / mask.sum() / 2
    assert_exact(penalty, exact, tolerance=1e-12)
    z = body(traj.points[-2]) @ w.t()
    exact = exact + F.cross_entropy(z.flatten(0, 1), labels.flatten(), ignore_index=-100)
    for a, b in zip(ours, torch.autograd.grad(exact, (w, body[0].weight))):
        assert_exact(a, b, tolerance=1e-12, floor=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_baselines_under_a_mask(method, monkeypatch):
    """As with all tokens computed, and without a logit of those that do not count."""
    mask, labels = selection()
    body, w = torch.nn.Linear(C, C).double(), torch.randn(V, C).double()
    x, u = torch.randn(B, N, C).double(), torch.randn(B, N, C).double()
    formed = []
    logits = LMHead.logits
    monkeypatch.setattr(LMHead, "logits", lambda self, h: formed.append(h.shape) or logits(self, h))

    def penalty(head):
        loss = aajr.lm_loss(body, head=head, labels=labels)
        func = body if head is not None else lambda d: body(d) @ w.t()
        return baseline_penalty(
            *(method, func, x, u),
            loss_fn=loss,
            head=head,
            mask=mask,
            generator=torch.Generator().manual_seed(3),
        )

    ours = penalty(LMHead(w))
    counts = mask if method == "finite_difference" else labels != -100
    assert all(shape[:-1].numel() == counts.sum() for shape in formed)
    monkeypatch.setattr(aajr.method.losses, "counted", lambda *args: None)
    monkeypatch.setattr(aajr.method.baselines, "counted", lambda *args: None)
    monkeypatch.setattr(aajr.ops.head.api, "counted", lambda *args: None)
    assert_exact(ours, penalty(LMHead(w)), tolerance=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_no_token_that_counts(form, metric):
    mask, labels = torch.zeros(B, N, dtype=torch.bool), torch.full((B, N), -100)
    h, w, b = (
        torch.randn(2, B, N, C, requires_grad=True),
        *(torch.randn(*s, requires_grad=True) for s in ((V, C), (V,))),
    )
    q, nll = lm_head_sensitivity(Dual(h), w, b, metric=metric, labels=labels, mask=mask)
    (q.sum() + nll.sum()).backward()
    assert not q.any() and not nll.any()
    assert not any(t.grad.any() for t in (h, w, b) if t.grad is not None)
    body = torch.nn.Linear(C, C)
    x = torch.randn(B, N, C)
    for more in ({}, dict(penalty_weight=0.5)):
        body.zero_grad()
        penalty, loss = aajr.aligned_penalty(
            *(body, x, x), metric=metric, head=LMHead(w), labels=labels, mask=mask, return_primal=True, **more
        )
        (loss + 0.5 * penalty + aajr.lm_loss(body, head=LMHead(w), labels=labels)(x).sum()).backward()
        assert penalty == 0 and loss == 0 and not any(p.grad.any() for p in body.parameters())


def test_a_mask_of_all_tokens_is_no_mask(monkeypatch):
    h, w = torch.randn(2, N, C), torch.randn(V, C)
    monkeypatch.setattr(counting.Counted, "gather", lambda *args: pytest.fail("rows were copied"))
    q = lm_head_sensitivity(Dual(h), w, mask=torch.ones(N, dtype=torch.bool))
    assert torch.equal(q, lm_head_sensitivity(Dual(h), w))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # raised inside Dynamo
@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_compiled_in_one_graph(backend):
    mask, labels = selection()
    h, w = torch.randn(2, B, N, C), torch.randn(V, C)

    def step(h, w, mask, labels):
        q, nll = lm_head_sensitivity(Dual(h), w, mask=mask, labels=labels, softcap=5.0)
        return q.sum() + 0.3 * nll.sum()

    results = []
    with aajr.use_backend(backend):
        for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            for these in (mask, ~mask):
                leaves = [t.clone().requires_grad_() for t in (h, w)]
                y = run(*leaves, these, labels)
                results.append([y.detach(), *torch.autograd.grad(y, leaves)])
    for eager, compiled in zip(results[:2], results[2:]):
        for a, b in zip(eager, compiled):
            assert_exact(b, a, tolerance=1e-6, floor=1e-5)


def test_autocast_casts_rows_that_count():
    h, w, mask = torch.randn(2, 9, C), torch.randn(V, C), torch.arange(9) % 3 == 0
    with torch.autocast("cpu", torch.bfloat16):
        q = lm_head_sensitivity(Dual(h), w, mask=mask)
    alone = lm_head_sensitivity(Dual(h[:, mask].bfloat16()), w.bfloat16())
    assert q.dtype == torch.float32 and torch.equal(q[:, mask], alone) and not q[:, ~mask].any()


@pytest.mark.parametrize(
    ("mask", "error", "words"),
    [
        (torch.ones(N), TypeError, "mask must be a bool tensor.*got torch.float32: pass mask != 0"),
        (torch.ones(N, dtype=torch.long), TypeError, "mask must be a bool tensor.*got torch.int64"),
        ([True] * N, TypeError, "mask must be a bool tensor.*got list"),
        (torch.ones(1, N, dtype=torch.bool), ValueError, r"mask must have shape \(7,\).*got \(1, 7\) on cpu"),
        (
            torch.ones(N, dtype=torch.bool, device="meta"),
            ValueError,
            r"mask must have shape \(7,\).*on cpu, got \(7,\) on meta",
        ),
    ],
)
def test_errors(mask, error, words):
    with pytest.raises(error, match=words):
        lm_head_sensitivity(Dual(torch.randn(2, N, C)), torch.randn(V, C), mask=mask)


def test_the_reference_reads_no_count(monkeypatch):
    """It runs in float64 on devices too: the number of tokens stays there."""
    calls = record_calls(monkeypatch, reference, ("head_fwd", "head_bwd"))
    monkeypatch.setattr(counting, "_is_known", lambda device: False)
    for name in ("__int__", "__index__", "item"):
        monkeypatch.setattr(torch.Tensor, name, lambda self: pytest.fail("a number was read"))
    h, w = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, N, C), (V, C)))
    lm_head_sensitivity(Dual(h), w, mask=torch.arange(N) > 3).sum().backward()
    assert calls == ["head_fwd", "head_bwd"]
