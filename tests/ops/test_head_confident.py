"""Tokens with nearly all probability at one word: every entry of every gradient keeps the digits of float32.

One-hot hidden states copy columns of the weight, whose numbers have 8 bits: products are exact on every backend, and
what is left are the errors of the stream. ż of the likeliest word lies on one side of all others, so that no gradient
is a sum of terms that cancel in exact arithmetic.
"""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from ops.suite import targets

from aajr_kernels.backends import choice
from aajr_kernels.integrations.distributed import head as split
from aajr_kernels.ops.head import METRICS
from aajr_kernels.ops.head.function import HeadFunction
from aajr_kernels.testing.oracle import metric_values

SHARES = (0.99, 0.998, 0.9999, 1 - 1e-5, 1 - 1e-6, 1 - 1e-7)
WORDS = 301
EPS = torch.finfo(torch.float32).eps
#: roundings of one entry: of w² (exp is right to 1.5 units), of sums over words and tiles, and of some ten operations
ROUNDINGS = 32
#: of a logit, in its units in the last place: a product with the scale, and a tanh that is right to 4
OF_A_LOGIT = {(1.0, None): 0, (-1.5, None): 1, (0.5, 30.0): 6}


def confident(k, scale=1.0):
    """Logits before scale and cap ``[1 + K, T, V]`` in float64 whose likeliest word lies in another tile for each."""
    logits = torch.randn(1 + k, len(SHARES), WORDS).double()
    likeliest = torch.tensor([0, 300, 150, 143, 290, 64])
    for token, (word, share) in enumerate(zip(likeliest, SHARES)):
        others = torch.cat([logits[0, token, :word], logits[0, token, word + 1 :]]).logsumexp(0)
        logits[0, token, word] = others + torch.tensor(share / (1 - share)).double().log()
        logits[1:, token, word] = 5.0 + logits[1:, token].amax(-1)
    logits[0] /= scale
    return logits.bfloat16().double(), likeliest


def capped(x, scale, softcap):
    z, slope = scale * x[0], scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
        slope = scale * (1 - (z / softcap) ** 2)
    return z, slope * x[1:]


def exact(logits, labels, metric, scale=1.0, softcap=None):
    """q, nll and the gradients of Σ q and of Σ nll, in float64."""
    leaf = logits.detach().requires_grad_()
    z, z_tan = capped(leaf, scale, softcap)
    q, nll = metric_values(z, z_tan, metric), F.cross_entropy(z, labels, reduction="none")
    (of_q,) = torch.autograd.grad(q.sum(), leaf, retain_graph=True)
    (of_nll,) = torch.autograd.grad(nll.sum(), leaf)
    return {"q": q.detach(), "nll": nll.detach(), "q gradient": of_q, "nll gradient": of_nll}


def operands(logits):
    """Hidden states ``[1 + K, T, C]`` and weight ``[V, C]`` in float32, as wide as the joint form asks for."""
    rows = logits.flatten(0, 1)
    weight = F.pad(rows.t(), (0, 128 - len(rows))).float().contiguous()
    return torch.eye(128)[: len(rows)].view(*logits.shape[:2], 128), weight


def assert_digits(got, want, units):
    for name, values in want.items():
        error = (got[name].double() - values).abs() / values.abs().clamp_min(1e-300)
        error = error.masked_fill((values == 0) & (got[name] == 0), 0.0)
        assert error.max() <= units * EPS, f"{name}: {error.max():.1e}, allowed {units * EPS:.1e}"


def units_of(want_logits, scale, softcap):
    # an error of a logit is one of w, which probs and fisher have squared
    return ROUNDINGS + 2 * OF_A_LOGIT[scale, softcap] * float(want_logits.abs().max())


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cases():
    listed = []
    for target, metric, k in itertools.product(targets("head"), METRICS, (1, 3)):
        marks = [pytest.mark.slow] if target.backend == "triton" and (metric, k) != ("probs", 3) else []
        listed.append(pytest.param(target, metric, k, id=f"{target}-{metric}-{k}", marks=marks))
    return listed


