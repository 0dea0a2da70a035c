"""The streamed head in Triton where its kernels cut the work up: blocks, shares, groups, chunks; and its memory.

tests/ops/test_suite.py holds the mathematics for every backend.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_exact, assert_within_budget
from ops.op_checks import record_calls
from torch.utils._python_dispatch import TorchDispatchMode

from aajr_kernels import Dual, LMHead, aligned_penalty, use_backend
from aajr_kernels.backends import choice
from aajr_kernels.backends.triton import launch as gpu
from aajr_kernels.ops.head import lm_head_sensitivity
from aajr_kernels.testing.budgets import gradient_floors
from aajr_kernels.testing.oracle import metric_values

pytest.importorskip("triton")

from aajr_kernels.ops.head import function, triton_config, triton_launch
from aajr_kernels.ops.head import triton as kernels

pytestmark = pytest.mark.skipif(
    choice.backends()["triton"] is not None, reason=f"triton: {choice.backends()['triton']}"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
T, V, C = 70, 130, 40


@pytest.fixture
def small(monkeypatch):
    """Several blocks of words in a share of the vocabulary, several chunks of cotangents, small blocks kept."""
    for name, value in (("_MOST_SPLITS", 2), ("_CHUNK", 1), ("_LEAST_COLUMNS", 128)):
        monkeypatch.setattr(triton_launch, name, value)
    for name, value in (("_KEPT_LEAST", 1), ("_KEPT_MOST", 1 << 20), ("_JOINT_SIZE_LOW", 1)):
        monkeypatch.setattr(kernels, name, value)
    monkeypatch.setattr(kernels, "_JOINT_SIZE", {})
    return monkeypatch


def written_out(h, w, b, metric="fisher", scale=1.0, softcap=None, labels=None, mask=None):
    """Rows of q and nll from logits in memory, in the dtype of the arguments."""
    z = h @ w.t()
    z = torch.cat([z[:1] + (0.0 if b is None else b), z[1:]]) * scale
    if softcap is not None:
        t = torch.tanh(z[:1] / softcap)
        z = torch.cat([softcap * t, z[1:] * (1 - t * t)])
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    q = metric_values(z[0].to(wide), (h if metric == "l2" else z)[1:].to(wide), metric)
    q = q if mask is None else torch.where(mask, q, 0.0)
    if labels is None:
        return q
    return torch.cat([q, F.cross_entropy(z[0].to(wide), labels, reduction="none")[None]])


def ours(h, w, b, metric="fisher", scale=1.0, softcap=None, labels=None, expected=None, mask=None):
    options = dict(metric=metric, scale=scale, softcap=softcap, labels=labels, expected=expected, mask=mask)
    with use_backend("triton"):
        result = lm_head_sensitivity(Dual(h), w, b, **options)
    return result if labels is None else torch.cat([result[0], result[1][None]])


def results(run, tensors, cotangent, **options):
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = run(*leaves, **options)
    differentiated = [t for t in leaves if t is not None]
    gradients = torch.autograd.grad(y, differentiated, cotangent.to(y.dtype), allow_unused=True)
    return [y.detach(), *(torch.zeros_like(t) if g is None else g for t, g in zip(differentiated, gradients))]


def problem(tokens=T, words=V, size=C, k=1, dtype=torch.float32, bias=True):
    h, w = torch.randn(1 + k, tokens, size), torch.randn(words, size) * max(size, 1) ** -0.5
    return [None if t is None else t.to(DEVICE, dtype) for t in (h, w, torch.randn(words) if bias else None)]


def random_labels(tokens=T, words=V):
    labels = torch.randint(words, (tokens,), device=DEVICE)
    labels[::5] = -100
    return labels


def compare(tensors, ulps=8.0, floor=1e-3, expected=None, **options):
    stacks, tokens, _ = tensors[0].shape
    cotangent = torch.randn(stacks - 1 + (options.get("labels") is not None), tokens, device=DEVICE)
    if expected is not None:
        options["expected"] = expected(cotangent)
    got = results(ours, tensors, cotangent, **options)
    options.pop("expected", None)
    eager = results(written_out, tensors, cotangent, **options)
    wide = [None if t is None else t.double() for t in tensors]
    exact = results(written_out, wide, cotangent.double(), **options)
    names = ("q and nll", "hidden", "weight", "bias")
    floors = gradient_floors(dict(zip(names[1:], exact[1:])))
    for name, mine, theirs, want in zip(names, got, eager, exact):
        least = max(floors[name], floor) if name in floors else 0.0
        assert_within_budget(mine, theirs, want, name, ulps=ulps, floor=least)
    return got


@pytest.mark.parametrize("metric", ["fisher", "probs"])
def test_rows_of_the_weight_may_lie_apart(metric):
    h, w, b = problem()
    compare((h, torch.cat([w, w], -1)[:, : w.shape[1]], b), metric=metric)


@pytest.mark.parametrize("metric", ["l2", "logits", "fisher", "probs"])
def test_several_shares_chunks_and_blocks(small, metric):
    compare(problem(), metric=metric, labels=random_labels())


@pytest.mark.parametrize("metric", ["fisher", "probs"])
def test_shares_are_merged_in_several_steps(small, metric):
    small.setattr(triton_launch, "_MERGED_SHARES", 1)
    small.setattr(triton_launch, "_MOST_SPLITS", 4)
    compare(problem(9, 500), metric=metric, labels=random_labels(9, 500))


def test_a_label_of_another_process_adds_no_logit(monkeypatch):
    """Where the vocabulary is split it is the number beyond the last word; memory holds anything before."""
    h, w, b = problem(9)
    labels = torch.tensor([V, 0, V - 1, V, 5, V, 7, 129, V], device=DEVICE)
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, torch.nan))
    _, nll, _ = kernels.head_fwd(h, w, b, labels, None, "fisher", 1.0, None, -100)
    z = torch.cat([h[0] @ w.t() + b, torch.zeros(9, 1, device=DEVICE)], -1).double()
    torch.testing.assert_close(nll.double(), z[:, :V].logsumexp(-1) - z.gather(1, labels[:, None])[:, 0])


@pytest.mark.parametrize("metric", ["logits", "fisher", "probs"])
def test_scale_and_soft_cap(small, metric):
    compare(problem(tokens=9, k=2), metric=metric, labels=random_labels(9), scale=0.3, softcap=2.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_dtypes_over_chunks(small, dtype):
    compare(problem(dtype=dtype, bias=False), labels=random_labels())


@pytest.mark.parametrize("metric", ["logits", "fisher", "probs"])
def test_more_tangents_than_a_launch_takes(small, metric):
    small.setattr(triton_launch, "TANGENTS", 2)
    compare(problem(tokens=9, k=3), metric=metric, labels=random_labels(9) if metric == "fisher" else None)


@pytest.mark.parametrize("labelled", [False, True])
def test_descriptors_read_what_pointers_read(small, labelled):
    options = dict(labels=random_labels() if labelled else None)
    tensors, cotangent = problem(dtype=torch.bfloat16, bias=False), torch.randn(1 + labelled, T).to(DEVICE)
    runs = []
    for described in (False, True):
        tile = triton_config.Tile(64, 64, 16, 4, 2, described)
        small.setattr(triton_launch, "tile", lambda *_, tile=tile: tile)
        runs.append(results(ours, tensors, cotangent, **options))
    for name, a, b in zip(("output", "hidden", "weight"), *runs):
        assert torch.equal(a, b), name


def test_rows_that_no_descriptor_can_read(small):
    tile = triton_config.Tile(64, 64, 16, 4, 2, True)
    small.setattr(triton_launch, "tile", lambda *_: tile)
    compare(problem(size=37))
    h, w, b = problem()
    compare([torch.randn(T, 2, C + 5, device=DEVICE).transpose(0, 1)[..., 3 : 3 + C], w, b])
    compare([h, torch.randn(C, V, device=DEVICE).t() * 0.2, b])
    compare([torch.randn(2, 1, C, device=DEVICE).expand(2, T, C), w[:, ::2].repeat(1, 2)[:, :C], None])


def test_ignored_labels_have_no_gradient(small):
    h, w, b = problem()
    labels = random_labels()
    nll_bar = torch.full((1, T), float("nan"), device=DEVICE)
    nll_bar[0, labels != -100] = 1.0
    got = results(ours, [h, w, b], torch.cat([torch.ones(1, T, device=DEVICE), nll_bar]), labels=labels)
    assert all(t.isfinite().all() for t in got)
    assert not got[0][1, ::5].any()


def test_gradients_nobody_asks_for(small):
    tensors, labels = problem(tokens=9), random_labels(9)
    cotangent = torch.randn(2, 9, device=DEVICE)
    options = dict(labels=labels)
    everything = results(ours, tensors, cotangent, **options)[1:]
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        leaves = [t.clone().requires_grad_(need) for t, need in zip(tensors, needs)]
        ours(*leaves, **options).backward(cotangent)
        for leaf, need, want in zip(leaves, needs, everything):
            assert (leaf.grad is not None) == need and (not need or torch.equal(leaf.grad, want))
    for used in (slice(0, 1), slice(1, 2)):  # q alone, nll alone
        leaves = [t.clone().requires_grad_() for t in tensors]
        wide = [t.detach().double().requires_grad_() for t in leaves]
        for run, inputs in ((ours, leaves), (written_out, wide)):
            run(*inputs, **options)[used].sum().backward()
        for got, want in zip(leaves, wide):
            assert_exact(got.grad, want.grad, tolerance=1e-5, floor=1e-3)


@pytest.mark.parametrize("metric", ["fisher", "probs"])
def test_tangents_with_an_offset_of_many_deviations(small, metric):
    # One-hot hidden states copy columns of the weight: products of float32 are exact and only the stream is tested.
    small.setattr(gpu, "_TF32X3", ())
    tokens, words = 6, 700
    w = torch.randn(words, 2 * tokens)
    w[:, tokens:] += 1000.0
    h = torch.eye(2 * tokens).view(2, tokens, 2 * tokens)
    tensors = [h.to(DEVICE), w.to(DEVICE), None]
    cotangent = torch.rand(1, tokens, device=DEVICE)
    got = results(ours, tensors, cotangent, metric=metric)
    wide = [None if t is None else t.double() for t in tensors]
    exact = results(written_out, wide, cotangent.double(), metric=metric)
    assert_exact(got[0], exact[0], "q", tolerance=2e-6)
    assert_exact(got[2], exact[2], "weight", tolerance=5e-6)


def test_large_logits(small):
    h, w, _ = problem(tokens=9)
    compare([h, w, 1000.0 + torch.randn(V, device=DEVICE)], labels=torch.randint(V, (9,), device=DEVICE))
    # one word has all the probability: centred tangents are rounding errors of tangents of size 1
    assert all(t.isfinite().all() for t in compare([torch.cat([1e4 * h[:1], h[1:]]), w, None], floor=1.0))


@pytest.mark.parametrize("metric", ["fisher", "probs"])
def test_words_that_are_excluded(small, metric):
    h, w, b = problem(tokens=9, k=2)
    b[:66], b[110:] = -torch.inf, -torch.inf  # whole blocks and shares hold no word that can be drawn
    cotangent = torch.randn(2, 9, device=DEVICE)
    got = results(ours, [h, w, b], cotangent, metric=metric)
    kept = [h.double(), w[66:110].double(), b[66:110].double()]
    exact = results(written_out, kept, cotangent.double(), metric=metric)
    assert_exact(got[0], exact[0], "q", tolerance=2e-6)
    assert_exact(got[1], exact[1], "hidden", tolerance=1e-5)
    assert_exact(got[2][66:110], exact[2], "weight", tolerance=1e-5)
    assert not got[2][:66].any() and not got[2][110:].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:All-NaN slice")
def test_what_is_not_finite_stays_in_its_row(small, value):
    h, w, _ = problem(tokens=5)
    h[0, 2, 3] = value
    assert torch.isnan(ours(h, w, None)[0]).tolist() == [False, False, True, False, False]
    w[7, 1] = float("nan")
    assert torch.isnan(ours(h, w, None, metric="logits")).all()


def test_empty(small):
    for tokens, size in ((0, 4), (3, 0)):
        h, w, b = (t.requires_grad_() for t in problem(tokens, 9, size))
        labels = torch.zeros(tokens, dtype=torch.long, device=DEVICE)
        y = ours(h, w, b, labels=labels)
        y.sum().backward()
        assert y.shape == (2, tokens) and h.grad.shape == h.shape and w.grad.shape == w.shape
        assert not w.grad.any() and (tokens > 0 or not b.grad.any())


def test_two_runs_are_bitwise_equal(small):
    tensors, cotangent = problem(), torch.randn(2, T, device=DEVICE)
    labels = random_labels()
    runs = [results(ours, tensors, cotangent, labels=labels, metric="probs") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.slow
def test_compiled_in_one_piece(small):
    tensors, labels = problem(tokens=9), random_labels(9)
    cotangent = torch.randn(2, 9, device=DEVICE)
    plain = results(ours, tensors, cotangent, labels=labels)
    compiled = torch.compile(
        lambda h, w, b: torch.cat([t.view(1, 9) for t in lm_head_sensitivity(Dual(h), w, b, labels=labels)]),
        fullgraph=True,
        backend="aot_eager",
    )
    with use_backend("triton"):
        assert all(torch.equal(a, b) for a, b in zip(results(compiled, tensors, cotangent), plain))


@pytest.fixture
def passes(monkeypatch):
    """Names of the head's functions, in the order they ran."""
    return record_calls(monkeypatch, kernels, ("head_fwd", "head_bwd", "head_joint"))


