"""Losses of an adversary: values and gradients against float64 written out, and where they raise."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from assertions import assert_exact
from method.small_lm import batch_of, policy_for, small_lm

from aajr_kernels import ascend, dual
from aajr_kernels.method.batch import prepared
from aajr_kernels.method.evaluation import (
    EmbeddingAttack,
    HiddenAttack,
    SuffixSearch,
    TokenSubstitution,
    UniversalPerturbation,
    evaluate,
)
from aajr_kernels.method.objectives import KL, CrossEntropy, Payoff, Targeted

CPU = torch.device("cpu")
exact = partial(assert_exact, tolerance=1e-11, floor=1e-4)


def batch_with_targets():
    data = batch_of()
    wanted = torch.full_like(data["labels"], -100)
    wanted[:, 5], wanted[0, 6] = 3, 4
    return data | {"attack_labels": wanted}


def ready(model, streamed=True, reference=None):
    """Policy, batch, the clean input, and a perturbed one."""
    policy = policy_for(model, streamed)
    if reference is not None:
        policy = replace(policy, reference=policy_for(reference, streamed))
    batch = prepared(batch_with_targets(), CPU, True)
    x = model.embedding(batch.input_ids).detach()
    return (
        policy,
        batch,
        x,
        x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).double(),
    )


def written_out(loss, model, reference, x, point, data):
    """``[B]``, token by token, from probabilities; `x` is the clean input."""

    def log_p(net, x):
        return net(x, data["attention_mask"]).log_softmax(-1)

    def mean(values, row, marks):
        """Over positions whose next token is marked and that are attended to."""
        seen = [
            t
            for t in range(marks.shape[1] - 1)
            if marks[row, t + 1] != -100 and data["attention_mask"][row, t]
        ]
        return sum(values(t, marks[row, t + 1]) for t in seen) / max(len(seen), 1)

    ours, rows = log_p(model, point), []
    if getattr(loss, "to", "") == "clean":
        other = log_p(model, x)
    else:
        other = log_p(reference, reference.embedding(data["input_ids"]))
    for row in range(len(x)):

        def nll(t, label, row=row):
            return -ours[row, t, label]

        def kl(t, label, row=row):
            p, q = other[row, t], ours[row, t]
            forward, reverse = (p.exp() * (p - q)).sum(), (q.exp() * (q - p)).sum()
            return {"forward": forward, "reverse": reverse, "symmetric": forward + reverse}[loss.direction]

        if isinstance(loss, CrossEntropy):
            rows.append(mean(nll, row, data["labels"]))
        elif isinstance(loss, Targeted):
            toward, away = mean(nll, row, data["attack_labels"]), mean(nll, row, data["labels"])
            rows.append(loss.away * away - loss.toward * toward)
        elif loss.tokens == "loss":
            rows.append(mean(kl, row, data["labels"]))
        else:
            seen = data["attention_mask"][row].nonzero().flatten().tolist()
            rows.append(sum(kl(t, None) for t in seen) / len(seen))
    return torch.stack(rows)


LOSSES = [
    CrossEntropy(),
    Targeted(),
    Targeted(0, away=1.0),
    Targeted(0.5, away=2.0),
    *(KL(direction=direction) for direction in ("forward", "reverse", "symmetric")),
    KL(tokens="attention"),
    KL("reference"),
    KL("reference", "symmetric", "attention"),
]


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_values_gradients_and_tangents(loss, streamed):
    model, reference = small_lm().eval(), small_lm(3).eval()
    policy, batch, x, point = ready(model, streamed, reference)
    data = batch_with_targets()
    func = loss.of(policy, batch, x)

    def expected(point):
        return written_out(loss, model, reference, x, point, data)

    for at in (point, x):  # the second call compares with the same output
        a, b = at.clone().requires_grad_(), at.clone().requires_grad_()
        ours, want = func(a), expected(b)
        exact(ours, want, "losses")
        exact(*(torch.autograd.grad(y.sum(), z)[0] for y, z in ((ours, a), (want, b))), "gradient")
    v = torch.randn_like(point)
    _, tangent = torch.func.jvp(expected, (point,), (v,))
    exact(func(dual(point, v)).stacked[1], tangent, "tangent, as diagnostics take it")


def test_reverse_with_a_reference_of_another_form():
    """A head on one side only: logits of both are formed."""
    model, reference = small_lm().eval(), small_lm(3).eval()
    loss = KL("reference", "reverse")
    for streamed in (True, False):
        policy, batch, x, point = ready(model, streamed)
        policy = replace(policy, reference=policy_for(reference, not streamed))
        want = written_out(loss, model, reference, x, point, batch_with_targets())
        exact(loss.of(policy, batch, x)(point), want, "losses")


def test_dropout_has_one_mask_for_both_sides():
    model = small_lm().train()
    policy, batch, x, point = ready(model)
    func, free = KL().of(policy, batch, x), CrossEntropy().of(policy, batch, x)
    torch.manual_seed(5)
    free(point)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    assert float(func(x).detach().abs().max()) < 1e-12
    assert torch.equal(torch.get_rng_state(), after)  # as after one forward
    torch.manual_seed(5)
    clean = model.hidden(x, batch.inputs["attention_mask"])
    torch.manual_seed(5)
    attacked = model.hidden(point, batch.inputs["attention_mask"])
    p, q = (model.head(h).log_softmax(-1) for h in (clean, attacked))
    mask = batch.labels != -100
    want = ((p.exp() * (p - q)).sum(-1) * mask).sum(-1) / mask.sum(-1)
    torch.manual_seed(5)
    exact(func(point), want, "losses")


def test_an_ascent_on_a_divergence_rises_and_trains_nothing():
    model = small_lm().train()
    policy, batch, x, _ = ready(model)
    options = dict(radius=0.5, steps=3, scope="token", module=model, mask=batch.attackable, init="uniform")
    for eval_mode in (False, True):
        traj = ascend(KL().of(policy, batch, x), x, eval_mode=eval_mode, **options)
        assert bool((traj.losses[0] > 0).all() and (traj.losses[-1] > traj.losses[0]).all())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("streamed", [True, False])
def test_payoffs(streamed):
    """Of logits, and with a head of hidden states."""
    model = small_lm().eval()
    policy, batch, x, point = ready(model, streamed)
    payoff = lambda z, batch: z[:, 6, 3] * batch.labels.shape[1]
    a, b = point.clone().requires_grad_(), point.clone().requires_grad_()
    ours, want = Payoff(payoff).of(policy, batch, x)(a), 8 * model(b, batch.inputs["attention_mask"])[:, 6, 3]
    exact(ours, want, "payoff")
    exact(*(torch.autograd.grad(y.sum(), z)[0] for y, z in ((ours, a), (want, b))), "gradient")
    ours = Payoff(lambda h, _: h[:, 6].square().sum(-1), logits=False).of(policy, batch, x)(point)
    width = model.hidden if streamed else model
    exact(ours, width(point, batch.inputs["attention_mask"])[:, 6].square().sum(-1), "of hidden states")
    v = torch.randn_like(point)
    of = lambda x: 8 * model(x, batch.inputs["attention_mask"])[:, 6, 3]
    exact(
        Payoff(payoff).of(policy, batch, x)(dual(point, v)).stacked[1],
        torch.func.jvp(of, (point,), (v,))[1],
        "tangent",
    )


def bad_payoff(function):
    model = small_lm().eval()
    policy, batch, x, _ = ready(model)
    ascend(Payoff(function).of(policy, batch, x), x, radius=0.1, steps=1, module=model)


def of_batch(loss, **entries):
    model = small_lm().eval()
    batch = prepared(batch_with_targets() | entries, CPU, True)
    return loss.of(policy_for(model, True), batch, model.embedding(batch.input_ids).detach())


IDS = batch_of()["input_ids"]
BAD = {
    "constant payoff": (
        lambda: bad_payoff(lambda z, _: z.detach().sum((1, 2))),
        ValueError,
        "function of Payoff must return payoffs that depend on the output, got constants",
    ),
    "argmax": (
        lambda: bad_payoff(lambda z, _: z.argmax(-1).double().sum(-1)),
        ValueError,
        "payoffs that depend on the output, got constants",
    ),
    "shape of a payoff": (
        lambda: bad_payoff(lambda z, _: z.sum()),
        ValueError,
        r"function of Payoff must return one loss per batch row, shape \(3,\), got \(\)",
    ),
    "integers": (
        lambda: bad_payoff(lambda z, _: z.argmax(-1).sum(-1)),
        TypeError,
        "function of Payoff must return a floating point tensor",
    ),
    "no function": (lambda: Payoff(3), TypeError, r"function of Payoff must be callable .* got int"),
    "no target": (
        lambda: of_batch(Targeted(), attack_labels=None),
        ValueError,
        r"attack_labels must be in the batch for Targeted\(toward=\), got none",
    ),
    "targets everywhere ignored": (
        lambda: of_batch(Targeted(), attack_labels=torch.full_like(IDS, -100)),
        ValueError,
        "attack_labels must name a token that is wanted in every batch, got -100 everywhere",
    ),
    "shape of targets": (
        lambda: of_batch(Targeted(), attack_labels=IDS[:, 1:]),
        ValueError,
        r"attack_labels must have the shape \(3, 8\) of the tokens, got \(3, 7\)",
    ),
    "dtype of targets": (
        lambda: of_batch(Targeted(), attack_labels=IDS.float()),
        ValueError,
        "attack_labels must be integers, got torch.float32",
    ),
    "no weights": (lambda: Targeted(0), ValueError, "toward and away must not both be 0"),
    "negative": (lambda: Targeted(-1), ValueError, "toward must be a finite number >= 0, got -1"),
    "no reference": (
        lambda: of_batch(KL("reference")),
        ValueError,
        r"policy must have a reference for KL\(to='reference'\), got none: a model of PEFT has one",
    ),
    "direction": (lambda: KL(direction="back"), ValueError, "direction must be one of forward, reverse, sym"),
    "to": (lambda: KL("start"), ValueError, "to must be one of clean, reference, got 'start'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_rows_without_a_target_stay():
    func = of_batch(Targeted(), attack_labels=torch.where(torch.arange(3).unsqueeze(1) == 1, IDS, -100))
    point = small_lm().embedding(IDS).detach().requires_grad_()
    losses = func(point)
    (slope,) = torch.autograd.grad(losses.sum(), point)
    assert [v == 0 for v in losses.tolist()] == [True, False, True] == [not bool(s.any()) for s in slope]


def test_evaluations_take_the_same_losses():
    """The loss that is reported is the one at the points that the attacks found; flat ones start elsewhere."""
    model, reference = small_lm().eval(), small_lm(3).eval()
    policy, _, x, _ = ready(model, reference=reference)
    data = batch_with_targets()
    for loss in (KL(), KL("reference"), Targeted(1.0, away=0.5)):
        attacks = [
            EmbeddingAttack(0.5, steps=4),
            *([] if loss.is_flat else [TokenSubstitution(2, 4, at_once=2)]),
        ]
        found = evaluate(policy, data, attacks, module=model, loss=loss)
        exact(found.clean, written_out(loss, model, reference, x, x, data), "clean")
        assert bool((found.attacked["embedding"] > found.clean).all())
        for tokens in found.tokens.get("substitution", []):
            put = model.embedding(tokens)
            exact(found.attacked["substitution"], written_out(loss, model, reference, x, put, data), "tokens")
    for loss in (KL(), KL("reference")):  # of what is added to a layer, from the output without it
        inside = evaluate(policy, data, [HiddenAttack("mix", 0.5, steps=3)], module=model, loss=loss)
        exact(inside.clean, written_out(loss, model, reference, x, x, data), "clean")
        rises = inside.attacked["hidden"] > inside.clean
        # that layer mixes no tokens, and the first row's open ones are not scored
        assert rises.tolist() == [False, True, True]
    longer = evaluate(policy, data, [SuffixSearch(2, 2, 4)], module=model, loss=Targeted())
    assert bool(longer.attacked["suffix"].isfinite().all())
    for attack, loss, message in (
        (
            TokenSubstitution(),
            KL(),
            "has a gradient of zero at the clean input, where TokenSubstitution begins",
        ),
        (UniversalPerturbation(), KL(), "zero at the clean input, where UniversalPerturbation begins"),
        (
            SuffixSearch(),
            KL("reference"),
            "compares with the output at the clean tokens, to which SuffixSearch",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(policy, data, [attack], module=model, loss=loss)
