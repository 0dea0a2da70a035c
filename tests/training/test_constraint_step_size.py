"""A bound on the smoothness along realised steps, from a step size."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn
from training.test_constraint import counting, written_out
from training.tiny_lm import (
    ATTACK,
    fit_config,
    quiet,
    tiny_lm,
)

from aajr_kernels.method import ascend
from aajr_kernels.training import (
    Constraint,
    Linear,
    Multiplier,
    Objective,
    ObjectiveConfig,
    Penalty,
    Share,
)

AUTO = Constraint(gamma="auto", step_size=0.1, weight=1.0, window=4, rate=0.2, quantile=0.75)


def test_gamma_comes_from_the_step_and_the_measured_second_order():
    """γ² = (1/η − C) / L_out with C at the quantile of the window; λ follows the share of L_eff above 1/η."""
    multiplier, zero = Multiplier(AUTO), torch.zeros(())

    def settle(step, smoothness, second_order, bound):
        multiplier.follow_smoothness(step, torch.tensor(smoothness), torch.tensor(second_order), bound)
        multiplier.add(step, zero, zero, torch.ones(7), None)
        multiplier.settle()
        return multiplier.at(step + 1)

    assert settle(0, [[9.0, math.nan]], [[2.0, 99.0]], 0.5) == (None, None)  # one of four rows
    weight, gamma = settle(
        1, [[11.0], [4.0], [9.0]], [[6.0], [1.0], [3.0]], torch.tensor([[1.0], [1.5], [1.0]])
    )
    assert gamma == pytest.approx(math.sqrt((10 - 3.0) / 1.0)) and weight == 1.0
    assert multiplier.facts["violation"] == 0.25 and multiplier.facts["second_order"] == 3.0
    weight, gamma = settle(2, [[11.0, 12.0, 13.0, 1.0]], [[1.0, 2.0, 9.0, 0.0]], 2.0)
    assert gamma == pytest.approx(math.sqrt((10 - 2.0) / 2.0)) and weight == pytest.approx(math.exp(0.2))
    with pytest.warns(
        RuntimeWarning, match=r"infeasible at step 4: the second-order term C, 12 .* = 10, whatever"
    ):
        assert settle(3, [[13.0] * 4], [[12.0] * 4], 2.0) == (pytest.approx(math.exp(0.4)), 0.0)
    assert settle(4, [[13.0] * 4], [[12.0] * 4], 2.0)[1] == 0.0  # warned once
    assert multiplier.facts["infeasible"] == 1.0 and multiplier.facts["violation"] == 1.0
    weight, gamma = settle(5, [[3.0] * 4], [[1.0] * 4], 1.0)
    assert (weight, gamma) == (pytest.approx(math.exp(0.4)), 3.0) and multiplier.facts["infeasible"] == 0.0


@pytest.mark.parametrize("scope", ["token", "sequence"])
@pytest.mark.parametrize("follow", ["training", "validation"])
def test_the_smoothness_along_realised_steps(scope, follow):
    """L_out q + G_out ‖ΔJd‖/ℓ of every row and step of the mean loss, by jvp, in the unit of a relative attack."""
    model, (ids,) = tiny_lm().double(), counting(1, batch=3, length=6)
    attack = dataclasses.replace(ATTACK, relative=True, scope=scope)
    penalty = dataclasses.replace(AUTO, window=6, follow=follow)
    objective = Objective(model, ObjectiveConfig(attack=attack, penalty=penalty))
    seen = []
    objective.multiplier.follow_smoothness = lambda step, *values: seen.append(values)
    mask = torch.tensor([1, 0, 1, 1, 0, 0]).expand(3, 6)
    batch = {"input_ids": ids, "attack_mask": mask}
    objective(batch) if follow == "training" else objective.measure(batch)
    ((smoothness, second_order, bound),) = seen
    x, labels = model.embedding(ids).detach(), ids.roll(-1, 1).index_fill(1, torch.tensor([5]), -100)
    unit = float(x.square().sum(-1).mean().sqrt())
    losses = lambda x: nn.functional.cross_entropy(model(x).mT, labels, reduction="none").sum(1) / 5
    lengths = dict(radius=0.5 * unit, steps=2, step_size=0.3 * unit)
    traj = ascend(losses, x, **lengths, scope=scope, mask=mask, module=model)
    for t, delta in enumerate(traj.displacements):
        length = delta.flatten(1).norm(dim=1)
        d, tangents, q = delta / length.view(3, 1, 1), [], []
        for point in traj.points[t : t + 2]:
            z, z_tan = torch.func.jvp(written_out(model), (point,), (d,))
            p = z.softmax(-1)
            q.append((p * (z_tan - (p * z_tan).sum(-1, keepdim=True)).square()).sum(-1)[:, :5].sum(1))
            tangents.append(z_tan[:, :5])
        change = (tangents[1] - tangents[0]).norm(dim=-1).sum(1) / length
        second = math.sqrt(2) / 5 * change
        torch.testing.assert_close(second_order[t], unit**2 * second, rtol=1e-6, atol=1e-9)
        whole = torch.maximum(*q) / 5 + second
        torch.testing.assert_close(smoothness[t], unit**2 * whole, rtol=1e-6, atol=1e-9)
        # five tokens of √q = γ along u, of norm 1 in each of the three that move; or the whole row
        factor = 1 / 5 if scope == "sequence" else (1 / 5) * 5 / 3
        torch.testing.assert_close(bound[t], torch.full((3,), factor, dtype=torch.float64))


@pytest.mark.parametrize("share", [0.8, pytest.param(0.5, marks=pytest.mark.slow)])
def test_the_smoothness_is_held_at_one_over_the_step(share):
    """At a share of what it is at the end without a penalty, the most of which is C: it is infeasible on the way."""

    def smoothness(penalty: Penalty) -> tuple[torch.Tensor, list]:
        model, seen = tiny_lm(), []
        settings = dict(steps=150, attack=ATTACK, learning_rate=Linear(0.02, 0.0, 150))
        rows = quiet(model, counting(), fit_config(**settings, penalty=penalty)).rows
        objective = Objective(model, ObjectiveConfig(attack=ATTACK, penalty=AUTO))
        objective.multiplier.follow_smoothness = lambda step, values, *more: seen.append(values.flatten())
        for ids in counting():
            objective(ids)
        return torch.cat(seen), rows

    free, _ = smoothness(Penalty("none"))
    goal = share * float(free.quantile(0.95))
    with pytest.warns(RuntimeWarning, match="the constraint is infeasible at step"):
        ours, rows = smoothness(Constraint(gamma="auto", step_size=1 / goal, window=120))
    print(float((free <= goal).double().mean()), float((ours <= goal).double().mean()), rows[-1])
    assert float((free <= goal).double().mean()) < 0.85 and float((ours <= goal).double().mean()) >= 0.9
    assert rows[-1]["binding"] == 1.0


def test_an_infeasible_step_is_reported_and_the_training_goes_on(tmp_path):
    pytest.importorskip("safetensors")
    penalty = Constraint(gamma="auto", step_size=1e6, window=40)
    settings = fit_config(steps=8, attack=ATTACK, penalty=penalty, learning_rate=1e-3)
    with pytest.warns(
        RuntimeWarning, match=r"infeasible at step 2: .* leaves nothing of 1/step_size = 1e-06"
    ):
        rows = quiet(tiny_lm(), counting(), settings, out=tmp_path).rows
    assert len(rows) == 8 and [row["gamma"] for row in rows] == [None, None, *[0.0] * 6]
    assert rows[-1]["infeasible"] == 1.0 and rows[-1]["multiplier"] > rows[2]["multiplier"] > 0
    page = (tmp_path / "report.md").read_text()
    assert "steps of the ascents had a smoothness above 1/η = 1e-06 where 5.0% may be" in page
    assert "It was infeasible in 7 of 8 logged steps: C left nothing of 1/η" in page


def test_gamma_auto_is_half_of_the_quantile_at_the_start():
    gammas = []
    for gamma in ("auto", Share(0.5)):
        settings = fit_config(steps=3, attack=ATTACK, penalty=Constraint(gamma=gamma, window=60))
        gammas.append([row["gamma"] for row in quiet(tiny_lm(), counting(), settings).rows])
    assert gammas[0] == gammas[1] and gammas[0][-1] > 0
