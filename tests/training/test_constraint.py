"""The constraint: what λ follows, where it ends, and bad input."""

from __future__ import annotations

import copy
import dataclasses
import math
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from training.tiny_lm import (
    ATTACK,
    VOCABULARY,
    TinyLM,
    fit_config,
    plain,
    quiet,
    sequences,
    sgd,
    tiny_lm,
    vector,
)

from aajr_kernels.method import ascend, trajectory_baseline, trajectory_penalty
from aajr_kernels.training import (
    Constraint,
    Linear,
    NonFiniteLossError,
    Objective,
    ObjectiveConfig,
    Penalty,
    Share,
    gamma_for_step,
)

ROOT = Path(__file__).parents[2]


def counting(count: int = 4, batch: int = 16, length: int = 12) -> list[torch.Tensor]:
    """Token ids that go up by one: they can be learnt, and the output becomes steep."""
    starts = [torch.arange(batch) + 3 * n for n in range(count)]
    return [(s.unsqueeze(1) + torch.arange(length)) % VOCABULARY for s in starts]


def trained(penalty: Penalty, steps: int = 150, **options):
    """Rows of a training that ends at a rate of 0."""
    settings = dict(steps=steps, attack=ATTACK, penalty=penalty, learning_rate=Linear(0.02, 0.0, steps))
    return quiet(tiny_lm(), counting(), fit_config(**(settings | options))).rows


# -- where it ends --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def free() -> float:
    """The 95 % quantile of √q without a penalty."""
    model = tiny_lm()
    quiet(
        model,
        counting(),
        fit_config(steps=150, attack=ATTACK, penalty=Penalty("none"), learning_rate=Linear(0.02, 0.0, 150)),
    )
    return float(roots(model).quantile(0.95))


def written_out(model: nn.Module):
    """Its forward, without dropout and counters."""

    def forward(x):
        before = x.cumsum(1) / torch.arange(1, x.shape[1] + 1).to(x).unsqueeze(-1)
        return model.head(torch.tanh(model.up(x + torch.tanh(model.mix(before)))))

    return forward


def roots(model: nn.Module) -> torch.Tensor:
    """√q of all tokens at all steps of their ascents."""
    found = []
    for ids in counting():
        x = model.embedding(ids).detach()
        loss = lambda x, ids=ids: nn.functional.cross_entropy(
            model(x).mT, ids.roll(-1, 1), reduction="none"
        ).mean(1)
        traj = ascend(loss, x, radius=0.5, steps=2, step_size=0.3, scope="token", module=model)
        with torch.no_grad():
            _, aux = trajectory_penalty(model, x, traj)
        found.append(aux.units.flatten())
    return torch.cat(found).sqrt()


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_bound_that_binds_is_met(share, free):
    gamma, model = share * free, tiny_lm()
    penalty = Constraint(gamma=gamma, window=500)
    settings = fit_config(steps=150, attack=ATTACK, penalty=penalty, learning_rate=Linear(0.02, 0.0, 150))
    rows = quiet(model, counting(), settings).rows
    within = float((roots(model) <= gamma).float().mean())
    assert 0.91 <= within <= 0.99 and rows[-1]["binding"] == 1.0
    assert 0.02 < sum(row["violation"] for row in rows[-20:]) / 20 < 0.08


def test_a_bound_that_does_not_bind_leaves_λ_at_its_floor(free):
    rows = trained(Constraint(gamma=3 * free, weight=0.5, rate=0.1))
    assert rows[-1]["multiplier"] == pytest.approx(0.5 / 1e3) and rows[-1]["binding"] == 0.0
    assert rows[-1]["violation"] <= 0.05


def test_a_bound_that_cannot_be_met_is_reported_and_the_training_goes_on(tmp_path):
    penalty = Constraint(gamma=1e-6, weight=1.0, span=2.0, window=20, rate=0.5)
    settings = fit_config(steps=6, attack=ATTACK, penalty=penalty, learning_rate=1e-3)
    pytest.importorskip("safetensors")
    with pytest.warns(RuntimeWarning, match=r"not met at step 2: 100.0% of the units .* where 5.0% may be"):
        rows = quiet(tiny_lm(), counting(), settings, out=tmp_path).rows
    assert len(rows) == 6 and rows[-1]["multiplier"] == pytest.approx(2.0)
    page = (tmp_path / "report.md").read_text()
    assert (
        "was not met at step 6: 100.0% of the units were above γ where 5.0% may be; λ = 2, above its floor"
        in page
    )
    assert "| violation | 1 | 1 |" in page


