"""The penalty on every k-th step, and on rows drawn at random: what is computed when, and that it is unbiased."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from training.tiny_lm import ATTACK, fit_config, plain, quiet, sequences, tiny_lm, vector

from aajr_kernels.training import Objective, ObjectiveConfig, Penalty, WarmUp
from aajr_kernels.training import objective as objectives
from aajr_kernels.training.scheduled import ScheduledValues

BATCH = {
    "input_ids": sequences(1, batch=3, length=6)[0],
    "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1, 1, 1] + [0] * 3]),
}


def gradients(terms, model) -> torch.Tensor:
    grads = torch.autograd.grad(terms.total, list(model.parameters()), allow_unused=True)
    return torch.cat(
        [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(model.parameters(), grads)]
    )


# -- every k-th step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adversarial", [1.0, 0.0])
def test_every_kth_step_has_k_times_the_weight(adversarial):
    """The schedule is read at the step; between, there is no penalty, and without another use no attack."""
    penalty = Penalty(weight=WarmUp(4, 0.4), every=2)
    losses = dict(adversarial_weight=adversarial, clean_weight=0.5)
    rows = quiet(tiny_lm(), sequences(2), plain(steps=5, penalty=penalty, **losses)).rows
    assert [row["weight"] for row in rows] == pytest.approx([0.0, 0.4, 0.0, 0.8, 0.0])
    assert ["penalty" in row for row in rows] == [False, True, False, True, False]
    assert ["attack_worst" in row for row in rows] == (
        [True] * 5 if adversarial else [False, True] * 2 + [False]
    )
    lazy, eager, none = (
        ObjectiveConfig(attack=ATTACK, penalty=p, **losses)
        for p in (penalty, replace(penalty, every=1, weight=0.4), Penalty("none"))
    )
    for step, other in ((0, none), (1, eager)):
        model, twin = tiny_lm(), tiny_lm()
        ours = Objective(model, lazy)(BATCH, step=step)
        torch.testing.assert_close(
            gradients(ours, model), gradients(Objective(twin, other)(BATCH, step=step), twin), rtol=0, atol=0
        )


def test_a_penalty_without_a_loss_has_nothing_to_learn_between_its_steps():
    config = plain(steps=2, penalty=Penalty(weight=0.1, every=2), adversarial_weight=0.0)
    with pytest.raises(ValueError, match=r"does not depend .* with Penalty\(every=\) a loss has a weight"):
        quiet(tiny_lm(), sequences(1), config)
    objective = Objective(tiny_lm(), config.objective)
    assert not objective.penalty(BATCH, step=0).total.requires_grad  # it is added to a loss of another kind
    assert objective.penalty(BATCH, step=1).total.requires_grad


# -- rows drawn at random -------------------------------------------------------------------------------------------


def expectation(monkeypatch, config, batch, part: float) -> tuple[torch.Tensor, dict[str, float]]:
    """Mean of gradients and parts over all draws with their probabilities."""
    count = len(batch["input_ids"])
    alone = not (config.adversarial_weight or config.clean_weight)
    expected = max(part * count, 1.0) if alone else part * count
    model = tiny_lm().double()
    total, parts = torch.zeros(vector(model).numel(), dtype=torch.float64), Counter()
    for number in range(count + 1):
        chance = max(0.0, 1 - abs(expected - number))  # of the two numbers around the expectation
        subsets = list(itertools.combinations(range(count), number)) if chance else []
        for rows in subsets:
            drawn = None if number == count else torch.tensor(rows, dtype=torch.int64)
            monkeypatch.setattr(objectives.Work, "drawn", lambda *_, d=drawn: (d, expected / count))
            terms = Objective(model, config)(batch)
            total += chance / len(subsets) * gradients(terms, model)
            for name, value in terms.parts.items():
                parts[name] += chance / len(subsets) * float(value)
    return total, parts


@pytest.mark.parametrize("part", [0.25, 0.5, 0.9])
@pytest.mark.parametrize(
    ("penalty", "losses"),
    [
        (Penalty(weight=0.2, steps="worst"), (1.0, 0.0)),
        (Penalty(weight=0.2, steps="all", tokens="attention", gamma=0.05), (0.7, 0.3)),
        (Penalty(weight=0.2, steps="worst", unit="sequence", gamma=0.05, form="hinge"), (0.0, 1.0)),
        (Penalty("input_gradient", weight=0.2, steps="worst"), (0.0, 0.0)),
        (Penalty("cure", weight=0.2, steps="worst"), (1.0, 0.5)),
    ],
    ids=lambda p: p.method + " " + p.steps if isinstance(p, Penalty) else f"{p}",
)
def test_rows_drawn_at_random_are_unbiased(penalty, losses, part, monkeypatch):
    config = ObjectiveConfig(
        attack=replace(ATTACK, relative=True),
        penalty=penalty,
        adversarial_weight=losses[0],
        clean_weight=losses[1],
    )
    model = tiny_lm().double()
    every_row = Objective(model, config)(BATCH)
    lazy = replace(config, penalty=replace(penalty, rows=part))
    mean, parts = expectation(monkeypatch, lazy, BATCH, part)
    torch.testing.assert_close(mean, gradients(every_row, model), rtol=1e-11, atol=1e-13)
    expected = {name: float(value) for name, value in every_row.parts.items() if name != "q_max"}
    assert {name: parts[name] for name in expected} == pytest.approx(expected, rel=1e-11)
    assert expected["penalty"] > 0


def test_rows_are_drawn_with_equal_chances_anew_at_every_step():
    config = plain(penalty=Penalty(rows=0.5)).objective
    model, seen = tiny_lm(), Counter()
    objective = Objective(model, config)
    batch = objective.prepared(BATCH)
    scheduled, x = ScheduledValues.at(config, 0), model.embedding(batch.input_ids)
    trials = 2000
    for step in range(trials):
        generator = torch.Generator().manual_seed(step)
        work = objectives.Work(
            model, objective.policy, batch, config, None, generator, None, x, x.new_ones(())
        )
        rows, share = work.drawn(scheduled)
        assert share == 0.5 and len(rows) in (1, 2) and rows.tolist() == sorted(set(rows.tolist()))
        seen.update(rows.tolist())
    # five standard deviations of a binomial
    assert all(abs(seen[row] - trials / 2) < 5 * (trials / 4) ** 0.5 for row in range(3)), seen


def test_rows_without_a_draw_cost_no_penalty_and_no_attack(monkeypatch):
    """One row in a micro-batch: in half of them nothing is drawn."""
    config = plain(penalty=Penalty(weight=0.2, rows=0.5), adversarial_weight=0.0, clean_weight=1.0).objective
    model = tiny_lm()
    objective, one = Objective(model, config), {name: value[:1] for name, value in BATCH.items()}
    attacked = [float(objective(one, step=step).parts["penalty"]) > 0 for step in range(40)]
    assert 8 < sum(attacked) < 32
    assert attacked == ["attack_worst" in objective(one, step=step).parts for step in range(40)]
    alone = Objective(model, replace(config, clean_weight=0.0))
    assert all(float(alone(one, step=step).parts["penalty"]) > 0 for step in range(10))


def test_rows_that_cannot_be_attacked():
    """A draw without an attackable token: the whole batch is attacked, and the penalty of these rows is zero."""
    batch = BATCH | {"attack_mask": torch.tensor([[0, 1, 1, 1, 1, 1], [0] * 6, [0] * 6])}
    config = plain(penalty=Penalty(weight=0.2, rows=0.34), adversarial_weight=0.0, clean_weight=1.0).objective
    penalties = [float(Objective(tiny_lm(), config)(batch, step=step).parts["penalty"]) for step in range(20)]
    assert any(p > 0 for p in penalties) and any(p == 0 for p in penalties)


def test_arguments_of_the_model_are_those_of_the_rows():
    model = tiny_lm()
    config = plain(penalty=Penalty(weight=0.2, rows=0.5)).objective
    batch = Objective(model, config).prepared(BATCH | {"scale": torch.ones(1), "name": "x"})
    part = batch.of_rows(torch.tensor([0, 2]))
    assert torch.equal(part.inputs["attention_mask"], BATCH["attention_mask"][[0, 2]])
    assert part.inputs["scale"].shape == (1,) and part.inputs["name"] == "x" and part.inputs_embeds is None
    strange = Objective(model, config).prepared(BATCH | {"bias": torch.ones(2, 3)})
    with pytest.raises(
        ValueError, match=r"its 3 rows as their first axis .* got shape \(2, 3\): set Penalty\(rows=1\)"
    ):
        strange.of_rows(torch.tensor([0]))


def test_bad_values():
    for options, message in [
        (dict(every=0), "every must be an integer >= 1, got 0"),
        (dict(every=2.0), "every must be an integer >= 1, got 2.0"),
        (dict(rows=0.0), r"rows must be in \(0, 1\], got 0.0"),
        (dict(rows=1.5), r"rows must be in \(0, 1\], got 1.5"),
        (dict(rows="half"), "rows must be a Python number, got str"),
        (dict(rows=0.5, per_agent=True), "rows must be 1 with per_agent=True"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            Penalty(**options)


def test_a_step_of_one_process_depends_on_its_place_only():
    """Draws of a micro-batch are those of its index in the step, whatever was computed before."""
    config = fit_config(steps=1, attack=ATTACK, penalty=Penalty(weight=0.2, every=3, rows=0.5)).objective
    model = tiny_lm()
    first = gradients(Objective(model, config)(BATCH, step=2, part=1), model)
    torch.rand(5), Objective(model, config)(BATCH, step=1, part=0)
    assert torch.equal(gradients(Objective(model, config)(BATCH, step=2, part=1), model), first)
