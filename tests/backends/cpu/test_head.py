"""The streamed head on every CPU capability: tiles of all sizes, strides, chunks, threads and memory.

tests/ops/test_head.py holds the mathematics; here the same results are asked for where the kernels cut them up.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_exact, assert_within_budget

from aajr_kernels import Dual, use_backend
from aajr_kernels.backends import cpu as native
from aajr_kernels.ops.head import METRICS, lm_head_sensitivity
from aajr_kernels.testing.oracle import metric_values

pytest.importorskip("aajr_kernels._native")


def written_out(h, w, b, metric, scale, softcap, labels):
    """Rows of q and nll from logits in memory, in the dtype of the arguments."""
    z = h @ w.t()
    z = torch.cat([z[:1] + (0.0 if b is None else b), z[1:]]) * scale
    if softcap is not None:
        t = torch.tanh(z[:1] / softcap)
        z = torch.cat([softcap * t, z[1:] * (1 - t * t)])
    z = z if z.dtype == torch.float64 else z.float()
    if metric == "l2":
        q = (h[1:] if h.dtype == torch.float64 else h[1:].float()).square().sum(-1)
    else:
        q = metric_values(z[0], z[1:], metric)
    if labels is None:
        return q
    return torch.cat([q, F.cross_entropy(z[0], labels, reduction="none")[None]])


def ours(h, w, b, metric, scale, softcap, labels):
    options = dict(metric=metric, scale=scale, softcap=softcap, labels=labels)
    with use_backend("native"):
        result = lm_head_sensitivity(Dual(h), w, b, **options)
    return result if labels is None else torch.cat([result[0], result[1][None]])


def results(run, tensors, cotangent, *options):
    """Output and gradients, the tensors' strides kept."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = run(*leaves, *options)
    differentiated = [t for t in leaves if t is not None]
    gradients = torch.autograd.grad(y, differentiated, cotangent.to(y.dtype), allow_unused=True)
    return [y.detach(), *(torch.zeros_like(t) if g is None else g for t, g in zip(differentiated, gradients))]


def compare(tensors, metric, scale=1.0, softcap=None, labels=None, ulps=8.0):
    options = (metric, scale, softcap, labels)
    stacks, tokens, _ = tensors[0].shape
    cotangent = torch.randn(stacks - 1 + (labels is not None), tokens)
    got = results(ours, tensors, cotangent, *options)
    eager = results(written_out, tensors, cotangent, *options)
    wide = [None if t is None else t.double() for t in tensors]
    exact = results(written_out, wide, cotangent.double(), *options)
    names = ("q and nll", "hidden", "weight", "bias")
    for name, mine, theirs, want in zip(names, got, eager, exact):
        floor = 1e-3 * max(1.0, want.numel() ** 0.5)
        assert_within_budget(mine, theirs, want, name, ulps=ulps, floor=floor)
    return got


def problem(tokens, words, size, k=1, dtype=torch.float32, bias=True):
    h, w = torch.randn(1 + k, tokens, size), torch.randn(words, size) * max(size, 1) ** -0.5
    return [h.to(dtype), w.to(dtype), torch.randn(words).to(dtype) if bias else None]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("options", [{}, dict(scale=0.3, softcap=2.0)])