# -- what λ follows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3])
def test_λ_is_the_integral_of_the_violations(every):
    """By hand from the shares of the steps, each of 22 tokens: a window of 50 is three steps with a penalty."""
    penalty = Constraint(gamma=0.25, weight=0.3, window=50, rate=0.2, span=10.0, quantile=0.6, every=every)
    model = tiny_lm()
    rows = quiet(model, counting(batch=2), plain(steps=24, penalty=penalty), optimizer=sgd(model, 0.3)).rows
    log, seen = 0.0, []
    for row in rows:
        if row["step"] % every:
            assert row["weight"] == 0.0 and "penalty" not in row
            continue
        assert row["weight"] == pytest.approx(every * 0.3 * math.exp(log), rel=1e-6)
        seen = [*seen, row["active"]][-3:]
        if len(seen) == 3:
            error = (sum(seen) / 3 - 0.4) / 0.4
            log = max(-math.log(10), min(math.log(10), log + 0.2 * min(error, 1.0)))
        assert row["multiplier"] == pytest.approx(0.3 * math.exp(log), rel=1e-6)
        assert row["violation"] == pytest.approx(sum(seen) / len(seen), rel=1e-6)
    assert len({row.get("multiplier") for row in rows}) > 4


def test_the_gradient_is_that_of_the_hinge():
    """In float64, of the same trajectory: loss + λ · mean relu(√q − γ)."""
    model, (ids,) = tiny_lm().double(), counting(1, batch=3, length=5)
    objective = ObjectiveConfig(
        attack=ATTACK, penalty=Constraint(gamma=0.1, weight=0.7, steps="last"), share_context=False
    )
    Objective(model, objective)(ids).total.backward()
    actual = torch.cat([p.grad.flatten() for p in model.parameters()])
    by_hand = copy.deepcopy(model)
    by_hand.zero_grad()
    x, labels = by_hand.embedding(ids), ids.roll(-1, 1).index_fill(1, torch.tensor([4]), -100)
    forward = written_out(by_hand)
    cross_entropy = lambda x: nn.functional.cross_entropy(forward(x).mT, labels, reduction="none")
    row_losses = lambda x: cross_entropy(x).sum(1) / 4
    traj = ascend(row_losses, x.detach(), radius=0.5, steps=2, step_size=0.3, scope="token", module=by_hand)
    z, z_tan = torch.func.jvp(forward, (traj.points[1] + x - x.detach(),), (traj.directions[1],))
    p = z.softmax(-1)
    centred = z_tan - (p * z_tan).sum(-1, keepdim=True)
    root = (p * centred.square()).sum(-1)[:, :4].sqrt()
    assert (root > 0.1).any() and (root < 0.1).any()
    worst = cross_entropy(traj.worst + x - x.detach()).sum() / 12
    (worst + 0.7 * torch.relu(root - 0.1).mean()).backward()
    torch.testing.assert_close(
        actual, torch.cat([p.grad.flatten() for p in by_hand.parameters()]), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("method", ["aligned", "spectral", "frobenius", "input_gradient"])
def test_units_of_every_method_are_those_of_its_penalty(method):
    model, (ids,) = tiny_lm(), counting(1, batch=3)
    objective = Objective(
        model, ObjectiveConfig(attack=ATTACK, penalty=Constraint(method, gamma=0.2, weight=1.0, window=1))
    )
    seen = []
    objective.multiplier.add = lambda step, loss, penalty, units, gamma: seen.append((penalty, units, gamma))
    terms = objective(ids)
    ((penalty, units, gamma),) = seen
    of_rows = method != "aligned"  # sequences, or rows of a loss
    assert units.shape[-1] == (3 if of_rows else 36) and int((~units.isnan()).sum()) == (3 if of_rows else 33)
    assert gamma == 0.2 and "units" not in terms.parts
    expected = torch.relu(units[~units.isnan()].sqrt() - 0.2).mean()
    torch.testing.assert_close(penalty, expected.to(penalty), rtol=1e-5, atol=1e-7)


def test_units_of_a_trajectory_are_nan_where_masked():
    model, (ids,) = tiny_lm(), counting(1, batch=3, length=4)
    x = model.embedding(ids).detach()
    traj = ascend(lambda x: model(x).square().mean((1, 2)), x, radius=0.5, steps=2, scope="token")
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    for size in (1, 2):
        _, aux = trajectory_penalty(model, x, traj, mask=mask, batch_steps=size)
        assert aux.units.shape == (2, 1, 12) and torch.equal(aux.units.isnan()[1, 0], mask.flatten() == 0)
        torch.testing.assert_close(aux.units.nanmean(-1), aux.q)
    _, aux = trajectory_baseline(
        "spectral", model, traj, mask=mask, generator=torch.Generator().manual_seed(0)
    )
    assert aux["units"].shape == (2, 1, 3) and aux["units"].isnan().tolist() == [[[False, False, True]]] * 2


# -- held-out rows --------------------------------------------------------------------------------------------------

HELD_OUT = Constraint(gamma=0.1, weight=1.0, window=30, rate=0.3, steps="all", follow="validation")


def test_λ_follows_held_out_rows_in_eval_mode():
    """The share above γ over all steps of their ascents, from a jvp in float64; the model is left as it was."""
    model, (learnt, held_out) = tiny_lm(dropout=0.4).double(), counting(2, batch=5)
    objective = Objective(
        model, ObjectiveConfig(attack=ATTACK, penalty=HELD_OUT, adversarial_weight=0.0, clean_weight=1.0)
    )
    model.train()
    objective(learnt).total.backward()
    gradients, random = [p.grad.clone() for p in model.parameters()], torch.get_rng_state()
    calls = int(model.calls)
    objective.measure(held_out)
    assert torch.equal(torch.get_rng_state(), random) and int(model.calls) == calls and model.training
    assert all(p.requires_grad and torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients))
    log = objective.state_dict()["multiplier"]["log"]
    model.eval()
    labels = held_out.roll(-1, 1).index_fill(1, torch.tensor([11]), -100)
    losses = lambda x: nn.functional.cross_entropy(model(x).mT, labels, reduction="none").sum(1) / 11
    x = model.embedding(held_out).detach()
    traj = ascend(losses, x, radius=0.5, steps=2, step_size=0.3, scope="token", module=model)
    q = []
    for point, u in zip(traj.points, traj.directions):
        z, z_tan = torch.func.jvp(written_out(model), (point,), (u,))
        p = z.softmax(-1)
        q.append((p * (z_tan - (p * z_tan).sum(-1, keepdim=True)).square()).sum(-1)[:, :11])
    share = float((torch.stack(q).sqrt() > 0.1).double().mean())
    assert 0.1 < share < 0.9 and objective.multiplier.violation == pytest.approx(share, abs=1e-12)
    assert log == pytest.approx(0.3 * min((share - 0.05) / 0.05, 1.0))


