"""The training loop: its objective against the same by hand, schedules, what is not finite, bad input."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch.nn import functional as F
from training.tiny_lm import TinyLM, fit_config, plain, quiet, sequences, sgd, tiny_lm, vector

import aajr_kernels as aajr
from aajr_kernels import training
from aajr_kernels.method.baselines import METHODS
from aajr_kernels.training import (
    Attack,
    Cosine,
    Diagnostics,
    FitConfig,
    Linear,
    NonFiniteLossError,
    Penalty,
    Policy,
    WarmUp,
    policy_of,
    prepared,
)
from aajr_kernels.training import objective as objectives
from aajr_kernels.training.schedules import value_at

CPU = torch.device("cpu")


# -- the objective --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", ["worst", "all", "last"])
def test_a_step_is_that_of_the_formula(steps):
    model, (ids,) = tiny_lm().double(), sequences(1)
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2])
    labels = ids.masked_fill(mask == 0, -100).roll(-1, 1)
    labels[:, -1] = -100
    labels[mask == 0] = -100
    by_hand = copy.deepcopy(model)
    x = by_hand.embedding(ids)
    policy = lambda x: by_hand(x, mask)

    def row_losses(x):
        terms = F.cross_entropy(policy(x).flatten(0, 1), labels.flatten(), reduction="none")
        return terms.reshape(2, -1).sum(-1) / (labels >= 0).sum(-1)

    traj = aajr.ascend(
        row_losses, x.detach(), radius=0.5, steps=2, step_size=0.3, scope="token", mask=mask, module=by_hand
    )
    pen, _ = aajr.trajectory_penalty(policy, x, traj, steps=steps, mask=labels >= 0)
    at = lambda x: F.cross_entropy(policy(x).flatten(0, 1), labels.flatten())
    worst = at(traj.worst + x - x.detach())
    (0.3 * at(x) + 0.7 * worst + 0.2 * pen).backward()
    expected = vector(by_hand) - torch.cat([p.grad.flatten() for p in by_hand.parameters()])

    config = plain(penalty=Penalty(weight=0.2, steps=steps), adversarial_weight=0.7, clean_weight=0.3)
    batch = {"input_ids": ids, "attention_mask": mask}
    result = quiet(model, [batch], config, optimizer=sgd(model))
    torch.testing.assert_close(vector(model), expected, rtol=1e-12, atol=1e-13)
    row = result.rows[0]
    assert row["penalty"] == pytest.approx(pen.item(), rel=1e-12)
    assert row["adversarial_loss"] == pytest.approx(worst.item(), rel=1e-12)
    assert row["attack_worst"] > row["attack_start"] and row["tokens"] == 6


@pytest.mark.parametrize(
    "penalty",
    [
        Penalty(weight=0.2, steps="worst"),
        Penalty(weight=0.2, steps="worst", tokens="attention", gamma=0.1),
        Penalty(weight=0.2, steps="worst", unit="sequence", gamma=0.05, form="hinge2"),
        Penalty("spectral", weight=0.2, steps="all", iterations=3),
        Penalty("input_gradient", weight=0.2, steps="worst"),
        Penalty("cure", weight=0.2, steps="worst", gamma=0.01, form="hinge"),
    ],
    ids=lambda p: f"{p.method} {p.unit} {p.tokens}",
)
def test_micro_batches_of_different_sizes_add_up_to_one_batch(penalty, monkeypatch):
    # a start of the power iteration that does not depend on the micro-batch; it converges to the same only in the limit
    monkeypatch.setattr(
        "aajr_kernels.method.baselines._noise", lambda x, lead, g: torch.ones(*lead, *x.shape).to(x)
    )
    one = {
        "input_ids": torch.randint(13, (3, 6)),
        "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1, 1] + [0] * 4]),
    }
    parts = [{k: v[:1] for k, v in one.items()}, {k: v[1:] for k, v in one.items()}]
    ends = []
    for batches, count in (([one], 1), (parts, 2)):
        model = tiny_lm().double()
        row = quiet(model, batches, plain(penalty=penalty, accumulate=count), optimizer=sgd(model)).rows[0]
        ends.append((vector(model), row["loss"], row["penalty"], row["tokens"]))
    torch.testing.assert_close(ends[1][0], ends[0][0], rtol=1e-10, atol=1e-11)
    assert ends[1][1:] == pytest.approx(ends[0][1:], rel=1e-10) and ends[0][2] > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", ["worst", "random"])
def test_every_penalty_reaches_every_parameter(method, steps):
    model = tiny_lm().double()
    config = plain(penalty=Penalty(method, weight=1.0, steps=steps), adversarial_weight=0.0)
    row = quiet(model, sequences(1), config, optimizer=sgd(model)).rows[0]
    before = dict(tiny_lm().double().named_parameters())
    assert row["penalty"] > 0 and row["loss"] == pytest.approx(row["penalty"])
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved >= {"embedding.weight", "mix.weight", "up.weight", "head.weight"}


def test_the_baselines_measure_where_the_aligned_penalty_does():
    """``aligned`` by the way of the baselines: the same value, and the same gradient of embeddings too."""
    model, config, seen = tiny_lm().double(), plain(penalty=Penalty(gamma=0.1, steps="worst")).objective, []
    policy, batch = policy_of(model), prepared(sequences(1)[0], CPU, True)
    scheduled, counts = objectives.ScheduledValues.at(config, 0), objectives.Counts.of([batch], config)
    look = lambda traj, *_: seen.append(traj)
    objectives.terms_of(model, policy, batch, config, scheduled, counts, torch.Generator(), look)
    actual = []
    for way in ("aligned", "baseline"):
        x = model.embedding(batch.input_ids)
        work = objectives.Work(
            model, policy, batch, config, counts, torch.Generator(), None, x, x.new_ones(())
        )
        penalty, _, _ = getattr(work, way)(seen[0], scheduled)
        actual.append((penalty, *torch.autograd.grad(penalty, list(model.parameters()))))
    for a, b in zip(*actual):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", ["aligned", "frobenius", "input_gradient", "cure", "finite_difference"])
@pytest.mark.parametrize("form", ["squared", "hinge", "hinge2"])
def test_relative_sizes_do_not_depend_on_the_scale_of_embeddings(method, form):
    """The same function with embeddings ten times as large: the same numbers, the same gradient of the rest."""
    config = plain(
        attack=Attack(radius=0.5, steps=2, step_size=0.3, relative=True),
        penalty=Penalty(method, weight=0.5, form=form, gamma=0.02),
    )
    ends = []
    for factor in (1.0, 10.0):
        model = tiny_lm().double()
        with torch.no_grad():
            model.embedding.weight.mul_(factor)
        forward = lambda x, **inputs: model(x / factor, **inputs)
        policy = Policy(forward, model.embedding)
        row = quiet(model, sequences(1), config, policy=policy, optimizer=sgd(model)).rows[0]
        ends.append((row["penalty"], row["loss"], model.up.weight.detach().clone()))
    assert ends[0][0] > 0
    assert ends[1][:2] == pytest.approx(ends[0][:2], rel=1e-6)
    torch.testing.assert_close(ends[1][2], ends[0][2], rtol=1e-6, atol=1e-8)


def test_a_radius_of_zero_is_plain_training():
    models = [tiny_lm().double() for _ in range(2)]
    (ids,) = sequences(1)
    quiet(models[0], [ids], plain(attack=Attack(radius=Linear(0.0, 1.0, 4))), optimizer=sgd(models[0]))
    loss = F.cross_entropy(models[1](models[1].embedding(ids))[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    expected = vector(models[1]) - torch.cat([p.grad.flatten() for p in models[1].parameters()])
    torch.testing.assert_close(vector(models[0]), expected, rtol=1e-12, atol=1e-13)


def test_only_what_may_be_attacked_is():
    model, (ids,) = tiny_lm(), sequences(1)
    attack_mask = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 1, 1, 1]])
    mask = torch.tensor([[1] * 5, [1] * 4 + [0]])
    batch = prepared({"input_ids": ids, "attack_mask": attack_mask, "attention_mask": mask}, CPU, True)
    assert batch.inputs.keys() == {"attention_mask"}
    assert batch.labels[0].tolist() == [*ids[0, 1:].tolist(), -100]
    assert batch.labels[1].tolist() == [*ids[1, 1:4].tolist(), -100, -100]
    seen = []
    arguments = (
        policy_of(model),
        batch,
        plain().objective,
        objectives.ScheduledValues.at(plain().objective, 0),
    )
    counts = objectives.Counts.of([batch], plain().objective)
    objectives.terms_of(model, *arguments, counts, torch.Generator(), lambda *a: seen.append(a))
    moved = (seen[0][0].points - seen[0][0].x).abs().amax((0, -1)) > 0
    # the last token of a row is not read by any loss: its gradient is zero
    assert torch.equal(moved, (attack_mask * mask).bool() & (batch.labels >= 0))


def test_points_of_a_trajectory_in_one_forward():
    """``batch_steps``: what the model needs of the batch goes with it."""
    batch = {"input_ids": sequences(1)[0], "attention_mask": torch.tensor([[1] * 5, [1] * 3 + [0] * 2])}
    ends = []
    for size in (1, 2):
        model = tiny_lm().double()
        penalty = Penalty(weight=0.5, steps="all", batch_steps=size)
        quiet(model, [batch], plain(penalty=penalty), optimizer=sgd(model))
        ends.append(vector(model))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-12, atol=1e-13)


def test_inputs_that_all_rows_share_need_no_batch_axis():
    ids = sequences(1)[0]
    ends = []
    for rows in (1, len(ids)):
        batch = {"input_ids": ids, "inputs_mask": torch.tensor([[1, 1, 1, 1, 0]]).expand(rows, 5)}
        model = tiny_lm().double()
        model.forward = lambda inputs_embeds, inputs_mask=None, _model=model, **other: TinyLM.forward(
            _model, inputs_embeds, inputs_mask
        )
        quiet(model, [batch], plain(penalty=Penalty(weight=0.5)), optimizer=sgd(model))
        ends.append(vector(model))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-12, atol=1e-13)


def test_agents_of_a_batch():
    """Two agents, and a token of none; one direction for each of the two."""
    agents = torch.tensor([[0, 0, 1, -1, 1], [1, 1, 0, 0, -1]])
    batch = {"input_ids": sequences(1)[0], "agents": agents}
    attack = Attack(radius=0.5, steps=2, step_size=0.3, scope="agent")
    actual = []
    for per_agent in (False, True):
        config = plain(attack=attack, penalty=Penalty(weight=0.5, per_agent=per_agent), learning_rate=1e-3)
        actual.append(quiet(tiny_lm(), [batch], config).rows[0])
    assert actual[0]["attack_worst"] == actual[1]["attack_worst"] > actual[0]["attack_start"]
    assert 0 < actual[1]["penalty"] != actual[0]["penalty"] > 0


def test_what_the_optimizer_does_not_hold_stays():
    model = tiny_lm()
    before = model.up.weight.detach().clone()
    quiet(model, sequences(2), plain(steps=3), optimizer=torch.optim.SGD(model.head.parameters(), lr=0.1))
    assert torch.equal(model.up.weight, before) and not torch.equal(model.head.weight, tiny_lm().head.weight)


def test_training_lowers_the_loss_under_attack():
    model = tiny_lm()
    config = fit_config(
        steps=60, attack=Attack(radius=0.3, steps=2), penalty=Penalty(weight=0.05), learning_rate=0.03
    )
    rows = quiet(model, sequences(1), config).rows
    assert len(rows) == 60 and rows[-1]["attack_worst"] < 0.7 * rows[0]["attack_worst"]
    assert not any(p.grad is not None and p.grad.isnan().any() for p in model.parameters())


# -- schedules ------------------------------------------------------------------------------------------------------


def test_schedules():
    assert [Linear(1.0, 3.0, 4, begin=1)(t) for t in (0, 1, 3, 5, 9)] == [1.0, 1.0, 2.0, 3.0, 3.0]
    assert [Cosine(2.0, 0.0, 4)(t) for t in (0, 2, 4, 7)] == pytest.approx([2.0, 1.0, 0.0, 0.0])
    assert [WarmUp(4, 8.0)(t) for t in (0, 1, 3, 9)] == [2.0, 4.0, 8.0, 8.0]
    assert value_at(lambda t: t / 2, 3, "x") == 1.5


def test_scheduled_numbers_are_used():
    model = tiny_lm()
    config = fit_config(
        steps=3,
        attack=Attack(radius=Linear(0.1, 0.3, 2), steps=1),
        penalty=Penalty(weight=WarmUp(2, 0.4), gamma=lambda t: 0.1 * t),
        learning_rate=Cosine(1e-2, 0.0, 4),
    )
    rows = quiet(model, sequences(2), config).rows
    assert [r["radius"] for r in rows] == pytest.approx([0.1, 0.2, 0.3])
    assert [r["weight"] for r in rows] == pytest.approx([0.2, 0.4, 0.4])
    assert [r["gamma"] for r in rows] == pytest.approx([0.0, 0.1, 0.2])
    assert [r["learning_rate"] for r in rows] == pytest.approx([Cosine(1e-2, 0.0, 4)(t) for t in range(3)])


# -- what is not finite, and bad input ------------------------------------------------------------------------------


def poisoned(ids: torch.Tensor) -> dict:
    embeds = torch.randn(*ids.shape, 6)
    embeds[0, 0] = math.nan
    return {"inputs_embeds": embeds, "labels": ids}


@pytest.mark.parametrize("radius", [0.0, 0.5])
def test_a_loss_that_is_not_finite_stops_before_the_parameters_change(radius, tmp_path):
    model, (a, b) = tiny_lm(), sequences(2)
    config = plain(steps=2, attack=Attack(radius=radius, steps=1), checkpoint_every=1)
    with pytest.raises(
        NonFiniteLossError, match=r"step 2 is not finite .*newest checkpoint is .*step-00000001"
    ):
        quiet(model, [a, poisoned(b)], config, out=tmp_path)
    saved = tiny_lm(seed=5)
    assert training.load_checkpoint(tmp_path, saved) == 1
    assert torch.equal(vector(saved), vector(model)) and model.training
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_steps_that_are_not_finite_can_be_skipped():
    model, (a, b, c) = tiny_lm(), sequences(3)
    result = quiet(model, [a, poisoned(b), c], plain(steps=3, non_finite="skip"))
    assert result.skipped == 1 and vector(model).isfinite().all()
    assert result.rows[1]["loss"] is None and result.rows[2]["loss"] > 0
    with pytest.raises(NonFiniteLossError, match="step 2 "):
        quiet(model, [poisoned(b)], plain(steps=3, non_finite="skip", max_skips=2))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (3, "a batch must be a mapping or a tensor of token ids, got int"),
        ({"labels": torch.zeros(1, 3).long()}, "either input_ids or inputs_embeds, got labels"),
        (torch.zeros(1, 3), r"input_ids must be integers \[B, N\], got torch.float32"),
        ({"inputs_embeds": torch.zeros(1, 3, 6)}, "labels must be in a batch that holds inputs_embeds"),
        (
            {"input_ids": torch.zeros(1, 3).long(), "attack_mask": torch.ones(1, 2)},
            r"attack_mask must have the shape \(1, 3\) of the tokens, got \(1, 2\)",
        ),
        (torch.zeros(2, 1).long(), "labels must name at least one token"),
        (
            {"input_ids": torch.zeros(1, 3).long(), "attack_mask": torch.zeros(1, 3)},
            "mask",
        ),
    ],
)
def test_bad_batches(batch, message):
    with pytest.raises((TypeError, ValueError), match=message):
        quiet(tiny_lm(), [batch], plain())


def test_bad_arguments(tmp_path):
    model, data = tiny_lm(), sequences(1)
    for call, message in [
        (lambda: quiet(3, data, plain()), "model must be an nn.Module, got int"),
        (lambda: quiet(torch.nn.Linear(2, 2), data, plain()), "model must take inputs_embeds=, which Linear"),
        (lambda: quiet(model, data, {"steps": 1}), "config must be a FitConfig, got dict"),
        (lambda: quiet(model, 3, plain()), "batches must be an iterable or a function"),
        (lambda: quiet(model, [], plain()), "batches ended after 0"),
        (lambda: quiet(model, iter(data), plain(steps=2)), "batches ended after 1"),
        (lambda: quiet(TinyLM().requires_grad_(False), data, plain()), "must have a parameter that requires"),
        (
            lambda: quiet(model, data, plain(), optimizer=sgd(tiny_lm())),
            "optimizer must hold only parameters of model",
        ),
        (lambda: Attack(scope="word"), "scope must be one of sequence, token, agent, got 'word'"),
        (lambda: Attack(step_size=0), "step_size must be 'auto' or a positive number, got 0"),
        (lambda: Penalty(metric="kl"), "metric must be one of l2, logits, fisher, probs, got 'kl'"),
        (lambda: quiet(model, data, plain(), scheduler=object()), "scheduler goes with the optimizer"),
        (
            lambda: quiet(model, data, plain(adversarial_weight=0.0, penalty=Penalty("none"))),
            "does not depend on",
        ),
        (
            lambda: quiet(model, data, plain(), out=tmp_path, evaluate=lambda m: 1),
            "evaluate must return numbers",
        ),
        (lambda: FitConfig(steps=0), "steps must be an integer >= 1, got 0"),
        (lambda: FitConfig(steps=1, autocast=torch.float16), "autocast must be torch.bfloat16 or None"),
        (lambda: FitConfig(steps=1, learning_rate=-1.0), "learning_rate must be finite and >= 0"),
        (lambda: Attack(radius="big"), "radius must be a number or a function"),
        (lambda: Penalty("aline"), "method must be one of none, aligned"),
        (lambda: Penalty(form="hinge"), "gamma must be given with form='hinge'"),
        (lambda: Penalty("spectral", direction="sign"), "direction goes with method='aligned'"),
        (lambda: Linear(0.0, 1.0, 0), "steps of a schedule must be at least 1"),
        (
            lambda: value_at(lambda t: -1.0, 2, "weight"),
            "weight must be finite and >= 0 at every step, got -1.0",
        ),
        (lambda: Diagnostics(1, power_iterations=2), "power_iterations needs smoothness=True"),
    ]:
        with warnings.catch_warnings(), pytest.raises((TypeError, ValueError), match=message):
            call()