def run(target, logits, labels, metric, scale, softcap, joint=False):
    h, weight = (x.to(target.device) for x in operands(logits))
    tokens, results = logits.shape[1], {}
    for wanted in ("q", "nll"):
        leaf = weight.clone().requires_grad_()

        def expected(q, at, wanted=wanted):
            return torch.full_like(q, wanted == "q"), torch.full_like(q[0], wanted == "nll")

        with target.active():
            q, nll = HeadFunction.apply(
                *(
                    h,
                    leaf,
                    None,
                    labels.to(target.device),
                    None,
                    metric,
                    scale,
                    softcap,
                    -100,
                    target.backend,
                ),
                expected if joint else None,
            )
            zero = 0.0 * (q.sum() + nll.sum())
            (gradient,) = torch.autograd.grad((q if wanted == "q" else nll).sum() + zero, leaf)
        columns = gradient.t()[: logits[..., 0].numel()].cpu().reshape(logits.shape)
        results |= {"q": q.detach().cpu(), "nll": nll.detach().cpu(), f"{wanted} gradient": columns}
    assert results["nll"].shape == (tokens,)
    return results


@pytest.mark.parametrize(("target", "metric", "k"), cases())
@pytest.mark.parametrize(("scale", "softcap"), OF_A_LOGIT)
def test_every_entry_keeps_its_digits(target, metric, k, scale, softcap):
    if reason := target.why_not("head"):
        pytest.skip(reason)
    logits, labels = confident(k, scale)
    want = exact(logits, labels, metric, scale, softcap)
    if metric == "l2":  # of the hidden states, which are one-hot
        want["q"], want["q gradient"] = torch.ones(k, len(SHARES)).double(), torch.zeros_like(logits)
    with threads(3):  # shares of the vocabulary are merged
        got = run(target, logits, labels, metric, scale, softcap)
    assert_digits(got, want, units_of(capped(logits, scale, softcap)[0], scale, softcap))


@pytest.mark.parametrize("metric", ["fisher", "probs"])
@pytest.mark.parametrize("target", targets("head"), ids=str)
def test_logits_that_are_kept(target, metric):
    if reason := target.why_not("head"):
        pytest.skip(reason)
    logits, labels = confident(1, -1.5)
    got = run(target, logits, labels, metric, -1.5, None, joint=True)
    assert_digits(got, exact(logits, labels, metric, -1.5), units_of(logits[0], -1.5, None))


@pytest.mark.parametrize("metric", ["fisher", "probs"])
@pytest.mark.parametrize("wanted", ["q", "nll"])
def test_only_one_result_is_used(metric, wanted):
    """A backward with fewer stacks than the forward forms the same logits."""
    logits, labels = confident(3)
    want = exact(logits, labels, metric)
    for target in targets("head"):
        if target.why_not("head") or (target.backend == "triton" and metric == "fisher"):
            continue
        h, weight = (x.to(target.device) for x in operands(logits))
        leaf = weight.requires_grad_()
        with target.active():
            results = HeadFunction.apply(
                *(
                    h,
                    leaf,
                    None,
                    labels.to(target.device),
                    None,
                    metric,
                    1.0,
                    None,
                    -100,
                    target.backend,
                    None,
                )
            )
            (gradient,) = torch.autograd.grad(results[wanted == "nll"].sum(), leaf)
        columns = gradient.t()[: logits[..., 0].numel()].cpu().reshape(logits.shape)
        name = f"{wanted} gradient"
        assert_digits({name: columns}, {name: want[name]}, ROUNDINGS)


