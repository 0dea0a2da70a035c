"""The head and its metric, streamed over the vocabulary."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_exact, assert_within_budget
from ops.op_checks import forward_mode, outcome, stacks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aajr_kernels import Dual, UnsupportedOperation, coverage, dual
from aajr_kernels.ops.head import METRICS, lm_head_sensitivity, reference
from aajr_kernels.testing.oracle import metric_values


def written_out(metric, scale=1.0, softcap=None, labels=None, bias=True):
    """q, and with labels nll as one more row, from logits in memory."""

    def run(inputs, params):
        def logits(h, w, b=None):
            z = scale * (h @ w.t() + (0.0 if b is None else b))
            return z if softcap is None else softcap * torch.tanh(z / softcap)

        z = forward_mode(logits, inputs, params)
        z = z if z.dtype == torch.float64 else z.float()
        if metric == "l2":
            h = inputs[0] if inputs[0].dtype == torch.float64 else inputs[0].float()
            q = h[1:].square().sum(-1)
        else:
            q = metric_values(z[0], z[1:], metric)
        if labels is None:
            return q
        nll = F.cross_entropy(z[0].reshape(-1, z.shape[-1]), labels.flatten(), reduction="none")
        return torch.cat([q, nll.view(1, *labels.shape)])

    return run


def streamed(metric, scale=1.0, softcap=None, labels=None):
    def run(inputs, params):
        bias = params[1] if len(params) > 1 else None
        options = dict(metric=metric, scale=scale, softcap=softcap, labels=labels)
        result = lm_head_sensitivity(Dual(inputs[0]), params[0], bias, **options)
        return result if labels is None else torch.cat([result[0], result[1].unsqueeze(0)])

    return run


def compare(h, params, batch, metric, **options):
    labelled = options.get("labels") is not None
    q_bar = torch.randn(h.shape[0] - 1 + labelled, *batch, dtype=torch.float64)
    ours = outcome(streamed(metric, **options), [h], params, q_bar)
    exact = outcome(written_out(metric, **options), [h], params, q_bar)
    assert_exact(ours[0], exact[0], "q and nll", tolerance=1e-12, floor=1e-12)
    for name, got, want in zip(("hidden", "weight", "bias"), ours[1], exact[1]):
        assert_exact(got, want, name, tolerance=1e-12, floor=1e-9)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("options", [{}, dict(scale=0.3), dict(softcap=2.0), dict(scale=-1.5, softcap=3.0)])
@pytest.mark.parametrize("labelled", [False, True])
def test_against_forward_mode(metric, k, options, labelled):
    batch, vocabulary = (3, 5), 37
    params = [torch.randn(vocabulary, 6).double(), torch.randn(vocabulary).double()]
    labels = None
    if labelled:
        labels = torch.randint(vocabulary, batch)
        labels[0, :2] = -100
    compare(stacks(*batch, 6, k=k), params, batch, metric, labels=labels, **options)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 1, 3)])
@pytest.mark.parametrize("vocabulary", [1, 2, 123])
def test_shapes(metric, batch, vocabulary):
    params = [torch.randn(vocabulary, 5).double()]
    compare(
        stacks(*batch, 5), params, batch, metric, labels=torch.randint(vocabulary, batch or (1,)).view(batch)
    )


def test_every_way_to_cut_the_tiles(monkeypatch):
    params = [torch.randn(61, 4).double(), torch.randn(61).double()]
    labels = torch.randint(61, (11,))
    for tile, rows, columns in ((1, 4, 3), (8, 6, 7), (1 << 20, 1024, 1024)):
        monkeypatch.setattr(reference, "_TILE", tile)
        monkeypatch.setattr(reference, "_TILE_ROWS", rows)
        monkeypatch.setattr(reference, "_TILE_COLUMNS", columns)
        for metric in METRICS:
            compare(stacks(11, 4, k=2), params, (11,), metric, labels=labels)


def test_only_one_of_the_two_results_is_used():
    h, w = stacks(5, 4, k=2), torch.randn(31, 4).double()
    labels = torch.randint(31, (5,))
    for used in (0, 1):
        leaf, weight = h.clone().requires_grad_(), w.clone().requires_grad_()
        result = lm_head_sensitivity(Dual(leaf), weight, labels=labels)[used]
        got = torch.autograd.grad(result.sum(), (leaf, weight))
        both = written_out("fisher", labels=labels)([leaf], [weight])
        want = torch.autograd.grad((both[:-1] if used == 0 else both[-1]).sum(), (leaf, weight))
        for g, x in zip(got, want):
            assert_exact(g, x, tolerance=1e-12)


def test_gradients_nobody_needs_are_skipped():
    values = dict(h=stacks(5, 4), w=torch.randn(31, 4).double(), b=torch.randn(31).double())
    for names in ({"h"}, {"w"}, {"b"}, {"h", "b"}):
        leaves = {n: t.clone().requires_grad_(n in names) for n, t in values.items()}
        lm_head_sensitivity(Dual(leaves["h"]), leaves["w"], leaves["b"]).sum().backward()
        assert {n for n, t in leaves.items() if t.grad is not None} == names


def test_ignored_labels_have_no_loss_and_no_gradient():
    h, w = stacks(4, 5).requires_grad_(), torch.randn(31, 5).double().requires_grad_()
    labels = torch.tensor([3, 7, 30, 7])
    _, nll = lm_head_sensitivity(Dual(h), w, labels=labels, ignore_index=7)
    assert nll[1] == 0 and nll[3] == 0 and nll[0] > 0
    (gradient,) = torch.autograd.grad(nll.sum(), h)
    assert not gradient[:, 1].any() and gradient[0, 0].any() and not gradient[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", METRICS)
def test_low_dtypes(dtype, metric):
    h, params = stacks(33, 64, k=2).to(dtype), [torch.randn(517, 64) * 0.2, torch.randn(517)]
    params = [p.to(dtype) for p in params]
    labels = torch.randint(517, (33,))
    q_bar = torch.rand(3, 33)
    ours = outcome(streamed(metric, labels=labels), [h], params, q_bar)
    eager = outcome(written_out(metric, labels=labels), [h], params, q_bar)
    wide = [p.double() for p in params]
    exact = outcome(written_out(metric, labels=labels), [h.double()], wide, q_bar.double())
    assert ours[0].dtype == torch.float32
    for i in range(3):
        assert_within_budget(ours[0][i], eager[0][i], exact[0][i], f"row {i} of q and nll")
    for got, other, want in zip(ours[1], eager[1], exact[1]):
        assert got.dtype == dtype
        assert_within_budget(got, other, want, "gradient")


@pytest.mark.parametrize("metric", ["fisher", "probs"])
@pytest.mark.parametrize("offset", [1e2, 1e3])
def test_tangents_with_an_offset_of_many_deviations(metric, offset):
    # One-hot hidden states copy columns of the weight, so that the products are exact and only the stream is tested.
    tokens, vocabulary = 6, 4000
    w = torch.randn(vocabulary, 2 * tokens)
    w[:, tokens:] += offset
    h = torch.eye(2 * tokens).view(2, tokens, 2 * tokens)
    q_bar = torch.rand(1, tokens)
    ours = outcome(streamed(metric), [h], [w], q_bar)
    exact = outcome(written_out(metric), [h.double()], [w.double()], q_bar.double())
    assert_exact(ours[0], exact[0], "q", tolerance=5e-6)
    # the gradient of h multiplies by w, whose common offset cancels only up to rounding
    assert_exact(ours[1][1], exact[1][1], "weight gradient", tolerance=2e-5)
    naive = w[:, :tokens].t().softmax(-1)
    tangent = w[:, tokens:].t()
    moments = (naive * tangent**2).sum(-1) - (naive * tangent).sum(-1) ** 2
    if metric == "fisher":
        assert (moments - exact[0][0]).abs().max() > 100 * (ours[0] - exact[0]).abs().max()


def test_an_outlier_in_the_first_chunk_does_not_spoil_the_reference():
    w = torch.randn(4000, 2)
    w[0] = torch.tensor([-20.0, 1e4])  # hardly ever drawn, with a huge tangent
    h = torch.eye(2).view(2, 1, 2)
    exact = written_out("fisher")([h.double()], [w.double()])
    assert_exact(lm_head_sensitivity(Dual(h), w), exact, tolerance=1e-4)


def test_masked_words_and_large_logits():
    h, w = stacks(5, 4, k=2), torch.randn(37, 4).double()
    bias = torch.zeros(37).double()
    bias[:20] = -torch.inf  # the first chunks hold nothing that can be drawn
    for metric in METRICS:
        leaf = h.clone().requires_grad_()
        q = lm_head_sensitivity(Dual(leaf), w, bias, metric=metric)
        (gradient,) = torch.autograd.grad(q.sum(), leaf)
        assert torch.isfinite(gradient).all()
        if metric in ("fisher", "probs"):
            assert_exact(q, written_out(metric)([h], [w[20:]]), tolerance=1e-12)
    sharp = lm_head_sensitivity(Dual(torch.cat([1e4 * h[:1], h[1:]])), w)
    assert torch.isfinite(sharp).all()


def test_finite_differences_of_the_penalty():
    h, w = stacks(3, 4), torch.randn(29, 4).double()
    penalty = lambda w: lm_head_sensitivity(Dual(h), w, softcap=3.0).sum()
    leaf = w.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(penalty(leaf), leaf)
    step = 1e-5 * torch.randn_like(w)
    assert_exact((gradient * step).sum(), (penalty(w + step) - penalty(w - step)) / 2, tolerance=1e-6)


def test_two_runs_are_bitwise_equal():
    h, w = stacks(40, 16, k=2).float(), torch.randn(3001, 16)
    runs = [outcome(streamed("fisher"), [h], [w], torch.ones(2, 40)) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1]))


class Watch(TorchDispatchMode):
    """Largest tensor that any operation returned, and the peak of the memory they held together."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.live, self.peak = 0, 0, 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {
            t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.numel())
                storage = t.untyped_storage()
                key = storage.data_ptr()
                if key not in known and key not in self.seen and storage.nbytes():
                    self.seen.add(key)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self.forget, key, storage.nbytes())
        return result

    def forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("tokens", "vocabulary", "k"), [(64, 300, 1), (64, 300, 4), (7, 1000, 2)])