@pytest.mark.parametrize(
    ("metric", "dtype", "blocks"),
    [
        ("logits", torch.float32, 2),
        ("fisher", torch.float32, 1),
        ("fisher", torch.bfloat16, 2),
        ("probs", torch.bfloat16, 1),
        ("probs", torch.float32, 2),
    ],
)
def test_joint_within_the_same_budget(small, passes, metric, dtype, blocks):
    tokens = 150
    small.setattr(kernels, "_KEPT_LEAST", 1 << 30 if blocks == 1 else 4 * 2 * 256 * 128)
    if blocks == 1:
        small.setattr(kernels, "_KEPT_MOST", 1 << 30)
    else:
        small.setattr(kernels, "_KEPT_MOST", 4 * 2 * 256 * 128)
    options = dict(metric=metric, labels=random_labels(tokens), softcap=4.0 if metric == "fisher" else None)
    expected = lambda bars: lambda q, rows: (2.0 * bars[:1, rows], 2.0 * bars[1, rows])
    compare(problem(tokens, dtype=dtype), expected=expected, **options)
    assert passes == ["head_joint"]


def test_joint_is_left_out_where_it_cannot_be_used(small, passes):
    expected = lambda q, rows: (torch.ones_like(q), None)
    assert kernels._tokens_of_a_block(2, 1000, torch.empty(10**7, 1, device="meta"), False) == 0
    h, w, b = (t.requires_grad_() for t in problem(tokens=20))
    ours(h, w, b, metric="l2", expected=expected).sum().backward()
    small.setattr(kernels, "_JOINT_SIZE_LOW", 1000)
    ours(h, w, b, expected=expected).sum().backward()
    assert passes.count("head_fwd") == 2 and passes.count("head_bwd") == 2


