"""The linear policy with two outputs, its closed form, and the two ways of bounding it.

π(x) = Wx with W 2×2 learns T x, T = diag(1, 5), from x with E xxᵀ = 1; half the squared error is ½‖W − T‖²_F. The
adversary moves x by at most ½ and sees only the error of output 1. Its gradient is a multiple of row 1 of W, so the
bound ‖W uₜ‖ ≤ γ along its ascent leaves output 2 free, whereas ‖W‖₂ ≤ γ does not.

===============  =========================  ========================================
bound            optimum                    nominal loss
===============  =========================  ========================================
‖W‖₂ ≤ γ         diag(min(γ,1), min(γ,5))   ½(1 − min(γ,1))² + ½(5 − min(γ,5))²
‖W uₜ‖ ≤ γ       diag(min(γ,1), 5)          ½(1 − min(γ,1))²
===============  =========================  ========================================

The adversary's gain over the clean error, with a = min(γ, 1), is ½(1 − a + a/2)² − ½(1 − a)² for both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import aajr_kernels as aajr
from aajr_kernels.method import baseline_penalty

#: four points with second moments 1 and 0
INPUTS = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
RADIUS = 0.5


def closed_form(bound: str, gamma: float) -> dict[str, float]:
    """Nominal loss, spectral norm and robust excess at the optimum."""
    a, b = min(gamma, 1.0), min(gamma, 5.0) if bound == "global" else 5.0
    return {
        "nominal": 0.5 * (1 - a) ** 2 + 0.5 * (5 - b) ** 2,
        "spectral_norm": max(a, b),
        "excess": 0.5 * (1 - a + a * RADIUS) ** 2 - 0.5 * (1 - a) ** 2,
    }


def nominal(weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over the inputs of half the squared error."""
    return 0.5 * (INPUTS @ (weight - target).mT).square().sum(-1).mean()


def adversary(weight: torch.Tensor, target: torch.Tensor) -> Callable[[Any], Any]:
    """Half the squared error of output 1, per row; the target stays that of the clean input."""
    wanted = (INPUTS @ target.mT)[:, 0]
    return lambda x: 0.5 * ((x @ weight.mT)[:, 0] - wanted).square()


def attack(weight: torch.Tensor, target: torch.Tensor, seed: int, **options: Any) -> aajr.Trajectory:
    """A projected ascent from random starts: at the clean input a perfect policy has no gradient."""
    generator = torch.Generator().manual_seed(seed)
    return aajr.ascend(
        *(adversary(weight.detach(), target), INPUTS),
        radius=RADIUS,
        step_size=RADIUS,
        init="uniform",
        generator=generator,
        **options,
    )


def excess(weight: torch.Tensor, target: torch.Tensor) -> float:
    """Rise of the adversary's loss over the clean input."""
    clean = adversary(weight, target)(INPUTS)
    worst = attack(weight, target, 1, steps=24, restarts=8).worst_loss
    return (worst - clean).mean().item()


def solve_global(target: torch.Tensor, gamma: float, iterations: int) -> torch.Tensor:
    """Projected gradient descent: singular values are clipped at γ after every step."""
    weight = torch.zeros_like(target)
    for _ in range(iterations):
        u, s, v = torch.linalg.svd(weight - 0.5 * (weight - target), full_matrices=False)
        weight = u @ torch.diag(s.clamp(max=gamma)) @ v
    return weight


def solve_aligned(target: torch.Tensor, gamma: float, iterations: int) -> torch.Tensor:
    """Augmented Lagrangian on ‖W uₜ‖ ≤ γ, with the penalty of the package along the ascent of every iteration.

    W descends on nominal + (max(0, μ + ρ(‖Wuₜ‖ − γ))² − μ²) / 2ρ, and μ follows after every step.
    """
    generator = torch.Generator().manual_seed(0)
    weight = 0.5 * torch.randn(target.shape, generator=generator, dtype=target.dtype)
    multiplier, rho, rate = 0.0, 5.0, 0.08
    for step in range(iterations):
        traj = attack(weight, target, step, steps=2, evaluate_last=False)
        weight.requires_grad_()
        size = baseline_penalty(
            *("aligned", lambda x, w=weight: x @ w.mT),
            *(traj.points[:-1].flatten(0, 1), traj.directions.flatten(0, 1)),
            metric="l2",
            form="hinge",
            gamma=0.0,
        )
        push = (multiplier + rho * (size - gamma)).clamp(min=0)
        (gradient,) = torch.autograd.grad(nominal(weight, target) + push.square() / (2 * rho), weight)
        weight = (weight - rate * gradient).detach()
        multiplier = max(0.0, multiplier + rho / 4 * (size.item() - gamma))
    return weight