def test_no_tensor_of_tokens_by_vocabulary(metric, tokens, vocabulary, k):
    h, w = torch.randn(1 + k, tokens, 3, requires_grad=True), torch.randn(vocabulary, 3, requires_grad=True)
    with Watch() as watch:
        q, nll = lm_head_sensitivity(
            Dual(h), w, metric=metric, softcap=5.0, labels=torch.randint(vocabulary, (tokens,))
        )
        (q.sum() + nll.sum()).backward()
    assert 0 < watch.largest < tokens * vocabulary


def test_memory_at_the_size_of_a_small_language_model():
    tokens, vocabulary, size = 512, 49152, 16
    h, w = torch.randn(2, tokens, size, requires_grad=True), torch.randn(vocabulary, size, requires_grad=True)
    with Watch() as watch:
        lm_head_sensitivity(Dual(h), w).sum().backward()
    logits = 4 * tokens * vocabulary  # bytes, 96 MiB; the tangents would need as many
    weight = 4 * vocabulary * size
    assert watch.peak < 4 * weight + 40 * 2**20 < logits
    assert watch.largest * 4 < logits / 20


def test_empty_batch():
    h, w = torch.zeros(2, 0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    q, nll = lm_head_sensitivity(Dual(h), w, labels=torch.zeros(0, dtype=torch.long))
    assert q.shape == (1, 0) and nll.shape == (0,)
    (q.sum() + nll.sum()).backward()
    assert h.grad.shape == h.shape and not w.grad.any()


def test_autocast_runs_the_products_in_the_low_dtype():
    h, w = stacks(3, 8).float(), torch.randn(40, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        q = lm_head_sensitivity(Dual(h), w)
    assert q.dtype == torch.float32
    assert_exact(q, lm_head_sensitivity(Dual(h.bfloat16()), w.detach().bfloat16()))
    q.sum().backward()
    assert w.grad.dtype == torch.float32


def test_coverage():
    with coverage() as cov:
        lm_head_sensitivity(Dual(torch.randn(2, 3, 4).double()), torch.randn(9, 4).double())
    assert cov.entries == {("lm_head_sensitivity", "reference"): [1, 2.0 * 2 * 3 * 4 * 9]}


W = torch.zeros(9, 4)


@pytest.mark.parametrize(
    ("weight", "options", "error", "words"),
    [
        (W, dict(metric="kl"), ValueError, "metric must be one of l2, logits, fisher, probs, got 'kl'"),
        (W, dict(softcap=0.0), ValueError, "softcap must be positive or None, got 0.0"),
        (W.t(), {}, ValueError, r"weight must be \[V, C\]"),
        (W[:0], {}, ValueError, r"weight must be \[V, C\] with V > 0"),
        (W.double(), {}, RuntimeError, "weight must have the dtype of hidden"),
        (W, dict(bias=torch.zeros(4)), ValueError, r"bias must have shape \[9\], got \(4,\)"),
        (W, dict(bias=torch.zeros(9).double()), RuntimeError, "bias must have the dtype"),
        (W, dict(labels=torch.zeros(3)), TypeError, "labels must be integers, got torch.float32"),
        (W, dict(labels=torch.zeros(2, dtype=torch.long)), ValueError, r"labels must have shape \(3,\)"),
        (W, dict(labels=torch.tensor([0, 9, 1])), ValueError, r"labels must lie in \[0, 9\).*got 9"),
        (W, dict(labels=torch.tensor([0, -1, 1])), ValueError, "or equal ignore_index .*got -1"),
        (dual(W, W), {}, UnsupportedOperation, "weight is a Dual"),
        (W, dict(bias=dual(W[:, 0], W[:, 0])), UnsupportedOperation, "bias is a Dual"),
    ],
)
def test_errors(weight, options, error, words):
    with pytest.raises(error, match=words):
        lm_head_sensitivity(Dual(torch.randn(2, 3, 4)), weight, **options)


def test_hidden_without_tangents():
    with pytest.raises(
        TypeError, match="hidden must be a Dual, got Tensor without tangents: compute it from"
    ):
        lm_head_sensitivity(torch.randn(3, 4), W)
