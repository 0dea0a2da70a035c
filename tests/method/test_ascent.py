"""ascend against projected gradient ascent written out by hand in float64, and what it leaves alone."""

from __future__ import annotations

import math

import pytest
import torch
from budgets import assert_exact
from torch import nn

import aajr_kernels as aajr

B, N, C = 3, 4, 5
MASK = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
AGENTS = torch.tensor([[0, 0, 1, 2], [2, 2, -1, 0], [1, 1, 1, 1]])


class Victim(nn.Module):
    """A smooth loss per row that mixes its tokens, so that every row has curvature of both signs."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(N * C, 7)
        self.out = nn.Linear(7, 1)
        self.double()

    def forward(self, x):
        return torch.sin(2 * self.out(torch.tanh(self.up(x.flatten(1)))).squeeze(-1))


def problem():
    return Victim(), torch.randn(B, N, C, dtype=torch.float64)


# -- projected gradient ascent by hand, one batch row and one group at a time


def groups_by_hand(scope, row):
    """Lists of tokens of one batch row that share a norm."""
    if scope == "sequence":
        return [list(range(N))]
    if scope == "token":
        return [[i] for i in range(N)]
    return [[i for i in range(N) if AGENTS[row, i] == a] for a in range(int(AGENTS.max()) + 1)]


def ascent_by_hand(loss, x, radius, sizes, step, norm, scope, mask):
    points, directions, norms, losses = [x], [], [], []
    delta = torch.zeros_like(x)
    for size in [*sizes, None]:
        point = (x + delta).requires_grad_()
        value = loss(point)
        losses.append(value.detach())
        if size is None:
            break
        (g,) = torch.autograd.grad(value.sum(), point)
        delta, u, lengths = delta.clone(), torch.zeros_like(x), []
        for b in range(B):
            free = [i for i in range(N) if mask is None or mask[b, i]]
            if scope == "agent":
                free = [i for i in free if AGENTS[b, i] >= 0]
            for group in groups_by_hand(scope, b):
                members = [i for i in group if i in free]
                part = g[b, members]
                length = math.sqrt(sum(float(v) ** 2 for v in part.flatten()))
                lengths.append(length)
                if not members:
                    continue
                u[b, members] = part / length
                move = {"raw": part, "normalized": part / length, "sign": part.sign()}[step]
                moved = delta[b, members] + size * move
                if norm == "linf":
                    moved = moved.clamp(-radius, radius)
                else:
                    far = math.sqrt(sum(float(v) ** 2 for v in moved.flatten()))
                    moved = moved * min(1.0, radius / far)
                delta[b, members] = moved
        points.append(x + delta)
        directions.append(u)
        norms.append(torch.tensor(lengths, dtype=x.dtype).reshape(B, -1))
    return [torch.stack(v) for v in (points, directions, norms, losses)]


@pytest.mark.parametrize("scope", ["sequence", "token", "agent"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("step", ["normalized", "raw", "sign"])
@pytest.mark.parametrize("mask", [None, MASK])
def test_every_step_norm_and_scope_against_ascent_by_hand(step, norm, scope, mask):
    loss, x = problem()
    agents = AGENTS if scope == "agent" else None
    larger = 20 if step == "raw" else 1
    for radius, size in ((0.05, 0.2 * larger), (5.0, 0.01)):  # the ball is met; it is not
        traj = aajr.ascend(
            loss,
            x,
            radius=radius,
            steps=4,
            step_size=size,
            step=step,
            norm=norm,
            scope=scope,
            mask=mask,
            agents=agents,
        )
        points, directions, norms, losses = ascent_by_hand(
            loss, x, radius, [size] * 4, step, norm, scope, mask
        )
        for name, ours, theirs in (
            ("points", traj.points, points),
            ("directions", traj.directions, directions),
            ("displacements", traj.displacements, points.diff(dim=0)),
            ("gradient norms", traj.gradient_norms, norms),
            ("losses", traj.losses, losses),
        ):
            assert_exact(ours, theirs, name, tolerance=1e-11)
        assert traj.projected.any() == (radius < 1)
        assert torch.equal(traj.step_sizes, torch.full((4, B), size, dtype=x.dtype))
        assert len(traj) == 4 and traj.scope == scope