def test_a_captured_head_keeps_its_logits_and_checks_its_cotangents_on_the_device(small, passes):
    """No value is read: the gradients are scaled by a factor on the device, which asserts that there is one."""
    small.setattr(kernels, "_KEPT_LEAST", 1 << 20)
    tensors, labels = problem(tokens=40, dtype=torch.bfloat16), random_labels(40)
    expected = lambda q, rows: (torch.full_like(q, 2.0), torch.ones(q.shape[1], device=DEVICE))
    bars = torch.stack([torch.full((40,), 2.0), torch.ones(40)]).to(DEVICE)
    run = lambda bars: results(ours, tensors, bars, labels=labels, expected=expected)
    outside, none = run(0.3 * bars), run(0.0 * bars)
    with small.context() as patch:
        patch.setattr(function.capture, "is_capturing", lambda device: True)
        patch.setattr(torch.Tensor, "tolist", lambda *_: pytest.fail("read a value"))
        assert all(torch.equal(a, b) for a, b in zip(run(0.3 * bars), outside))
        assert all(torch.equal(a, b) for a, b in zip(run(0.0 * bars), none))
        assert passes == ["head_joint"] * 4
        if DEVICE == "cpu":  # on a device the assertion ends the process
            with pytest.raises(RuntimeError, match=r"other cotangents than its warm-up: capture it again"):
                run(torch.stack([bars[0], 3.0 * bars[1]]))


