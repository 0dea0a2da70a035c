"""The language model at equal bounds: what is measured, and the analysis on made-up rows whose answers are known."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

import torch

import aajr_kernels as aajr
from experiments import equal, equal_bound_lm, load
from experiments.equal_bound_lm import training
from experiments.equal_bound_lm.report import binding, is_valid, paired, primaries
from experiments.language_model import models
from experiments.language_model.text import in_turns, scene_of

CONFIG = load("equal-bound-lm").config(False)
QUICK = load("equal-bound-lm").config(True)


def batch(rows=2):
    ids = torch.randint(0, 256, (rows, QUICK["length"]), generator=torch.Generator().manual_seed(1))
    return in_turns(ids, QUICK["turn"])


def test_what_is_measured():
    """√q of the package's penalty over sequences, in norms of a token; the largest direction moves more."""
    from aajr_kernels.training import policy_of

    model = models.small(QUICK, 0)
    scene = scene_of(model, policy_of(model), batch())
    traj = training.ascent(QUICK, scene, 3)
    assert traj.scope == "sequence" and len(traj) == 3
    _, aux = aajr.trajectory_penalty(
        *(scene.policy.forward, traj.x, traj),
        head=scene.policy.head,
        mask=scene.labels != -100,
        unit="sequence",
    )
    unit = scene.unit
    hinge, roots = training.measure(scene, traj, "aligned", 2, 0.0)
    torch.testing.assert_close(roots, unit * aux.units.flatten().sqrt(), rtol=1e-4, atol=1e-6)
    assert hinge.item() == pytest.approx(roots.mean().item(), rel=1e-4)
    gamma = roots.median().item()
    above, _ = training.measure(scene, traj, "aligned", 2, gamma)
    assert above.item() == pytest.approx((roots - gamma).relu().mean().item(), rel=1e-3)
    once, often = (training.measure(scene, traj, "spectral", n)[1] for n in (1, 6))
    assert (once >= roots * (1 - 1e-4)).all() and (often >= once * (1 - 1e-4)).all()
    assert often.sum() > 1.01 * roots.sum()


@pytest.mark.parametrize("method", ["aligned", "spectral", "none", "more"])
def test_training_leaves_the_embeddings(method):
    model = models.small(QUICK, 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bound = 0.01 if method in ("aligned", "spectral") else None
    course = training.tune(QUICK, model, [batch()] * 4, method, bound)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and not any("embed_tokens" in name for name in changed)
    assert (course["multiplier"] is None) == (bound is None) and course["seconds_per_step"] > 0


def made_up(gap):
    """Clean loss linear in the log of the realised ‖J u‖, which is γ for AAJR and 0.8 γ for the global bound."""
    rows = []
    for task in load("equal-bound-lm").tasks(CONFIG):
        facts = {name: task.arguments[name] for name in ("seed", "method", "gamma")}
        method, gamma, seed = facts["method"], facts["gamma"], facts["seed"]
        at_start = 2.0 + 0.1 * seed
        share = 0.9 if gamma is None else gamma * (0.8 if method == "spectral" else 1.0)
        noise = 0.001 * (len(method) * (seed + 3) ** 2 % 5 - 2)
        loss = 2 - 0.3 * math.log(share) + noise + (gap if method == "aligned" else 0.0)
        above = {"aligned_above": 0.1, "spectral_above": 0.1} if gamma is not None else {}
        stability = {"kappa": 0.1, "kappa_positive": 1.0, "smoothness": 2.0, "expansion": 1.1}
        rows.append(
            facts
            | {
                "bound": None if gamma is None else gamma * at_start,
                "at_start": at_start,
                "realised": share * at_start,
                "seconds_per_step": 2.0 if method == "more" else 1.0,
                "multiplier": None,
                "validation": {"aligned": share * at_start, "spectral": at_start, **above},
                "test": {"nominal": loss, "robust": loss + 1 + (0.2 if method == "more" else 0.0)},
                "stability": stability,
                "task": task.key,
                "seconds": 1.0,
            }
        )
    return rows


@pytest.mark.parametrize("gap", [-0.1, 0.1, 0.0])
def test_primaries_of_either_sign(gap):
    rows = made_up(gap)
    assert binding(CONFIG, rows) == CONFIG["gammas"] == [0.35, 0.2]
    (_, at_bound), (_, realised) = equal.judged(primaries(CONFIG, rows))
    assert at_bound.interval[0] == pytest.approx(gap + 0.3 * math.log(0.8), abs=3e-3)
    assert realised.interval[0] == pytest.approx(gap, abs=3e-3)
    assert at_bound.verdict == ("higher" if gap > 0.07 else "lower")
    assert realised.verdict == ("equivalent" if gap == 0 else "lower" if gap < 0 else "higher")


def test_invalid_runs_and_pairs():
    rows = made_up(-0.1)
    run = dict(method="spectral", gamma=0.2)
    valid = [is_valid(CONFIG, run | {"validation": {"spectral_above": v}}) for v in (0.05, 0.06, 0.14, 0.15)]
    assert valid == [False, True, True, False]
    for row in rows:
        if (row["method"], row["gamma"]) == ("spectral", 0.2) or row["seed"] == 0:
            row["validation"] = row["validation"] | {"spectral_above": 0.5}
    a, b = primaries(CONFIG, rows)
    assert (len(a.differences), len(b.differences)) == (9, 10)
    robust = lambda row: row["test"]["robust"]
    mean, low, high = paired(rows, ("aligned", 0.35), ("more", None), robust)
    assert low < mean < high
    assert mean == pytest.approx(-0.3 * math.log(0.35 / 0.9) - 0.3, abs=3e-3)


def test_the_page(tmp_path):
    environment = dict(dirty=False, torch="2", python="3", cpu="c", machine="m", commit="0")
    text = load("equal-bound-lm").report(
        {"config": CONFIG, "environment": environment}, made_up(-0.1), tmp_path
    )
    assert "At the same realised ‖J u‖ AAJR's clean loss is lower in 1, higher in 0" in text
    assert "| no bound, more ascent steps | 0.90 | - | 2.00 |" in text
    assert (tmp_path / "equal-bound-lm.png").stat().st_size > 10_000


@pytest.mark.slow
def test_rows():
    tasks = load("equal-bound-lm").tasks(QUICK)
    assert len({task.key for task in tasks}) == len(tasks) == 2 * 6
    for task in tasks[:4]:
        (row,) = equal_bound_lm.work(**task.arguments)
        assert row["test"]["robust"] >= 0 and 0 < row["realised"] <= 1.01 * row["at_start"] * 10
        assert row["validation"]["aligned"] <= row["validation"]["spectral"] * 1.001
        assert (row["bound"] is None) == (row["gamma"] is None)