@pytest.mark.parametrize("method", ["aligned", "spectral", "frobenius", "input_gradient", "cure"])
def test_held_out_rows_are_measured_by_every_method(method):
    """Those of the learnt batch itself, which has the same q without a graph, have the same share above γ."""
    shares = []
    for follow in ("training", "validation"):
        model, (ids,) = tiny_lm().double(), counting(1, batch=9)
        penalty = Constraint(
            method, gamma=0.3, weight=1.0, window=1, steps="last", follow=follow, iterations=30, samples=400
        )
        objective = Objective(model, ObjectiveConfig(attack=ATTACK, penalty=penalty))
        objective(ids)
        if follow == "validation":
            objective.measure(ids)
        objective.state_dict()
        shares.append(objective.multiplier.violation)
    assert shares[0] == pytest.approx(shares[1], abs=1e-12) and 0 <= shares[0] <= 1


def test_λ_keeps_its_value_where_no_held_out_row_is_measured():
    """Every second step is measured, with a penalty on every third: λ moves where both are."""
    model, (learnt, held_out) = tiny_lm(), counting(2)
    penalty = dataclasses.replace(HELD_OUT, every=3, gamma=0.01)
    objective = Objective(model, ObjectiveConfig(attack=ATTACK, penalty=penalty))
    logs = []
    for step in range(12):
        objective(learnt, step=step)
        if step % 2 == 0:
            objective.measure(held_out, step=step)
        logs.append(objective.state_dict()["multiplier"]["log"])
    assert [round(after / 0.3) for after in logs] == [0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2]


