"""A small policy with its loss, and plain ascents, written out: what diagnostics and baselines have to describe."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from aajr_kernels.method import Trajectory

B, N, V = 3, 6, 5
LABELS = torch.tensor([0, 3, 1])


def small_policy(inputs: int = N, width: int = 7) -> nn.Module:
    net = nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, V)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, dtype=p.dtype))
    return net


def output_loss(y):
    return F.cross_entropy(y, LABELS, reduction="none")


def problem(policy):
    return (lambda x: output_loss(policy(x))), torch.randn(B, N, dtype=torch.float64)


def steps_of(loss_fn, x, eta, t=4, step="raw", project=None, mask=None, **fields) -> Trajectory:
    """`t` steps of size `eta` from a random start near `x`; `fields` are added to the trajectory."""
    points, directions, losses, norms, projected = [x + 0.1 * torch.randn_like(x)], [], [], [], []
    keep = torch.ones_like(x) if mask is None else mask.to(x).reshape(x.shape)
    for _ in range(t):
        p = points[-1].clone().requires_grad_()
        loss = loss_fn(p)
        g = torch.autograd.grad(loss.sum(), p)[0] * keep
        norm = g.flatten(1).norm(dim=1)
        u = g / norm.reshape(-1, *[1] * (x.dim() - 1))
        move = {"raw": g, "normalized": u, "sign": g.sign()}[step] * eta
        free = p.detach() + move
        end = free if project is None else x + project(free - x)
        losses.append(loss.detach())
        norms.append(norm)
        directions.append(u)
        projected.append((end != free).flatten(1).any(1))
        points.append(end)
    losses.append(loss_fn(points[-1]).detach())
    points = torch.stack(points)
    return Trajectory(
        x=x,
        points=points,
        directions=torch.stack(directions),
        displacements=points[1:] - points[:-1],
        losses=torch.stack(losses),
        gradient_norms=torch.stack(norms).unsqueeze(-1),
        step_sizes=torch.full((t, x.shape[0]), eta, dtype=x.dtype),
        projected=torch.stack(projected),
        radius=math.inf,
        step=step,
        mask=None if mask is None else mask != 0,
        **fields,
    )