@pytest.mark.parametrize("metric", ["fisher", "probs"])
@pytest.mark.parametrize("cuts", [(0, 64, 128, WORDS), (0, 0, 150, WORDS)])
def test_a_split_vocabulary(metric, cuts):
    logits, labels = confident(3)
    h, weight = operands(logits)
    kernels = choice.implementation("head", "reference")
    options = (metric, 1.0, None, -100)
    parts = []
    for start, stop in itertools.pairwise(cuts):
        inside = (labels >= start) & (labels < stop)
        own = torch.where(inside, labels - start, stop - start)
        numbers, stats = split._statistics(h, weight[start:stop], None, own, None, *options, "reference")
        parts.append((numbers, stats, own, weight[start:stop]))
    gathered = torch.stack([part[0] for part in parts])
    gradients = {"q": [], "nll": []}
    for _, stats, own, rows in parts:
        q, nll = split._merge(gathered, stats, 3, metric, True)
        assert nll is not None
        for name, bars in (("q", (torch.ones_like(q), None)), ("nll", (None, torch.ones_like(nll)))):
            if len(rows):
                _, bar, _ = kernels.head_bwd(
                    h, rows, None, own, None, *options, *bars, stats, False, True, False
                )
                gradients[name].append(bar.t()[:24].reshape(4, len(SHARES), len(rows)))
    got = {"q": q, "nll": nll} | {f"{name} gradient": torch.cat(bars, -1) for name, bars in gradients.items()}
    assert_digits(got, exact(logits, labels, metric), ROUNDINGS)


@pytest.mark.parametrize("metric", METRICS)
def test_a_process_without_words_that_can_be_drawn(metric):
    """Their logits are -inf, as padding of a vocabulary has them."""
    logits, labels = confident(1)
    h, weight = operands(logits)
    bias = torch.zeros(WORDS).index_fill(0, torch.arange(200, 280), -torch.inf)
    options = (metric, 1.0, None, -100)
    numbers, stats = [], []
    for words in (slice(0, 200), slice(200, 280), slice(280, WORDS)):
        inside = (labels >= words.start) & (labels < words.stop)
        own = torch.where(inside, labels - words.start, words.stop - words.start)
        part = split._statistics(h, weight[words], bias[words], own, None, *options, "reference")
        numbers.append(part[0])
        stats.append(part[1])
    q, nll = split._merge(torch.stack(numbers), stats[0], 1, metric, True)
    drawn = torch.cat([logits[..., :200], logits[..., 280:]], -1)
    want = exact(drawn, torch.where(labels < 200, labels, labels - 80), metric)
    if metric in ("fisher", "probs"):
        assert_digits({"q": q}, {"q": want["q"]}, ROUNDINGS)
    assert_digits({"nll": nll}, {"nll": want["nll"]}, ROUNDINGS)


def test_words_that_tie_and_rows_without_words():
    """Several likeliest words, in one tile and in several; a row of -inf is NaN, as its softmax is."""
    logits = torch.randn(2, 4, WORDS).bfloat16().double()
    for token, words in enumerate(([3, 5], [3, 290], [0, 100, 200, 300])):
        logits[0, token, words] = 9.0
    bias = torch.zeros(WORDS)
    for target in targets("head"):
        if target.why_not("head"):
            continue
        h, weight = (x.to(target.device) for x in operands(logits))
        for metric in ("fisher", "probs"):
            labels = torch.tensor([5, 290, 7, 8], device=target.device)
            with target.active():
                q, nll = HeadFunction.apply(
                    *(h, weight, None, labels, None, metric, 1.0, None, -100, target.backend, None)
                )
                dead, lost = HeadFunction.apply(
                    *(h, weight, (bias - torch.inf).to(weight), labels, None, metric, 1.0, None, -100),
                    *(target.backend, None),
                )
            want = exact(logits, labels.cpu(), metric)
            assert_digits({"q": q.cpu(), "nll": nll.cpu()}, {n: want[n] for n in ("q", "nll")}, ROUNDINGS)
            assert dead.isnan().all() and lost.isnan().all(), (str(target), metric)