# -- the gradient of the penalty, clipped apart ---------------------------------------------------------------------


def test_the_penalty_is_clipped_apart():
    """By hand: each gradient scaled to its own limit, and then their sum."""
    options = dict(attack=ATTACK, learning_rate=1.0)
    penalty = Constraint(gamma=0.01, weight=3.0, steps="last")

    def gradient(**weights) -> torch.Tensor:
        model = tiny_lm().double()
        objective = Objective(model, ObjectiveConfig(attack=ATTACK, **weights))
        for part, batch in enumerate(counting(2)):
            objective(batch, counts=objective.counts(counting(2)), part=part).total.backward()
        return torch.cat(
            [p.grad.flatten() if p.grad is not None else 0 * p.flatten() for p in model.parameters()]
        ).detach()

    of_loss = gradient(penalty=Penalty("none"))
    of_penalty = gradient(penalty=penalty) - of_loss
    model = tiny_lm().double()
    before = vector(model)
    settings = plain(**options, penalty=penalty, accumulate=2, clip_norm=0.02, penalty_clip_norm=0.05)
    (row,) = quiet(model, counting(2), settings, optimizer=sgd(model)).rows
    expected = 0.02 * of_loss / of_loss.norm() + 0.05 * of_penalty / of_penalty.norm()
    torch.testing.assert_close(before - vector(model), expected, rtol=1e-4, atol=1e-8)
    assert row["gradient_norm"] == pytest.approx(float(of_loss.norm()))
    assert row["penalty_gradient_norm"] == pytest.approx(float(of_penalty.norm()))
    free = dataclasses.replace(settings, clip_norm=None, penalty_clip_norm=1e9)
    model = tiny_lm().double()
    quiet(model, counting(2), free, optimizer=sgd(model))
    torch.testing.assert_close(before - vector(model), of_loss + of_penalty, rtol=1e-9, atol=1e-12)


# -- numbers of a step, bad input -----------------------------------------------------------------------------------


def test_gamma_for_step():
    """L_out γ² + C = 1/η; none where C is larger."""
    assert gamma_for_step(0.01, 19.0, 0.5) == pytest.approx(math.sqrt((100 - 19) / 0.5))
    assert gamma_for_step(0.01, 0.0) == pytest.approx(10.0)
    assert gamma_for_step(0.01, 100.5) is None
    with pytest.raises(ValueError, match="step_size must be positive, got 0"):
        gamma_for_step(0, 1.0)
    with pytest.raises(ValueError, match="second_order must be a finite number >= 0, got -1"):
        gamma_for_step(0.1, -1)