def test_calls_that_got_other_cotangents_take_two_passes_in_a_graph(small, passes):
    tensors, cotangent = problem(tokens=40), torch.ones(1, 40, device=DEVICE)
    run = lambda: results(ours, tensors, cotangent, expected=lambda q, rows: (torch.rand_like(q), None))
    small.setattr(kernels, "_KEPT_LEAST", 1 << 20)
    small.setattr(function, "_UNEXPECTED", set())
    exact = run()
    assert passes == ["head_joint", "head_bwd"]
    small.setattr(function.capture, "is_capturing", lambda device: True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(run(), exact))
    assert passes[2:] == ["head_fwd", "head_bwd"]


def test_other_cotangents_than_expected_cost_a_pass(small, passes):
    small.setattr(kernels, "_KEPT_LEAST", 1 << 30)
    small.setattr(kernels, "_KEPT_MOST", 1 << 30)
    tensors, cotangent = problem(tokens=20), torch.rand(1, 20, device=DEVICE)
    got = results(ours, tensors, cotangent, expected=lambda q, rows: (torch.ones_like(q), None))
    assert passes == ["head_joint", "head_bwd"]
    for a, b in zip(got, results(ours, tensors, cotangent)):
        assert_exact(a, b, tolerance=1e-6)


def test_a_penalty_brings_what_is_expected(small, passes):
    small.setattr(kernels, "_KEPT_LEAST", 1 << 30)
    small.setattr(kernels, "_KEPT_MOST", 1 << 30)
    h, w, _ = problem(tokens=20)
    labels, mask = random_labels(20), torch.arange(20, device=DEVICE) % 3 > 0
    w.requires_grad_()
    with use_backend("triton"):
        penalty, loss = aligned_penalty(
            lambda d: d, h[0], h[1], head=LMHead(w), labels=labels, mask=mask, gamma=0.1,
            return_primal=True, penalty_weight=0.3,
        )  # fmt: skip
        (loss + 0.3 * penalty).backward()
    assert passes == ["head_joint"]
    got, w.grad = w.grad, None
    with use_backend("triton"):
        penalty, loss = aligned_penalty(
            lambda d: d, h[0], h[1], head=LMHead(w), labels=labels, mask=mask, gamma=0.1, return_primal=True
        )
        (loss + 0.3 * penalty).backward()
    assert_exact(got, w.grad, tolerance=1e-6)


