"""Balls and scopes: projection onto the nearest point, uniform draws, norms that do not underflow."""

from __future__ import annotations

import math

import pytest
import torch
from assertions import assert_exact

from aajr_kernels.method.projection import Ball
from aajr_kernels.method.scopes import Groups

SHAPE = (2, 3, 4)
AGENTS = torch.tensor([[0, 1, 0], [-1, 2, 2]])


def groups(scope):
    return Groups(scope, SHAPE, AGENTS if scope == "agent" else None)


@pytest.mark.parametrize("scope", ["sequence", "token", "agent"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_projection_finds_the_nearest_point_of_the_ball(norm, scope):
    owned = (AGENTS >= 0).unsqueeze(-1) if scope == "agent" else torch.ones(2, 3, 1, dtype=torch.bool)
    ball = Ball(norm, 0.7, groups(scope))
    far = 3 * torch.randn(SHAPE, dtype=torch.float64) * owned
    near = ball.project(far)
    size = near.abs().amax() if norm == "linf" else groups(scope).norm(near).amax()
    assert 0.7 - 1e-12 <= size <= 0.7 * (1 + 1e-12)
    assert_exact(ball.project(near), near, "projected again", tolerance=1e-14)
    inside = 0.1 * torch.rand(SHAPE, dtype=torch.float64) * owned
    assert torch.equal(ball.project(inside), inside)
    for _ in range(200):  # the nearest point p of a convex set has <far - p, y - p> <= 0 for every y in it
        y = ball.draw(owned, far, None)
        assert ((far - near) * (y - near)).sum() <= 1e-12


@pytest.mark.parametrize("scope", ["sequence", "token", "agent"])
def test_norms_and_units_by_hand(scope):
    x = torch.randn(SHAPE, dtype=torch.float64)
    expected = {
        "sequence": lambda b: [x[b].norm()],
        "token": lambda b: [x[b, i].norm() for i in range(3)],
        "agent": lambda b: [x[b][AGENTS[b] == a].norm() for a in range(3)],
    }[scope]
    norms = torch.stack([torch.stack(expected(b)) for b in range(2)])
    assert_exact(groups(scope).norm(x), norms, "norm")
    tiny = x * 1e-200
    assert_exact(groups(scope).norm(tiny), norms * 1e-200, "norm of tiny numbers")
    unit = groups(scope).unit(tiny)
    owned = unit * (AGENTS >= 0).unsqueeze(-1) if scope == "agent" else unit
    assert_exact(groups(scope).norm(owned), (norms > 0).double(), "norm of units")
    assert (groups(scope).unit(torch.zeros(SHAPE)) == 0).all()


@pytest.mark.parametrize("masked", [False, True])
def test_uniform_draws_fill_the_l2_ball(masked):
    rows = 20000
    shape = (rows, 2, 2)
    keep = torch.tensor([[True, False], [True, True]]) if masked else None
    dimension = 3 if masked else 4
    delta = Ball("l2", 2.0, Groups("sequence", shape)).draw(
        keep, torch.zeros(shape, dtype=torch.float64), None
    )
    volume = (delta.flatten(1).norm(dim=-1) / 2) ** dimension  # uniform in [0, 1]
    # mean 1/2 and second moment 1/3, with standard errors sqrt(1/12/n) and sqrt(4/45/n): five of them
    assert abs(volume.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / rows)
    assert abs(volume.square().mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / rows)
    # every coordinate has mean 0 and variance r² / (n + 2)
    spread = 4 / (dimension + 2)
    free = delta.flatten(1) if keep is None else delta[:, keep]
    assert (free.mean(0).abs() < 5 * math.sqrt(spread / rows)).all()
    assert (free.square().mean(0) / spread - 1).abs().max() < 5 * math.sqrt(2 / rows)
    if masked:
        assert (delta[:, 0, 1] == 0).all()


def test_uniform_draws_fill_the_box():
    rows = 20000
    delta = Ball("linf", 0.5, Groups("token", (rows, 1, 3))).draw(None, torch.zeros(rows, 1, 3), None)
    assert delta.abs().max() <= 0.5
    assert (delta.mean((0, 1)).abs() < 5 * math.sqrt(1 / 12 / rows)).all()
    assert (delta.square().mean((0, 1)) - 1 / 12).abs().max() < 5 * math.sqrt(1 / 180 / rows)


def test_draws_repeat_with_their_generator_and_differ_without():
    ball, like = Ball("l2", 1.0, groups("token")), torch.zeros(SHAPE)
    a, b = (ball.draw(None, like, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(ball.draw(None, like, None), ball.draw(None, like, None))
