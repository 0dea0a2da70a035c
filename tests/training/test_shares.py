"""A weight as a share of the loss, a bound as a share of the quantile at the start."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from training.test_constraint import counting
from training.tiny_lm import ATTACK, plain, quiet, sequences, tiny_lm

from aajr_kernels.training import (
    Constraint,
    FitConfig,
    Linear,
    Objective,
    ObjectiveConfig,
    Penalty,
    Share,
)


def test_a_share_is_found_at_the_first_step_whose_penalty_is_positive():
    """The radius is 0 in the first step; the step that measures trains on the loss only."""
    attack = dataclasses.replace(ATTACK, radius=lambda step: 0.5 * (step > 0))
    options = dict(attack=attack, adversarial_weight=0.7, clean_weight=0.3, learning_rate=1e-2)
    settings = plain(steps=5, penalty=Penalty(weight=Share(Linear(0.1, 0.3, 4))), **options)
    model, twin = tiny_lm(), tiny_lm()
    rows = quiet(model, sequences(5), settings).rows
    first = rows[1]
    scale = (0.7 * first["adversarial_loss"] + 0.3 * first["clean_loss"]) / first["penalty"]
    assert [row["weight"] for row in rows[:2]] == [0.0, 0.0]
    assert [row["weight"] for row in rows[2:]] == pytest.approx(
        [scale * s for s in (0.2, 0.25, 0.3)], rel=1e-6
    )
    without = quiet(
        twin, sequences(5), dataclasses.replace(plain(steps=2, penalty=Penalty("none"), **options))
    ).rows
    assert [row["loss"] for row in rows[:3]][:2] == [row["loss"] for row in without]


def test_the_default_penalty_has_a_share_of_the_loss():
    penalty = ObjectiveConfig().penalty
    assert penalty.weight == Share(0.1) and ObjectiveConfig().attack.relative
    rows = quiet(tiny_lm(), sequences(3), FitConfig(steps=3)).rows
    assert rows[1]["weight"] * rows[0]["penalty"] == pytest.approx(
        0.1 * rows[0]["adversarial_loss"], rel=1e-6
    )


def test_gamma_is_a_share_of_the_quantile_at_the_start():
    """Of 22 tokens a step, 60 are three steps; the weight is of the loss in the first of them."""
    penalty = Constraint(gamma=Share(0.5), quantile=0.9, window=60)
    model = tiny_lm()
    objective = Objective(model, ObjectiveConfig(attack=ATTACK, penalty=penalty))
    seen, add = [], objective.multiplier.add
    objective.multiplier.add = lambda *a: (seen.append(a), add(*a))
    for step, ids in enumerate(counting(batch=2)[:4]):
        objective(ids, step=step)
    assert [gamma for *_, gamma in seen[:3]] == [None] * 3
    values = torch.cat([units[~units.isnan()] for *_, units, _ in seen[:3]]).sqrt().sort().values
    gamma = 0.5 * float(values[math.ceil(0.9 * 66) - 1])
    assert seen[3][-1] == pytest.approx(gamma, rel=1e-6)
    assert objective.scheduled(3).weight == pytest.approx(0.1 * float(seen[0][1]) / gamma, rel=1e-6)


def test_a_share_that_is_not_found():
    for penalty, message in (
        (
            Penalty(weight=Share(within=2), gamma=1e6),
            r"weight=.*positive number in 2 steps with a penalty, got loss 2.* penalty 0: lower",
        ),
        (
            Constraint(gamma=Share(within=2)),
            r"gamma=.*in 2 steps with a penalty, got 16 units of 500, .*set window lower",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            quiet(tiny_lm(), sequences(4), plain(steps=4, penalty=penalty))
