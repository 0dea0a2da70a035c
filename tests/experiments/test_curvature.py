"""The experiment on curvature: its rows, the sensitivity that fit measures, its page."""

from __future__ import annotations

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from experiments import curvature, load

QUICK = load("curvature").config(True)


@pytest.mark.slow
def test_rows_and_page(tmp_path):
    digits = [row for seed in range(2) for row in curvature.work(QUICK, "digits", seed)]
    assert [row["method"] for row in digits] == list(QUICK["digits"]["weights"]) * 2
    for row in digits:
        # each term bounds its part of the curvature
        assert row["smoothness"] == pytest.approx(row["gauss_newton"] + row["second_order"])
        assert max(row["kappa"], row["kappa_positive"]) <= row["smoothness"] and row["expansion"] > 0
    summary = {
        name: digits[0][name] for name in ("kappa", "kappa_positive", "kappa_max", "kappa_positive_max")
    }
    summary |= {name: digits[0][name] for name in ("gauss_newton", "second_order", "smoothness", "expansion")}
    made = {"q_taken": 1.0, "q_token": 2.0, "q_sequence": 4.0, "token_norm": 0.5, "cost": 3.0}
    language = [{"part": "language", "method": "none", **summary, **made, "seed": seed} for seed in range(2)]
    rows = [{**row, "task": "t", "seconds": 1.0} for row in digits + language]
    environment = dict(dirty=False, torch="2", python="3", cpu="c", machine="m", commit="0")
    page = load("curvature").report({"config": QUICK, "environment": environment}, rows, tmp_path)
    assert '(`steps="worst"`) | 0.25 [0.25, 0.25] | 0.25 [0.25, 0.25] |' in page
    assert (tmp_path / "curvature.png").stat().st_size > 10_000


def test_the_direction_taken_is_that_of_the_default_penalty():
    """Its sensitivity per unit length is the mean over tokens of ``steps="worst"``, in the scope of tokens."""
    import aajr_kernels as aajr
    from aajr_kernels.training import Attack, Objective, ObjectiveConfig, Penalty
    from experiments.language_model import models, text
    from experiments.language_model.training import batches_of

    config = QUICK["language"]
    model = models.small(config, 0)
    (batch,) = batches_of(config, text.plays().test, 1, 0)
    penalty = Penalty(weight=0.1, steps="worst")
    objective = Objective(model, ObjectiveConfig(Attack(radius=config["radius"]), penalty))
    measured = curvature._sensitivities(config, objective, batch)
    prepared, policy = objective.prepared(batch), objective.policy
    x, unit = prepared.embedded(policy).detach(), measured["token_norm"]
    traj = aajr.ascend(
        *(policy.loss_fn(prepared.inputs, prepared.labels, "mean"), x),
        radius=config["radius"] * unit,
        steps=config["inner"]["steps"],
        step_size=config["inner"]["step"] * config["radius"] * unit,
        scope="token",
        mask=prepared.attackable,
    )
    scored = prepared.tokens("loss")
    penalty, _ = aajr.trajectory_penalty(
        lambda x: policy.forward(x, **prepared.inputs), x, traj, steps="worst", head=policy.head, mask=scored
    )
    moving = traj.directions[0].square().sum(-1).round().sum(-1)
    assert (moving == moving[0]).all()
    per_row = penalty.item() * scored.sum().item() / len(x) / moving[0].item()
    assert measured["q_taken"] == pytest.approx(per_row, rel=1e-4)