def test_what_is_expected_is_counted_without_waiting_for_the_device():
    """On another device every count stays a tensor: nothing may read a value."""
    from aajr_kernels.method.expected import _factor
    from aajr_kernels.method.options import PenaltyOptions

    q, keep = torch.empty(2, 4, 5, device="meta"), torch.empty(4, 5, dtype=torch.bool, device="meta")
    for unit in ("token", "sequence"):
        assert isinstance(_factor(PenaltyOptions(mask=keep, unit=unit), q), torch.Tensor)
    options = PenaltyOptions(denominator=torch.empty((), device="meta"))
    assert isinstance(_factor(options, q), torch.Tensor)


def test_common_factor_reads_the_device_once(monkeypatch):
    a = torch.rand(3, 5)
    reads = []
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: pytest.fail("a value was read"))
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(1) or tolist(self))
    assert function.common_factor((3.0 * a, None), (a, None)) == pytest.approx(3.0) and len(reads) == 1


class Largest(TorchDispatchMode):
    """Bytes of the tensors that operations made."""

    def __init__(self, known: tuple[torch.Tensor, ...], apart: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.bytes, self.apart = 0, apart
        self.known = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(t, torch.Tensor) or t.untyped_storage()._cdata in self.known:
                continue
            if tuple(t.shape) in self.apart:
                self.known.add(t.untyped_storage()._cdata)
            else:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize(("tokens", "size"), [(128, 2048), (4096, 4096), (16384, 2048)])
@pytest.mark.parametrize("form", ["two passes", "joint", "frozen"])
def test_memory_beside_the_results(monkeypatch, tokens, size, form):
    """At 128 thousand words, with the sizes of real models and nothing computed."""
    monkeypatch.setattr(gpu, "launch", lambda *args, **options: None)
    words, low = 128256, torch.bfloat16
    meta = lambda *shape, dtype=low: torch.empty(shape, dtype=dtype, device="meta")
    h, w, labels = meta(2, tokens, size), meta(words, size), meta(tokens, dtype=torch.int64)
    arguments = (h, w, None, labels, None, "fisher", 1.0, None, -100)
    needs = (True, form != "frozen", False)
    with Largest((h, w, labels), {tuple(h.shape), tuple(w.shape), (2 * tokens, size)}) as largest:
        if form == "two passes":
            q, nll, stats = kernels.head_fwd(*arguments)
            kernels.head_bwd(*arguments, q, nll, stats, *needs)
        else:
            joint = kernels.head_joint(*arguments, lambda q, rows: (q, labels[rows].float()), *needs)
            assert joint is not None
    of_h = h.numel() * h.element_size()
    limit = {"two passes": max(256 << 20, of_h), "joint": 2 << 30, "frozen": max(256 << 20, of_h)}[form]
    assert largest.bytes <= limit
    assert largest.bytes < 2 * tokens * words * 4 or tokens < 1024  # logits and tangents
