"""The unit of a penalty follows the scope of its directions, so that quantities with defaults are of one scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

import aajr_kernels as aajr
from aajr_kernels.method import baseline_penalty, trajectory_baseline
from aajr_kernels.training import Attack, ObjectiveConfig, Penalty

B, N, C, V = 3, 4, 5, 6
AGENTS = torch.tensor([[0, 0, 1, 1]]).expand(B, N)


def problem(**scope: Any) -> tuple[torch.Tensor, Callable[[Any], Any], torch.Tensor, aajr.Trajectory]:
    """Weight, policy and input of a linear map per token, and an ascent on a loss of its output."""
    weight, x = torch.randn(C, V, dtype=torch.float64), torch.randn(B, N, C, dtype=torch.float64)
    loss = lambda z: (z @ weight).sin().flatten(1).sum(1)
    traj = aajr.ascend(loss, x, radius=1.0, steps=3, step_size=0.3, **scope)
    return weight, (lambda z: z @ weight), x, traj


@pytest.mark.parametrize(
    "scope", [{}, {"scope": "sequence"}, {"scope": "token"}, {"scope": "agent", "agents": AGENTS}]
)
def test_defaults_compare_on_one_scale(scope: dict[str, Any]) -> None:
    """The penalty of a linear map lies under its squared norm, and reaches it along the top direction."""
    weight, policy, x, traj = problem(**scope)
    top = torch.linalg.matrix_norm(weight, 2).square()
    per_agent = scope.get("scope") == "agent"
    ours, statistics = aajr.trajectory_penalty(policy, x, traj, metric="l2", per_agent=per_agent)
    bound, _ = trajectory_baseline("spectral", policy, traj, metric="l2", iterations=200)
    norm, _ = trajectory_baseline("frobenius", policy, traj, metric="l2", samples=4000)
    torch.testing.assert_close(bound, top, rtol=1e-6, atol=0)
    assert 0.1 * bound < ours < bound
    if not per_agent:  # joint directions of two agents have norm √2
        aligned, _ = trajectory_baseline("aligned", policy, traj, metric="l2")
        torch.testing.assert_close(aligned, ours)
    torch.testing.assert_close(norm, N * weight.square().sum(), rtol=0.05, atol=0)
    u = torch.linalg.svd(weight).U[:, 0].expand(B, N, C)
    if scope.get("scope") != "token":
        u = aajr.normalize(u, "sequence")
    along = baseline_penalty("aligned", policy, x, u, metric="l2", scope=scope.get("scope"), agents=AGENTS)
    torch.testing.assert_close(along, top)
    assert statistics.q.shape == (3, 2 if per_agent else 1)


def test_gamma_of_a_report_is_that_of_the_penalty() -> None:
    for scope in ("sequence", "token"):
        _, policy, x, traj = problem(scope=scope)
        _, statistics = aajr.trajectory_penalty(policy, x, traj, metric="l2", gamma=1.5, form="hinge")
        loss = lambda z: policy(z).sin().flatten(1).sum(1)
        report = aajr.stability_report(loss, x, traj, func=policy, metric="l2", gamma=1.5, curvature="none")
        assert report.hinge_active is not None
        torch.testing.assert_close(report.hinge_active.mean(1), statistics.active[:, 0])


CALLS: dict[str, Callable[..., Any]] = {
    "trajectory_penalty": lambda p, x, traj, **unit: aajr.trajectory_penalty(p, x, traj, **unit),
    "trajectory_baseline": lambda p, x, traj, **unit: trajectory_baseline("random", p, traj, **unit),
    "of the map": lambda p, x, traj, **unit: trajectory_baseline("spectral", p, traj, **unit),
    "stability_report": lambda p, x, traj, **unit: aajr.stability_report(
        lambda z: p(z).sin().flatten(1).sum(1), x, traj, func=p, gamma=0.1, **unit
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_mixed_pair_names_both(name: str) -> None:
    """Scopes and units, the scope first by default and then named."""
    call = CALLS[name]
    _, policy, x, default = problem()
    call(policy, x, default)
    call(policy, x, default, unit="sequence")
    with pytest.raises(
        ValueError, match=r"unit='token' does not go with scope='sequence', the default of"
    ) as error:
        call(policy, x, default, unit="token")
    assert "name both" in str(error.value) and "\n" not in str(error.value)
    for scope, unit in (("sequence", "token"), ("token", "sequence")):
        _, policy, x, named = problem(scope=scope)
        call(policy, x, named, unit=unit)


def test_a_mixed_pair_of_a_baseline_at_a_point_names_both() -> None:
    _, policy, x, _ = problem()
    with pytest.raises(
        ValueError, match=r"unit='token' does not go with scope='sequence', .* baseline_penalty\("
    ):
        baseline_penalty("random", policy, x, unit="token")
    for scope in ("sequence", "token"):
        for unit in ("sequence", "token", None):
            baseline_penalty("random", policy, x, scope=scope, unit=unit)


def test_training_names_both_too() -> None:
    own = ObjectiveConfig()
    assert (own.scope, own.unit) == ("token", "token")
    for scope, unit in (("sequence", "sequence"), ("agent", "sequence"), ("token", "token")):
        assert ObjectiveConfig(attack=Attack(scope=scope)).unit == unit
    with pytest.raises(
        ValueError, match=r"unit='sequence' does not go with scope='token', the default of Attack"
    ):
        ObjectiveConfig(penalty=Penalty(unit="sequence"))
    for scope, unit in (("sequence", "token"), ("agent", "token"), ("token", "sequence")):
        mixed = ObjectiveConfig(attack=Attack(scope=scope), penalty=Penalty(unit=unit))
        assert (mixed.scope, mixed.unit) == (scope, unit)


def test_replacing_an_entry_of_an_objective_names_nothing_else() -> None:
    """A default stays a default when another part of the configuration is replaced."""
    assert dataclasses.replace(ObjectiveConfig(), attack=Attack(scope="sequence")).unit == "sequence"
    with pytest.raises(ValueError, match="unit='sequence' does not go with scope='token'"):
        dataclasses.replace(ObjectiveConfig(), penalty=Penalty(unit="sequence"))


@pytest.mark.parametrize("method", ["frobenius", "spectral"])
def test_norms_of_the_whole_jacobian_are_per_sequence_in_training(method: str) -> None:
    for attack in (Attack(), Attack(scope="token"), Attack(scope="sequence")):
        assert ObjectiveConfig(attack=attack, penalty=Penalty(method)).unit == "sequence"
    assert ObjectiveConfig(penalty=Penalty(method, unit="token")).unit == "token"
