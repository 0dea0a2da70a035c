"""step_size="auto": the condition κ‖Δ‖² ≤ ⟨g, Δ⟩ on problems whose curvature is known, and what it costs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import aajr_kernels as aajr

B, N, C = 4, 3, 5
AGENTS = torch.tensor([[0, 0, 1]]).expand(B, N)
EVERY = list(itertools.product(("normalized", "raw", "sign"), ("l2", "linf"), ("sequence", "token", "agent")))


def quadratic(scale=1.0):
    """Concave loss per row with Hessian −A Aᵀ · scale, and its negative curvature along any displacement."""
    root = torch.randn(N * C, N * C, dtype=torch.float64) * scale**0.5
    slope = torch.randn(N * C, dtype=torch.float64)

    def loss(x):
        flat = x.flatten(1)
        return flat @ slope - 0.5 * (flat @ root).square().sum(-1)

    return loss, lambda displacement: (displacement.flatten(1) @ root).square().sum(-1), slope


@pytest.mark.parametrize(("step", "norm", "scope"), EVERY)
def test_the_condition_holds_where_the_curvature_is_known(step, norm, scope):
    """κ‖Δ‖² = Δᵀ A Aᵀ Δ is exact for a quadratic; rounding is about 1e-16 of losses up to about 1e3."""
    moves = 0
    for scale in (0.01, 1.0, 100.0):
        loss, bend, _ = quadratic(scale)
        x = torch.randn(B, N, C, dtype=torch.float64)
        traj = aajr.ascend(
            loss,
            x,
            radius=1.0,
            steps=6,
            step=step,
            norm=norm,
            scope=scope,
            agents=AGENTS if scope == "agent" else None,
            keep_gradients=True,
        )
        for t in range(6):
            delta, g = traj.displacements[t], traj.gradients[t]
            rising = (g * delta).flatten(1).sum(-1)
            slack = 1e-12 * traj.losses[t].abs()
            assert (bend(delta) <= rising + slack).all()
            assert (traj.losses[t + 1] - traj.losses[t] >= 0.5 * rising - slack).all()
            moves += int((traj.step_sizes[t] > 0).sum())
        assert (traj.losses[-1] > traj.losses[0]).all()
    assert moves > 3 * B  # every row moved at every curvature, most of them more than once


@pytest.mark.parametrize(("step", "norm", "scope"), EVERY)
def test_trained_like_networks_rise_at_every_step(step, norm, scope):
    net = nn.Sequential(nn.Flatten(), nn.Linear(N * C, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(4)
    loss = lambda x: nn.functional.cross_entropy(net(x), torch.arange(B) % 3, reduction="none").sin()
    x = torch.randn(B, N, C, dtype=torch.float64)
    agents = AGENTS if scope == "agent" else None
    traj = aajr.ascend(loss, x, radius=2.0, steps=8, step=step, norm=norm, scope=scope, agents=agents)
    assert (traj.losses.diff(dim=0) >= -1e-14).all()
    assert (traj.losses[-1] > traj.losses[0]).all()
    rising = (traj.displacements.flatten(2) != 0).any(-1)
    assert torch.equal(rising, traj.step_sizes > 0)


def test_it_steps_back_where_a_given_step_overshoots():
    loss, _, slope = quadratic(100.0)
    x = torch.zeros(B, N, C, dtype=torch.float64)
    fixed = aajr.ascend(loss, x, radius=1.0, steps=3, step_size=2.5 / 3)
    assert (fixed.losses[-1] < fixed.losses[0]).all()
    auto = aajr.ascend(loss, x, radius=1.0, steps=3)
    assert (auto.losses.diff(dim=0) > 0).all()
    calls, without = auto.evaluations
    assert calls + without > 4  # there were backtracks, and each is counted
    # rows step back alone: a row of gentle curvature beside them goes where it goes by itself
    mixed = lambda z: torch.cat([loss(z[:2]), z[2:].flatten(1) @ slope])
    both = aajr.ascend(mixed, x, radius=1.0, steps=3)
    alone = aajr.ascend(lambda z: z.flatten(1) @ slope, x[2:], radius=1.0, steps=3)
    assert torch.allclose(both.points[:, 2:], alone.points, rtol=0, atol=1e-14)


def test_a_step_without_backtracks_costs_what_a_given_one_costs():
    net = nn.Linear(C, 2).double()
    convex = lambda z: net(z).exp().flatten(1).sum(-1)
    x = torch.randn(B, N, C, dtype=torch.float64)
    auto, fixed = (aajr.ascend(convex, x, radius=1.0, steps=4, step_size=s) for s in ("auto", 0.1))
    assert auto.evaluations == fixed.evaluations == (4, 1)
    plane = aajr.ascend(lambda z: net(z).flatten(1).sum(-1), x, radius=1.0, steps=4)
    assert torch.allclose((plane.points[-1] - x).flatten(1).norm(dim=-1), torch.ones(B, dtype=x.dtype))
    # the far end of the ball is reached in two steps; that nothing more is to be had shows without an evaluation
    assert plane.evaluations == (3, 0) and (plane.step_sizes[2:] == 0).all()


def test_the_sizes_returned_reproduce_the_way():
    for step, norm, scope in EVERY:
        loss, _, _ = quadratic(10.0)
        x = torch.randn(B, N, C, dtype=torch.float64)
        options = dict(radius=1.0, steps=4, step=step, norm=norm, scope=scope, agents=AGENTS)
        auto = aajr.ascend(loss, x, **options)
        fixed = aajr.ascend(loss, x, **options, step_size=auto.step_sizes.clamp(min=1e-300))
        assert torch.allclose(auto.points, fixed.points, rtol=0, atol=1e-12)


def test_sizes_from_outside_leave_no_graph():
    loss, _, _ = quadratic()
    sizes = torch.full((B,), 0.1, dtype=torch.float64, requires_grad=True)
    traj = aajr.ascend(loss, torch.randn(B, N, C, dtype=torch.float64), radius=1.0, steps=2, step_size=sizes)
    assert not traj.step_sizes.requires_grad and not traj.points.requires_grad
    assert torch.equal(traj.step_sizes, sizes.detach().expand(2, B))


def test_no_step_where_none_is_allowed():
    loss, _, _ = quadratic(1e6)
    x = torch.zeros(B, N, C, dtype=torch.float64)  # next to the top of a steep hill
    traj = aajr.ascend(loss, x, radius=1.0, steps=2, max_backtracks=0)
    assert (traj.step_sizes == 0).all() and torch.equal(traj.points[-1], x)
    assert torch.equal(traj.losses[0], traj.losses[2])


def test_float32_rises_up_to_rounding():
    net = nn.Sequential(nn.Flatten(), nn.Linear(N * C, 16), nn.Tanh(), nn.Linear(16, 3))
    loss = lambda x: nn.functional.cross_entropy(8 * net(x), torch.arange(B) % 3, reduction="none")
    traj = aajr.ascend(loss, torch.randn(B, N, C), radius=3.0, steps=10)
    rise = traj.losses.diff(dim=0)
    assert (rise >= -8 * torch.finfo(torch.float32).eps * traj.losses[1:].abs()).all()
    assert (traj.losses[-1] > traj.losses[0] + 0.1).all()
