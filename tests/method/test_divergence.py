"""Streamed KL of two language-model outputs: values and all gradients against float64 by hand, memory counted."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_exact, assert_within_budget
from ops.test_head import Watch
from torch import nn

import aajr_kernels as aajr
from aajr_kernels import Dual, LMHead, UnsupportedOperation, coverage, dual, lm_kl
from aajr_kernels.ops.head import divergence

V = 37


def by_hand(p, q, w, b, v, c, *, scale=1.0, softcap=None, q_scale=1.0, q_softcap=None):
    """KL per token from probabilities in memory."""

    def log_softmax(h, w, b, scale, softcap):
        z = scale * (h @ w.t() + b)
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return z - z.logsumexp(-1, keepdim=True)

    log_p, log_q = log_softmax(p, w, b, scale, softcap), log_softmax(q, v, c, q_scale, q_softcap)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def problem(*batch, near=None, shared=False, dtype=torch.float64, vocabulary=V, p_size=6, q_size=4):
    """p, q, weight and bias of p, weight and bias of q; `near`: the distance of q from p."""
    q_size = p_size if shared or near is not None else q_size
    p, w, b = torch.randn(*batch, p_size), torch.randn(vocabulary, p_size), torch.randn(vocabulary)
    q, v, c = torch.randn(*batch, q_size), torch.randn(vocabulary, q_size), torch.randn(vocabulary)
    if near is not None:
        q, v, c = p + near * q, w, b
    if shared:
        v, c = w, b
    return [t.to(dtype) for t in (p, q, w, b, v, c)]


def compare(operands, *, frozen=False, mask=None, tolerance=1e-12, **options):
    """Value and gradients of p and q, and unless `frozen` of both heads."""
    is_shared = operands[4] is operands[2]
    leaves = [t.clone().requires_grad_(i < 2 or not frozen) for i, t in enumerate(operands)]
    if is_shared:
        leaves[4:] = leaves[2:4]
    p, q, w, b, v, c = leaves
    head = LMHead(w, b, options.get("scale", 1.0), options.get("softcap"))
    q_head = None if is_shared else LMHead(v, c, options.get("q_scale", 1.0), options.get("q_softcap"))
    if is_shared:
        options |= {f"q_{name}": value for name, value in options.items()}
    ours, want = lm_kl(p, q, head=head, q_head=q_head, mask=mask), by_hand(*leaves, **options)
    if mask is not None:
        want = want * mask
    assert_exact(ours, want, "KL", tolerance=tolerance, floor=1e-9)
    bar = torch.randn_like(want)
    wanted = [t for i, t in enumerate(leaves) if t.requires_grad and not (is_shared and i > 3)]
    for i, (a, e) in enumerate(
        zip(torch.autograd.grad(ours, wanted, bar), torch.autograd.grad(want, wanted, bar))
    ):
        assert_exact(a, e, f"gradient {i}", tolerance=tolerance, floor=1e-9)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, dict(scale=0.3), dict(softcap=2.0), dict(scale=-1.5, softcap=3.0, q_softcap=4.0, q_scale=2.0)],
)
def test_values_and_gradients(options, shared, frozen):
    if shared:
        options = {name: value for name, value in options.items() if not name.startswith("q_")}
    compare(problem(3, 5, shared=shared), frozen=frozen, **options)
    masked = torch.rand(3, 5) < 0.6
    compare(problem(3, 5, shared=shared), frozen=frozen, mask=masked, **options)


@pytest.mark.parametrize("batch", [(), (1,), (0,), (2, 1, 3)])
@pytest.mark.parametrize("vocabulary", [1, 2, 123])
def test_shapes(batch, vocabulary):
    compare(problem(*batch, vocabulary=vocabulary))
    compare(problem(*batch, vocabulary=vocabulary), frozen=True)


def test_every_way_to_cut_the_tiles(monkeypatch):
    for elements, tokens, kept in ((4, 3, 1), (64, 4, 100), (1 << 20, 512, 1 << 22)):
        monkeypatch.setattr(divergence, "_TILE", {"cpu": elements})
        monkeypatch.setattr(divergence, "_LEAST_COLUMNS", 5)
        monkeypatch.setattr(divergence, "_TILE_TOKENS", {"cpu": tokens})
        monkeypatch.setattr(divergence, "_KEPT", {"cpu": kept})
        for frozen in (False, True):
            compare(problem(11), frozen=frozen)
            compare(problem(11, shared=True), frozen=frozen, softcap=3.0)
            # logits that grow and fall, so that chunks replace the largest one
            large = problem(11)
            large[3], large[5] = torch.linspace(0, 60, V).double(), torch.linspace(50, 0, V).double()
            compare(large, frozen=frozen)


def test_only_the_gradients_that_are_wanted():
    values = problem(5)
    for names in ({0}, {1}, {2}, {3}, {4}, {5}, {0, 5}, {1, 2}):
        leaves = [t.clone().requires_grad_(i in names) for i, t in enumerate(values)]
        p, q, w, b, v, c = leaves
        lm_kl(p, q, head=LMHead(w, b), q_head=LMHead(v, c)).sum().backward()
        by_hand(
            *(held := [t.detach().requires_grad_(i in names) for i, t in enumerate(values)])
        ).sum().backward()
        assert {i for i, t in enumerate(leaves) if t.grad is not None} == names
        for i in names:
            assert_exact(leaves[i].grad, held[i].grad, str(i), tolerance=1e-12, floor=1e-9)


def test_equal_outputs_have_no_divergence_and_no_gradient():
    p, _, w, b, *_ = problem(4, 3, dtype=torch.float32)
    q = p.clone().requires_grad_()
    kl = lm_kl(p, q, head=LMHead(w, b))
    assert torch.equal(kl, torch.zeros(4, 3))
    assert torch.equal(torch.autograd.grad(kl.sum(), q)[0], torch.zeros_like(q))


@pytest.mark.parametrize("frozen", [False, True])
def test_digits_close_to_zero(frozen):
    """Where log p − log q is smaller than the rounding of log p the plain formula in float32 knows nothing."""
    operands = problem(7, near=1e-4, dtype=torch.float32)
    results = []
    for dtype, kl_of in ((torch.float32, None), (torch.float32, by_hand), (torch.float64, by_hand)):
        p, q, w, b, *_ = (
            t.to(dtype, copy=True).requires_grad_(i < 2 or not frozen) for i, t in enumerate(operands)
        )
        kl = lm_kl(p, q, head=LMHead(w, b)) if kl_of is None else kl_of(p, q, w, b, w, b)
        results.append((kl.detach(), *torch.autograd.grad(kl.sum(), (p, q))))
    for name, ours, plain, exact in zip(("KL", "p", "q"), *results):
        error, of_plain = ((x - exact).norm() / exact.norm() for x in (ours, plain))
        assert error < 1e-2 and (name != "KL" or error < of_plain / 10), (name, error, of_plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", [False, True])
def test_low_precision(dtype, frozen):
    operands = problem(2, 19, dtype=dtype, vocabulary=300, p_size=32, q_size=32)
    for i in (2, 4):
        operands[i] = operands[i] / 6
    results = []
    for wide in (dtype, dtype, torch.float64):
        leaves = [t.to(wide, copy=True).requires_grad_(i < 2 or not frozen) for i, t in enumerate(operands)]
        p, q, w, b, v, c = leaves
        kl = by_hand(*leaves) if results else lm_kl(p, q, head=LMHead(w, b), q_head=LMHead(v, c))
        leaves = [t for t in leaves if t.requires_grad]
        results.append([kl.detach(), *torch.autograd.grad(kl.sum(), leaves)])
    assert results[0][0].dtype == torch.float32
    for i, (ours, eager, exact) in enumerate(zip(*results)):
        assert_within_budget(ours, eager, exact, f"result {i}", ulps=16.0)


def test_sides_of_different_dtypes_and_autocast():
    p, q, w, b, v, c = problem(6)
    low = [t.bfloat16() for t in (q, v, c)]
    ours = lm_kl(p.float(), low[0], head=LMHead(w.float(), b.float()), q_head=LMHead(*low[1:]))
    high = [t.float().double() for t in (p, w, b)]
    exact = by_hand(high[0], low[0].double(), *high[1:], *(t.double() for t in low[1:]))
    assert ours.dtype == torch.float32
    assert_exact(ours, exact, tolerance=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        cast = lm_kl(p.float(), q.float(), head=LMHead(w.float()), q_head=LMHead(v.float()))
    by_cast = lm_kl(p.bfloat16(), q.bfloat16(), head=LMHead(w.bfloat16()), q_head=LMHead(v.bfloat16()))
    assert torch.equal(cast, by_cast)


@pytest.mark.parametrize("frozen", [False, True])
def test_words_without_probability(frozen):
    """A bias of −inf on both sides adds nothing; on the side of q only, p is infinitely far from it."""
    operands = problem(5)
    operands[3][4] = operands[5][4] = -torch.inf
    operands[3][9] = -torch.inf  # p · log p is 0 there, and q gives its mass away
    kept = [i for i in range(V) if i != 4]
    p, q, w, b, v, c = (t.clone().requires_grad_(i < 2 or not frozen) for i, t in enumerate(operands))
    kl = lm_kl(p, q, head=LMHead(w, b), q_head=LMHead(v, c))
    finite = torch.tensor([i for i in kept if i != 9])
    log_p = torch.log_softmax((p @ w.t() + b)[:, finite], -1)
    log_q = torch.log_softmax((q @ v.t() + c)[:, kept], -1)[:, [kept.index(i) for i in finite]]
    want = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert_exact(kl, want, tolerance=1e-12)
    leaves = [t for t in (p, q, w, v) if t.requires_grad]
    for a, e in zip(torch.autograd.grad(kl.sum(), leaves), torch.autograd.grad(want.sum(), leaves)):
        assert_exact(a, e, tolerance=1e-11, floor=1e-9)
    b = b.detach().nan_to_num(neginf=0.0)
    assert (lm_kl(p, q, head=LMHead(w, b), q_head=LMHead(v, c)) == torch.inf).all()


def test_values_that_are_not_finite_show():
    p, q, w, b, v, c = problem(3)
    q[1, 0] = torch.nan
    kl = lm_kl(p, q, head=LMHead(w, b), q_head=LMHead(v, c))
    assert kl.isnan().tolist() == [False, True, False]
    # where nothing counts it does not matter
    mask = torch.tensor([True, False, True])
    assert lm_kl(p, q, head=LMHead(w, b), q_head=LMHead(v, c), mask=mask).isfinite().all()


def test_far_apart():
    """Logits of ±200: weights and ratios beyond the range of float32."""
    z_p, z_q = torch.tensor([[200.0, -200.0, 0.0]]), torch.tensor([[-200.0, 200.0, 0.0]])
    kl = lm_kl(z_p, z_q, head=LMHead(torch.eye(3)))
    assert_exact(kl, torch.tensor([400.0]).double(), tolerance=1e-6)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(64, 300), (7, 1000)])
def test_no_tensor_of_tokens_by_vocabulary(tokens, vocabulary, frozen):
    p, q = torch.randn(2, tokens, 3).unbind(0)
    leaves = [p.clone().requires_grad_(), q.clone().requires_grad_()]
    w = torch.randn(vocabulary, 3, requires_grad=not frozen)
    with Watch() as watch:
        lm_kl(*leaves, head=LMHead(w, softcap=5.0)).sum().backward()
    assert 0 < watch.largest < tokens * vocabulary


@pytest.mark.parametrize("frozen", [False, True])
def test_memory_at_the_size_of_a_small_language_model(frozen):
    tokens, vocabulary, size = 768, 32768, 4
    p, q = (torch.randn(tokens, size, requires_grad=True) for _ in range(2))
    w = torch.randn(vocabulary, size, requires_grad=not frozen)
    with Watch() as watch:
        lm_kl(p, q, head=LMHead(w)).sum().backward()
    logits = 4 * tokens * vocabulary  # bytes of one side, 96 MiB
    assert watch.peak < 80 * 2**20 < logits
    assert watch.largest * 4 < logits / 10


def test_tokens_that_do_not_count_cost_nothing():
    p, q, w, b, *_ = problem(8, 6, near=1.0)
    mask = torch.zeros(8, 6, dtype=torch.bool)
    mask[2, 1] = mask[5, 3] = True
    with coverage() as record:
        lm_kl(p, q, head=LMHead(w, b), mask=mask)
    assert record.flops("lm_kl") == 2 * 2 * 2 * w.numel()
    assert torch.equal(lm_kl(p, q, head=LMHead(w, b), mask=mask & False), torch.zeros(8, 6).double())


def test_of_duals():
    """Without tangents the number itself; with tangents the derivative, against differences of the values."""
    p, q, w, b, *_ = problem(4, 3, near=0.3)
    head, mask = LMHead(w, b, softcap=3.0), torch.rand(4, 3) < 0.7
    plain = lm_kl(p, q, head=head, mask=mask)
    assert torch.equal(lm_kl(Dual(p.unsqueeze(0)), q, head=head, mask=mask), plain)
    direction = torch.randn_like(q)
    for order, keep in ((0, mask), (1, None)):
        at = lambda t: lm_kl(
            *((q + t * direction, p) if order else (p, q + t * direction)), head=head, mask=keep
        )
        moved = dual(q, direction)
        result = lm_kl(*((moved, p) if order else (p, moved)), head=head, mask=keep)
        assert_exact(result.primal, at(0.0), tolerance=1e-11, floor=1e-9)
        assert_exact(result.tangent, (at(1e-5) - at(-1e-5)) / 2e-5, tolerance=1e-7, floor=1e-4)


def test_a_compiled_call_agrees():
    p, q, w, *_ = problem(4, 3)
    mask = torch.rand(4, 3) < 0.5
    call = lambda q: lm_kl(p[..., :4], q, head=LMHead(w[:, :4]), mask=mask)
    leaf = q.clone().requires_grad_()
    compiled = torch.compile(call, backend="eager")(leaf)
    assert_exact(compiled, call(q), tolerance=1e-12, floor=1e-9)
    ours, want = torch.autograd.grad(compiled.sum(), leaf)[0], torch.autograd.grad(call(leaf).sum(), leaf)[0]
    assert_exact(ours, want, tolerance=1e-12, floor=1e-9)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(lambda q: call(q), backend="eager", fullgraph=True)(leaf)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(head=nn.Tanh()), TypeError, "head must be an LMHead"),
        (dict(p="h"), TypeError, "p must be hidden states, a floating-point tensor or a Dual, got str"),
        (dict(p=torch.zeros(2, 3, dtype=torch.long)), TypeError, "p must be hidden states.* got torch.int64"),
        (
            dict(q=torch.zeros(2, 5)),
            ValueError,
            r"q must be \[\*batch, 3\] for a head weight of .* got \(2, 5\)",
        ),
        (
            dict(q=torch.zeros(4, 3)),
            ValueError,
            r"p and q must be of the same tokens on one device, got \(2,\)",
        ),
        (dict(q_head=nn.Linear(3, 8)), ValueError, "both heads must have the same vocabulary .* got 7 and 8"),
        (dict(head=nn.Linear(3, 7).double()), RuntimeError, "the head of p must have the dtype of p"),
        (dict(mask=torch.ones(2)), TypeError, r"mask must be a bool or integer tensor \(nonzero = counts\)"),
        (dict(mask=torch.ones(3).bool()), ValueError, r"mask must have shape \(2,\)"),
    ],
)
def test_bad_input(change, error, message):
    arguments = dict(p=torch.zeros(2, 3), q=torch.zeros(2, 3), head=nn.Linear(3, 7)) | change
    with pytest.raises(error, match=message):
        lm_kl(arguments.pop("p"), arguments.pop("q"), **arguments)


def test_a_second_derivative_raises():
    q = torch.randn(2, 3, requires_grad=True)
    kl = lm_kl(q.detach() + 1, q, head=nn.Linear(3, 7)).sum()
    with pytest.raises(RuntimeError, match="has no derivative"):
        torch.autograd.grad(kl, q, create_graph=True)


def test_a_sharded_weight_is_refused(monkeypatch):
    monkeypatch.setattr("aajr_kernels.method.divergence.sharding.is_dtensor", lambda *_: True)
    with pytest.raises(UnsupportedOperation, match=r"takes whole weights, got a DTensor.*full_tensor"):
        lm_kl(torch.zeros(2, 3), torch.zeros(2, 3), head=nn.Linear(3, 7))
    assert aajr.lm_kl is lm_kl
