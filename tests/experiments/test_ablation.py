"""The experiment on where the penalty is measured: its measurements, its choice, its analysis, a run of seconds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from aajr_kernels.training import policy_of
from experiments import load
from experiments.ablation import runs, training
from experiments.ablation.report import COMPARISON, default_of
from experiments.base import run_experiment
from experiments.language_model import models, text
from experiments.statistics import t_interval
from experiments.store import Store

FULL, QUICK = load("ablation").config(False), load("ablation").config(True)


def speech(size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    return 97 + (torch.arange(size) * 3 + torch.randint(3, (size,), generator=generator)) % 20


@pytest.fixture
def scene():
    """In float64: tangents are compared with differences."""
    model = models.small(QUICK, 0).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return text.scene_of(model, policy_of(model), text.in_turns(speech(96).reshape(3, 32), 8))


def fisher(scene, point, v):
    """Σ p(ż − Σ p ż)² over the scored tokens of every row, ``[B]``, ż from central differences."""
    h = 1e-6
    logits = lambda x: scene.modules[0](inputs_embeds=x).logits
    with torch.no_grad():
        slope = (logits(point + h * v) - logits(point - h * v)) / (2 * h)
        p = logits(point).softmax(-1)
    q = (p * (slope - (p * slope).sum(-1, keepdim=True)).square()).sum(-1)
    return q * (scene.labels != -100)


def test_measurements_are_those_of_the_page(scene):
    traj = training.ascent(QUICK, scene, 3)
    scored = int((scene.labels != -100).sum())
    gradients = []
    for point in traj.points:
        x = point.clone().requires_grad_()
        gradients.append(torch.autograd.grad(scene.loss(x).sum(), x)[0] * scene.mask.unsqueeze(-1))
    unit = torch.nn.functional.normalize
    per_token = [unit(g, dim=-1) for g in gradients]
    per_row = [unit(g.flatten(1), dim=-1).reshape(g.shape) for g in gradients]
    by_hand = {
        "start": sum(fisher(scene, traj.points[t], per_token[t]).sum() / scored for t in range(3)) / 3,
        "rows": sum(fisher(scene, traj.points[t], per_row[t]).sum(-1).mean() for t in range(3)) / 3,
    }
    rows = torch.arange(3)
    assert (traj.worst_index > 0).all()
    taken = torch.stack(per_token)[traj.worst_index - 1, rows]
    by_hand["end"] = fisher(scene, traj.points[traj.worst_index, rows], taken).sum() / scored
    for place, expected in by_hand.items():
        assert training.measured(scene, traj, place)[0].item() == pytest.approx(expected.item(), rel=1e-5)
    assert len({round(value.item(), 6) for value in by_hand.values()}) == 3


def test_the_loss_of_the_shared_forward_is_that_at_the_worst_point(scene):
    traj = training.ascent(QUICK, scene, 2)
    penalty, aux = training.measured(scene, traj, "end", weight=0.3)
    assert aux.primal.item() == pytest.approx(scene.loss(traj.worst).mean().item(), rel=1e-9)
    assert penalty.item() == pytest.approx(training.measured(scene, traj, "end")[0].item(), rel=1e-9)


def tuned(place, **options):
    model = models.small(QUICK, 0)
    batches = [text.in_turns(speech(64 + i)[:64].reshape(2, 32), 8) for i in range(2)]
    history = training.tune(
        QUICK, model, batches, place, **{"steps": 2, "mix": 1.0, "weight": 0.0, **options}
    )
    return torch.cat([p.detach().flatten() for p in model.parameters()]), history


def test_methods_share_everything_but_the_penalty():
    plain, history = tuned(None)
    for place in ("end", "start", "rows"):
        without, same = tuned(place)
        torch.testing.assert_close(without, plain, rtol=1e-4, atol=1e-5)
        assert same["adversarial_loss"] == pytest.approx(history["adversarial_loss"], rel=1e-5)
        assert (tuned(place, weight=10.0)[0] - plain).abs().max() > 1e-4
    assert (tuned(None, steps=4)[0] - plain).abs().max() > 1e-4
    assert (tuned(None, mix=3.0)[0] - plain).abs().max() > 1e-4
    # embeddings are not trained
    embedding = models.small(QUICK, 0).get_input_embeddings().weight.flatten()
    assert torch.equal(plain[: len(embedding)], embedding)


def run(w, weight, nominal, robust):
    return {"w": w, "weight": weight, "validation": {"nominal": nominal, "robust": robust}}


def test_w_and_the_weight_are_chosen_together():
    rows = [run(1, 0.1, 2.0, 9.0), run(1, 0.2, 2.1, 3.0), run(3, 0.1, 2.104, 2.9), run(3, 0.2, 2.2, 1.0)]
    assert runs.chosen(rows, 2.1, 0.01) == 2  # both w have a run near the target: the more robust of the two
    assert runs.chosen(rows, 2.1, 0.001) == 1  # only one of them has
    assert runs.chosen(rows, 2.0, 0.05) == 0
    assert runs.chosen(rows, 5.0, 0.01) == 3  # none has: the nearest one
    searched = [run(8.0, 0.0, 2.09, 1.0), run(9.0, 0.0, 2.1, 2.0)]  # without a penalty w itself is the knob
    assert runs.chosen(searched, 2.1, 0.05) == 1


def row(method, seed, robust, **more):
    test = {"clean": 2.0, "embedding": [robust, 3.0], "substitution": [2.0, 2.5], "kappa": 0.1}
    losses = {"validation": {"nominal": 2.0, "robust": robust}, "target": 2.001}
    common = {"w": 1.0, "knob": 0.3, "seconds_per_step": 2.0 if method == "rows" else 1.0, "seconds": 1.0}
    return {
        "method": method,
        "seed": seed,
        "chosen": True,
        "test": test,
        "task": "t",
        **losses,
        **common,
        **more,
    }


def made(**shift):
    """Ten seeds: every method's robust loss is 2.5 plus its shift and noise of its own."""
    noise = np.random.default_rng(0).normal(0, 0.005, (10, len(COMPARISON.names)))
    return [
        row(method, seed, 2.5 + shift.get(method, 0.0) + noise[seed, place])
        for seed in range(10)
        for place, method in enumerate(COMPARISON.names)
    ]


