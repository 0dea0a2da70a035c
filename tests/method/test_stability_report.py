"""A stability report as an object: dropout and flags, low precision, how it is written down, and bad input."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_exact
from method.paths import B, N, V, output_loss, problem, steps_of
from torch import nn

import aajr_kernels as aajr
from aajr_kernels.method import StabilityReport, Trajectory, probes, stability_report


def test_dropout_draws_one_mask_and_the_random_state_is_put_back():
    net = nn.Sequential(nn.Linear(N, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, V)).double()
    x = torch.randn(B, N, dtype=torch.float64)
    state = torch.get_rng_state()

    def loss_fn(x):
        return output_loss(net(x))

    def repeated(x):
        torch.set_rng_state(state)
        return loss_fn(x)

    traj = steps_of(repeated, x, 0.5)
    torch.set_rng_state(state)
    report = stability_report(loss_fn, x, traj, samples=4, module=net)
    assert torch.equal(torch.get_rng_state(), state)
    fixed = stability_report(repeated, x, traj, samples=4)
    assert torch.equal(report.kappa, fixed.kappa) and torch.equal(report.slopes, fixed.slopes)
    assert all(p.requires_grad for p in net.parameters())


def test_nothing_reaches_the_parameters(policy):
    loss_fn, x = problem(policy)
    traj = steps_of(loss_fn, x, 0.4)
    report = stability_report(
        *(loss_fn, x, traj), func=policy, output_loss=output_loss, power_iterations=2, gamma=1.0
    )
    assert all(p.grad is None for p in policy.parameters())
    assert not any(v.requires_grad for v in vars(report).values() if v is not None)


def test_float32_and_no_grad_agree_with_float64(policy):
    loss_fn, x = problem(policy)
    traj = steps_of(loss_fn, x, 0.4)
    exact = stability_report(loss_fn, x, traj)
    single = Trajectory(
        **{
            k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in vars(traj).items()
        }
    )
    net = policy.float()
    with torch.no_grad():
        report = stability_report(lambda x: output_loss(net(x)), x.float(), single)
    # displacements are differences of points of size 1 and hold about 1e-6 relative; curvature amplifies it little
    assert_exact(report.kappa, exact.kappa, "kappa", tolerance=1e-4)
    policy.double()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_loss_of_a_language_model_carries_tangents(softcap):
    body, last = nn.Linear(N, 7).double(), nn.Linear(7, V).double()
    x = torch.randn(B, 4, N, dtype=torch.float64)
    labels = torch.tensor([[0, 3, -100, 1], [-100, -100, 4, 2], [1, 1, 1, 1]])
    hidden = lambda x: torch.tanh(body(x))
    head = aajr.LMHead(last.weight, last.bias, scale=1.5, softcap=softcap)
    loss_fn = aajr.lm_loss(hidden, head=head, labels=labels)

    def written_out(x):
        z = 1.5 * last(hidden(x))
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        nll = -z.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return (nll * (labels >= 0)).sum(1) / (labels >= 0).sum(1)

    traj = aajr.ascend(loss_fn, x, radius=1.0, steps=3, step_size=0.5)
    report = stability_report(loss_fn, x, traj, module=[body, last])
    expected = stability_report(written_out, x, traj)
    assert expected.kappa.max() > 0
    assert_exact(report.kappa, expected.kappa, "kappa")
    assert_exact(report.slopes, expected.slopes, "slopes")


def test_a_trajectory_whose_last_loss_was_left_out(policy, tmp_path):
    loss_fn, x = problem(policy)
    traj = aajr.ascend(loss_fn, x, radius=1.0, steps=3, step_size=5.0, evaluate_last=False)
    whole = aajr.ascend(loss_fn, x, radius=1.0, steps=3, step_size=5.0)
    report, expected = stability_report(loss_fn, x, traj), stability_report(loss_fn, x, whole)
    assert torch.isnan(report.gains[-1]).all() and not report.non_monotone[-1].any()
    assert torch.equal(report.non_monotone[:-1], expected.non_monotone[:-1])
    assert torch.equal(report.kappa, expected.kappa)
    known = expected.non_monotone[:-1][expected.moved[:-1]].double().mean().item()
    assert report.summary()["non_monotone_fraction"] == known
    report.append_jsonl(tmp_path / "rows.jsonl", 0)
    assert json.loads((tmp_path / "rows.jsonl").read_text())["summary"]["loss_end"] is None


@pytest.mark.parametrize("scope", ["sequence", "token", "agent"])
def test_trajectories_of_ascend_in_every_scope(scope):
    net = nn.Sequential(nn.Linear(N, 7), nn.Tanh(), nn.Linear(7, V)).double()
    x = torch.randn(B, 4, N, dtype=torch.float64)
    labels = torch.randint(V, (B, 4))
    output_loss = lambda z: (
        F.cross_entropy(z.flatten(0, 1), labels.flatten(), reduction="none").view(B, 4).sum(1)
    )
    loss_fn = lambda x: F.cross_entropy(net(x).transpose(1, 2), labels, reduction="none").sum(1)
    agents = torch.tensor([[0, 1, 1, -1]] * B) if scope == "agent" else None
    traj = aajr.ascend(
        *(loss_fn, x), radius=0.5, steps=4, step_size=0.4, scope=scope, agents=agents, mask=labels != 0
    )
    report = stability_report(
        *(loss_fn, x, traj), func=net, output_loss=output_loss, power_iterations=30, gamma=0.5, samples=17
    )
    assert report.projected.any() and not report.unexplained.any()
    rounding = 1 + 1e-9
    assert (report.sandwich_lower <= report.sandwich_middle * rounding).all()
    assert (report.sandwich_middle <= report.spectral_norm * (1 + 1e-3)).all()  # as far as it has converged
    assert (report.kappa <= report.smoothness * rounding).all()
    inside = report.moved & (traj.step_sizes <= report.eta_max)
    assert inside.any() and not (inside & report.non_monotone).any()


def test_json_lines_and_tensorboard(policy, tmp_path):
    loss_fn, x = problem(policy)
    report = stability_report(loss_fn, x, steps_of(loss_fn, x, 0.4), func=policy)
    path = tmp_path / "rows.jsonl"
    report.append_jsonl(path, 7, run="a")
    report.append_jsonl(path, 8)
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert (first["step"], first["run"], second["step"]) == (7, "a", 8)
    assert first["summary"]["kappa"] == pytest.approx(report.kappa.mean().item())
    assert first["steps"]["kappa"] == pytest.approx(report.kappa.mean(1).tolist())
    assert "spectral_norm" not in first["summary"]

    written = {}
    report.log(SimpleNamespace(add_scalar=lambda tag, value, step: written.update({tag: (value, step)})), 3)
    assert written["stability/kappa_max"] == (report.kappa.max().item(), 3)
    assert written["stability/kappa/step_2"] == (pytest.approx(report.kappa[2].mean().item()), 3)
    with pytest.raises(TypeError, match="writer must be"):
        report.log(3, 3)


def test_tensorboard_files(policy, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loss_fn, x = problem(policy)
    report = stability_report(loss_fn, x, steps_of(loss_fn, x, 0.4))
    report.log(tmp_path, 5, prefix="inner")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Scalars("inner/kappa_max")
    assert event.step == 5 and event.value == pytest.approx(report.kappa.max().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvature": "guess"}, "curvature must be one of exact, difference, none"),
        ({"samples": 1}, "samples must be an integer >= 2"),
        ({"samples": 2.5}, "samples must be an integer >= 2"),
        ({"metric": "probs"}, "metric must be one of l2, logits, fisher"),
        ({"unit": "word"}, "unit must be one of"),
        ({"gamma": 1.0}, "gamma needs func="),
        ({"gamma": -1.0}, "gamma must be a finite number"),
        ({"power_iterations": 3}, "power_iterations needs func="),
        ({"power_iterations": -3}, "power_iterations must be"),
        ({"output_loss": output_loss}, "output_loss needs func="),
    ],
)
def test_bad_options(policy, options, message):
    loss_fn, x = problem(policy)
    traj = steps_of(loss_fn, x, 0.4, t=1)
    with pytest.raises(ValueError, match=message):
        stability_report(loss_fn, x, traj, **options)


def test_bad_functions(policy):
    loss_fn, x = problem(policy)
    traj = steps_of(loss_fn, x, 0.4, t=1)
    with pytest.raises(ValueError, match="x must be the input of traj"):
        stability_report(loss_fn, x[:1], traj)
    with pytest.raises(ValueError, match="one loss per batch row"):
        stability_report(lambda x: loss_fn(x).mean(), x, traj)
    with pytest.raises(ValueError, match="does not depend on its input"):
        stability_report(lambda x: loss_fn(x.detach()), x, traj)
    with pytest.raises(ValueError, match="does not depend on its input"):
        stability_report(lambda x: loss_fn(x.detach()), x, traj, curvature="difference")
    with pytest.raises(ValueError, match="output_loss must return one loss"):
        stability_report(loss_fn, x, traj, func=policy, output_loss=lambda y: y.sum())
    with pytest.raises(ValueError, match="unsqueeze the last axis"):
        stability_report(loss_fn, x, traj, func=loss_fn)
    with pytest.raises(TypeError, match="model output with .logits"):
        stability_report(loss_fn, x, traj, func=lambda x: SimpleNamespace(y=x))


def test_power_iteration_survives_an_unlucky_start_and_a_constant():
    weight = torch.tensor([[0.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    x, start = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    norm, v = probes.spectral_norm(lambda x: x @ weight, x, start, 3)
    assert norm == 0 and torch.equal(v, start)  # no component along the top direction, and no NaN
    norm, _ = probes.spectral_norm(lambda x: x @ weight, x, start + 0.1, 3)
    assert_exact(norm, torch.tensor([3.0]), "norm")


def test_a_report_is_frozen(policy):
    loss_fn, x = problem(policy)
    report = stability_report(loss_fn, x, steps_of(loss_fn, x, 0.4, t=1))
    assert isinstance(report, StabilityReport) and report.alignment.shape == (0, B)
    with pytest.raises(AttributeError):
        report.kappa = None