class _Hidden(TinyLM):
    """A body, without the head whose logits the metrics of distributions need."""

    def forward(self, inputs_embeds, attention_mask=None):
        return types.SimpleNamespace(last_hidden_state=torch.tanh(self.up(inputs_embeds)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: Constraint(),
            "gamma of a Constraint must be a positive number, a schedule, a Share or 'auto', got None",
        ),
        (lambda: Constraint(gamma=0), "gamma of a Constraint must be > 0, got 0"),
        (lambda: Constraint(gamma=-1.0), "gamma must be finite and >= 0 at every step, got -1.0"),
        (lambda: Constraint(gamma=Share(0.0)), "gamma of a Constraint must be > 0, got 0.0"),
        (lambda: Constraint(gamma=1.0, quantile=1.0), r"quantile must be in \(0, 1\), got 1.0"),
        (lambda: Constraint(gamma=1.0, quantile=0), r"quantile must be in \(0, 1\), got 0"),
        (lambda: Constraint(gamma=1.0, rate=0.0), "rate must be positive, got 0.0"),
        (lambda: Constraint(gamma=1.0, span=1.0), "span must be larger than 1, got 1.0"),
        (lambda: Constraint(gamma=1.0, window=0), "window must be an integer >= 1, got 0"),
        (
            lambda: Constraint(gamma=1.0, follow="test"),
            "follow must be one of training, validation, got 'test'",
        ),
        (lambda: Constraint(gamma="auto", step_size=0), "step_size must be positive, got 0"),
        (lambda: Constraint(gamma=2.0, step_size=0.1), "gamma must be 'auto' with step_size=0.1"),
        (
            lambda: Constraint("cure", gamma="auto", step_size=0.1),
            "method must measure the policy's output for a step_size, got 'cure'",
        ),
        (
            lambda: Constraint(gamma="auto", step_size=0.1, metric="probs"),
            "metric must be one of l2, logits, fisher for a step_size, got 'probs'",
        ),
        (lambda: Penalty(gamma="auto"), "gamma must be a number or a function from the step to one, got str"),
        (
            lambda: quiet(tiny_lm(), counting(), plain(penalty=HELD_OUT)),
            r"validation must be given with Constraint\(follow='validation'\) and only with it, got NoneType",
        ),
        (
            lambda: quiet(tiny_lm(), counting(), plain(), validation=counting()),
            "validation must be given with .* got list with Penalty",
        ),
        (
            lambda: Objective(tiny_lm(), ObjectiveConfig()).measure(sequences(1)[0]),
            r"penalty must be a Constraint\(follow='validation'\) for measure, got Penalty",
        ),
        (
            lambda: [
                objective(sequences(1)[0], step=step)
                for objective in [Objective(tiny_lm(), ObjectiveConfig(penalty=HELD_OUT))]
                for step in range(2)
            ],
            "must measure what λ follows, got nothing until step 0: call Objective.measure",
        ),
        (lambda: Constraint("none", gamma=1.0), "method of a Constraint must measure something, got 'none'"),
        (
            lambda: Constraint(gamma=1.0, form="squared"),
            "form of a Constraint must be 'hinge', got 'squared'",
        ),
        (
            lambda: Penalty(gamma=Share()),
            "gamma must be a number or a function from the step to one, got Share",
        ),
        (lambda: Share(-0.1), "share must be finite and >= 0 at every step, got -0.1"),
        (lambda: Share(within=0), "within must be an integer >= 1, got 0"),
        (
            lambda: ObjectiveConfig(adversarial_weight=0.0),
            r"weight must be a number where no loss has a weight to be a share of, got Share\(share=0.1",
        ),
        (
            lambda: Objective(tiny_lm(), ObjectiveConfig()).penalty(sequences(1)[0]),
            "weight must be a number where no loss",
        ),
        (
            lambda: fit_config(steps=1, penalty_clip_norm=0),
            "penalty_clip_norm must be positive or None, got 0",
        ),
        (
            lambda: quiet(tiny_lm(), sequences(1), plain(penalty=Constraint(gamma=lambda step: 0.0))),
            "gamma of a Constraint must be > 0 at every step, got 0.0 at step 0",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        call()
    assert str(caught.value).count(". ") == 0


def test_the_spectral_norm_is_exact_in_fit():
    """‖J‖²₂ of whole rows at the worst point in float64, from J by autograd."""
    model, (ids,) = tiny_lm().double(), counting(1, batch=2, length=4)
    penalty = Penalty("spectral", weight=0.1, steps="worst", iterations="exact", metric="l2")
    (row,) = quiet(copy.deepcopy(model), [ids], plain(penalty=penalty, learning_rate=0.0)).rows
    x, labels = model.embedding(ids).detach(), ids.roll(-1, 1).index_fill(1, torch.tensor([3]), -100)
    losses = lambda x: nn.functional.cross_entropy(model(x).mT, labels, reduction="none").sum(1) / 3
    traj = ascend(losses, x, radius=0.5, steps=2, step_size=0.3, scope="token", module=model)
    norms = []
    for point in traj.worst:
        outputs = lambda x: written_out(model)(x.unsqueeze(0))[0, :3]
        jacobian = torch.autograd.functional.jacobian(outputs, point).reshape(3 * VOCABULARY, -1)
        norms.append(torch.linalg.matrix_norm(jacobian, 2) ** 2)
    assert row["penalty"] == pytest.approx(float(torch.stack(norms).mean()), rel=1e-6)


def test_a_step_that_is_not_taken_moves_nothing():
    good, bad = counting(1)[0], {"inputs_embeds": torch.full((16, 12, 6), math.nan), "labels": counting(1)[0]}
    penalty = Constraint(gamma=0.01, weight=1.0, window=10)
    rows = quiet(tiny_lm(), [good, bad, good], plain(steps=3, penalty=penalty, non_finite="skip")).rows
    assert rows[0]["multiplier"] == rows[1]["multiplier"] < rows[2]["multiplier"]
    with pytest.raises(NonFiniteLossError, match="norm of the embedded tokens is nan"):
        quiet(tiny_lm(), [bad], fit_config(steps=1))