@pytest.mark.parametrize(
    ("tokens", "words", "size"), [(1, 1, 1), (37, 507, 37), (252, 37, 1), (40, 150, 400)]
)
def test_sizes(vectors, metric, k, options, tokens, words, size):
    labels = torch.randint(words, (tokens,)) if tokens % 2 else None
    if labels is not None and tokens > 1:
        labels[::5] = -100
    compare(problem(tokens, words, size, k), metric, labels=labels, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", METRICS)
def test_low_dtypes(vectors, dtype, metric):
    labels = torch.randint(507, (37,))
    compare(problem(37, 507, 65, 3, dtype, bias=False), metric, labels=labels, softcap=5.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_are_read_in_place(vectors, dtype, monkeypatch):
    tokens, words, size = 21, 50, 19
    h = torch.randn(tokens, 3, size + 5, dtype=dtype).transpose(0, 1)[..., 2 : 2 + size]
    w = torch.randn(2 * words, size + 3, dtype=dtype)[::2, 1 : 1 + size]
    labels = torch.randint(words, (2 * tokens,))[::2]
    bias = torch.randn(words, 2, dtype=dtype)[:, 0]
    assert not h.is_contiguous() and not w.is_contiguous() and native.row_dense(h) is h
    compare([h, w, bias], "fisher", labels=labels)
    compare([torch.randn(1, 1, size).expand(2, tokens, size).to(dtype), w, bias], "probs")
    compare([h.transpose(1, 2).contiguous().transpose(1, 2), w.t().contiguous().t(), None], "fisher")


@pytest.mark.parametrize(("dtype", "metric"), [(torch.float32, "fisher"), (torch.bfloat16, "l2")])
def test_more_tokens_than_a_chunk(dtype, metric, threads):
    threads(2)
    compare(problem(290, 35, 8200, 3, dtype), metric, labels=torch.randint(35, (290,)))


@pytest.mark.parametrize("metric", METRICS)
def test_bitwise_equal_for_every_thread_count(vectors, metric, threads):
    tensors, cotangent = problem(90, 507, 40), torch.randn(2, 90)
    labels = torch.randint(507, (90,))
    for count in (1, 2, 3):
        threads(count)
        runs = [results(ours, tensors, cotangent, metric, 1.0, None, labels) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs))
    compare(tensors, metric, labels=labels)


@pytest.mark.parametrize("metric", ["fisher", "probs"])
def test_tangents_with_an_offset_of_many_deviations(vectors, metric, threads):
    # One-hot hidden states copy columns of the weight: the products are exact and only the stream is tested.
    threads(3)
    tokens, words = 6, 4000
    w = torch.randn(words, 2 * tokens)
    w[:, tokens:] += 1000.0
    h = torch.eye(2 * tokens).view(2, tokens, 2 * tokens)
    tensors, cotangent = [h, w, None], torch.rand(1, tokens)
    got = results(ours, tensors, cotangent, metric, 1.0, None, None)
    wide = [h.double(), w.double(), None]
    exact = results(written_out, wide, cotangent.double(), metric, 1.0, None, None)
    assert_exact(got[0], exact[0], "q", tolerance=2e-6)
    assert_exact(got[2], exact[2], "weight", tolerance=5e-6)


def test_offset_of_the_logits(vectors):
    h, w, _ = problem(9, 700, 5)
    compare([h, w, 1000.0 + torch.randn(700)], "fisher", labels=torch.randint(700, (9,)))
    sharp = compare([torch.cat([1e4 * h[:1], h[1:]]), w, None], "fisher")
    assert all(torch.isfinite(t).all() for t in sharp)


@pytest.mark.parametrize("metric", ["fisher", "probs"])
def test_words_that_are_excluded(vectors, metric, threads):
    threads(3)
    h, w, b = problem(20, 600, 7, 2)
    b[:250], b[400:] = -torch.inf, -torch.inf  # the first and the last share hold no word that can be drawn
    cotangent = torch.randn(2, 20)
    got = results(ours, [h, w, b], cotangent, metric, 1.0, None, None)
    kept = [h.double(), w[250:400].double(), b[250:400].double()]
    exact = results(written_out, kept, cotangent.double(), metric, 1.0, None, None)
    assert_exact(got[0], exact[0], "q", tolerance=2e-6)
    assert_exact(got[1], exact[1], "hidden", tolerance=1e-5)
    assert_exact(got[2][250:400], exact[2], "weight", tolerance=1e-5)
    assert not got[2][:250].any() and not got[2][400:].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(vectors, value):
    h, w, _ = problem(5, 40, 6)
    h[0, 2, 3] = value
    q = ours(h, w, None, "fisher", 1.0, None, None)
    assert torch.isnan(q[0]).tolist() == [False, False, True, False, False]
    w[7, 1] = float("nan")
    assert torch.isnan(ours(h, w, None, "logits", 1.0, None, None)).all()


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_nobody_asks_for(vectors, metric):
    tensors, labels = problem(19, 61, 8, 2), torch.randint(61, (19,))
    everything = results(ours, tensors, torch.ones(3, 19), metric, 1.0, 3.0, labels)[1:]
    for needs in ((True, False, False), (False, True, False), (False, False, True), (True, True, False)):
        leaves = [t.clone().requires_grad_(need) for t, need in zip(tensors, needs)]
        ours(*leaves, metric, 1.0, 3.0, labels).sum().backward()
        for leaf, need, want in zip(leaves, needs, everything):
            assert (leaf.grad is not None) == need and (not need or torch.equal(leaf.grad, want))
    for used in (slice(0, 2), slice(2, 3)):  # q alone, nll alone
        leaves = [t.clone().requires_grad_() for t in tensors]
        wide = [t.detach().double().requires_grad_() for t in leaves]
        for run, inputs in ((ours, leaves), (written_out, wide)):
            run(*inputs, metric, 1.0, 3.0, labels)[used].sum().backward()
        for got, want in zip(leaves, wide):
            if want.grad is None:
                assert not got.grad.any()
            else:
                assert_exact(got.grad, want.grad, tolerance=1e-5, floor=1e-3)


def test_empty(vectors):
    h, w, b = (t.requires_grad_() for t in problem(0, 9, 4))
    q, nll = lm_head_sensitivity(Dual(h), w, b, labels=torch.zeros(0, dtype=torch.long))
    (q.sum() + nll.sum()).backward()
    assert q.shape == (1, 0) and h.grad.shape == h.shape and not w.grad.any() and not b.grad.any()
    h, w, b = (t.requires_grad_() for t in problem(3, 9, 0))
    lm_head_sensitivity(Dual(h), w, b).sum().backward()
    assert not b.grad.any()


def test_an_odd_vocabulary_of_a_real_model(threads):
    threads(2)
    compare(problem(7, 50257, 16), "fisher", labels=torch.randint(50257, (7,)))


def test_named_backend_does_not_fall_back():
    with use_backend("native"), pytest.raises(TypeError, match="no kernels for torch.float64"):
        lm_head_sensitivity(Dual(torch.randn(2, 3, 4).double()), torch.randn(9, 4).double())


@pytest.mark.parametrize(
    ("index", "value", "words"),
    [
        (0, torch.zeros(3, 4), r"h must be \[1 \+ K, tokens, size\]"),
        (0, torch.zeros(2, 4, 3).transpose(1, 2), "h must have stride 1 on its last axis"),
        (1, torch.zeros(9, 5), r"weight must have shape \[9, 4\], got \[9, 5\]"),
        (1, torch.zeros(9, 4).bfloat16(), "weight must be float32, got bfloat16"),
        (2, torch.zeros(8), r"bias must have shape \[9\], got \[8\]"),
        (3, torch.zeros(3), "labels must be int64, got float32"),
        (4, torch.zeros(4, 3), r"stats must have shape \[6, 3\]"),
        (5, None, "nll and labels come together"),
        (6, torch.zeros(9), "kept must have at least [0-9]+ elements, got 9"),
        (6, torch.zeros(10000).bfloat16(), "kept must be float32"),
    ],
)
def test_entry_points_check_before_they_touch_memory(index, value, words):
    tensors = [torch.zeros(2, 3, 4), torch.zeros(9, 4), torch.zeros(9), torch.zeros(3, dtype=torch.long)]
    tensors += [torch.zeros(6, 3), torch.zeros(3), None]
    native.call("head_fwd", tuple(tensors), (2, -100), (1.0, 0.0))
    tensors[index] = value
    with pytest.raises(ValueError, match=words):
        native.call("head_fwd", tuple(tensors), (2, -100), (1.0, 0.0))


MEASURE = """
import torch
from aajr_kernels import Dual
from common.meter import measure
from aajr_kernels.ops.head import lm_head_sensitivity
torch.set_num_threads(2)
def run(tokens, words, size):
    h = torch.randn(2, tokens, size, requires_grad=True)
    w = torch.randn(words, size).mul_(0.05).requires_grad_()
    def step():
        lm_head_sensitivity(Dual(h), w, expected=EXPECTED).mean().backward()
    _, cost = measure(step, h.device)
    gradients = 4 * (h.numel() + w.numel())
    return -1 if cost.peak_bytes is None else cost.peak_bytes - gradients
run(8, 100, 16)
print(run(512, 32000, 96))
"""


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer keeps memory of its own")
@pytest.mark.parametrize(
    ("expected", "megabytes"),
    [
        ("None", 32),
        pytest.param("lambda q, rows: (torch.ones_like(q), None)", 64, marks=pytest.mark.slow),
    ],
)
def test_memory_beside_the_gradients(expected, megabytes):
    script = MEASURE.replace("EXPECTED", expected)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    extra = int(done.stdout)
    if extra < 0:
        pytest.skip("this system does not tell the resident memory of a process (/proc/self/statm)")
    assert extra < megabytes * 2**20  # the logits and their tangents would take 128