def test_the_rule_for_the_default():
    assert default_of(made()) == "end"
    assert default_of(made(rows=-0.1)) == "rows"
    assert default_of(made(rows=-0.1, start=-0.2)) == "start"
    assert default_of(made(rows=0.1, start=0.1)) == "end"
    # better than the default measurement, but worse than no penalty: no reason to change
    assert default_of(made(end=0.2, rows=0.1)) == "start"
    assert default_of(made(end=0.2, rows=0.1, start=0.1)) == "end"


def test_primaries_and_page(tmp_path):
    rows = made(start=-0.1)
    primaries = COMPARISON.primaries(rows)
    assert len(primaries) == 8 and {name for *_, name in primaries} == {"robust"}
    assert primaries["start", "none", "robust"].verdict == "lower"
    assert primaries["rows", "end", "robust"].verdict == "equivalent"
    differences = COMPARISON.paired(rows, "start", "none", "robust")
    assert primaries["start", "none", "robust"].interval == t_interval(differences)
    environment = dict(dirty=False, torch="2", python="3", cpu="c", machine="m", commit="0")
    page = load("ablation").report({"config": FULL, "environment": environment}, rows, tmp_path)
    assert "leaves as default: **all, start, per token**" in page and "within ±0.02" in page
    assert "| all, start, over the row | 1 in 10, 3 in 0 |" in page and "2.00 [2.00, 2.00]" in page
    assert (tmp_path / "ablation.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_small_run(monkeypatch, tmp_path):
    parts = text._text(speech(4000), speech(1001), speech(1002))
    monkeypatch.setattr(runs, "plays", lambda: parts)
    runs._start.cache_clear()
    store = Store(tmp_path / "rows.jsonl", "ablation", QUICK)
    run_experiment(load("ablation"), store, quick=True)
    runs._start.cache_clear()
    for seed in range(2):
        own = [r for r in store.rows if r["seed"] == seed]
        assert len({r["target"] for r in own}) == 1
        for method in COMPARISON.names:
            of_method = [r for r in own if r["method"] == method]
            cells = 2 if runs.METHODS[method] else 1
            assert len(of_method) == cells * QUICK["budget"][method]
            assert [r["chosen"] for r in of_method].count(True) == 1
            assert all(math.isfinite(r["validation"]["robust"]) for r in of_method)
