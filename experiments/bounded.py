"""Training of the policy of :mod:`.digits` at a bound: a penalty whose weight follows the share of units above γ.

Every method is held at the same γ in its own quantity, at the points x and along the directions u of an ascent:

=================  =============================================================
method             quantity √q
=================  =============================================================
``aligned``        ‖J u‖, one tangent
``spectral``       ‖J‖₂, exact: from the Jacobian written out
``frobenius``      ‖J‖_F, exact likewise
``layer_product``  Πₗ cₗ ≥ ‖J‖₂, one number for all inputs
``none``           nothing is bounded
=================  =============================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aajr_kernels as aajr
from aajr_kernels.method import baseline_penalty
from aajr_kernels.training import Constraint, Multiplier

from .digits.data import Digits, Split
from .digits.training import Batches, Sine, inner_ascent, make_policy, nominal_losses

METHODS = ("aligned", "spectral", "frobenius", "layer_product")


def _gelu_slope(h: Tensor) -> Tensor:
    """Φ(h) + h φ(h)."""
    density = torch.exp(-h.square() / 2) / math.sqrt(2 * math.pi)
    return torch.special.ndtr(h) + h * density


SLOPES: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {nn.GELU: _gelu_slope, Sine: torch.cos}


def jacobian(policy: nn.Sequential, x: Tensor) -> Tensor:
    """J ``[n, outputs, inputs]`` of linear layers and units at ``[n, inputs]``, differentiable in the parameters.

    Written out from the last layer to the first: 14 rows in place of the 64 tangents of ``iterations="exact"``, an
    eighth of the time.
    """
    inputs = [x]
    for layer in policy:
        inputs.append(layer(inputs[-1]))
    rows: Tensor | None = None
    for layer, h in zip(reversed(policy), reversed(inputs[:-1])):
        if isinstance(layer, nn.Linear):
            rows = layer.weight.expand(len(x), -1, -1) if rows is None else rows @ layer.weight
        else:
            assert rows is not None
            rows = rows * SLOPES[type(layer)](h).unsqueeze(-2)
    assert rows is not None
    return rows


def measure(method: str, policy: nn.Module, traj: aajr.Trajectory) -> Tensor:
    """q ``[T · B]`` of a method at all points of an ascent, step by step; differentiable in the parameters."""
    points, directions = traj.points[:-1].flatten(0, 1), traj.directions.flatten(0, 1)
    if method in ("aligned", "layer_product"):
        q: Tensor = baseline_penalty(
            *(method, policy, points, directions), metric="l2", reduction="none", module=policy
        )
        return q.flatten()
    assert isinstance(policy, nn.Sequential)
    rows = jacobian(policy, points)
    if method == "spectral":
        # ‖Jᵀw‖² with w the first left singular vector, held fixed: value and gradient of ‖J‖₂²
        w = torch.linalg.eigh((rows @ rows.mT).detach()).eigenvectors[:, :, -1:]
        rows = w.mT @ rows
    elif method != "frobenius":
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    return rows.square().sum((1, 2))


def roots(
    config: dict[str, Any], policy: nn.Module, part: Split, generator: torch.Generator, *methods: str
) -> list[Tensor]:
    """√q ``[T · B]`` of methods at the points of one new ascent, without a graph."""
    traj = inner_ascent(config, policy, part, generator, evaluate_last=False)
    with torch.no_grad():
        return [measure(method, policy, traj).sqrt() for method in methods]


def quantile_of(values: Tensor, share: float) -> float:
    """The smallest value that a share of them does not exceed."""
    return float(values.flatten().sort().values[math.ceil(share * values.numel()) - 1])


def train(
    config: dict[str, Any],
    seed: int,
    digits: Digits,
    method: str,
    gamma: float | None = None,
    *,
    mix: float = 0.0,
    followed: str = "validation",
    on_step: Callable[[int, Multiplier], None] | None = None,
) -> tuple[nn.Module, Multiplier | None]:
    """Minimise (nominal + w · adversarial) / (1 + w) with √q ≤ γ for a share ``config["quantile"]`` of the units.

    The gradient is that of mean relu(√q − γ) on the training batch. Start, batches and random starts of the ascents
    depend only on the seed.

    Args:
        config: ``width``, ``batch``, ``epochs``, ``learning_rate``, ``radius``, ``inner``, ``quantile``, and
            ``controller``: of :class:`~aajr_kernels.training.Constraint`, where it is not the default.
        seed: of everything that is drawn.
        digits: learnt is the training part.
        method: one of :data:`METHODS`, or ``"none"``.
        gamma: the bound; not used by ``"none"``.
        mix: w, the weight of the loss at the end of the ascent: 0 is nominal training.
        followed: λ follows the units of this part: ``"validation"``, of a batch that is not learnt, or ``"training"``.
        on_step: called after every step, counted from 1, with the multiplier.

    Returns:
        The policy, and the multiplier as it ended; None for ``"none"``.
    """
    policy = make_policy(config["width"], seed)
    batches = Batches(digits.train, config["batch"], 1000 + seed)
    starts, others = (torch.Generator().manual_seed(1000 * i + seed) for i in (2, 3))
    steps = config["epochs"] * batches.per_epoch
    optimizer = torch.optim.Adam(policy.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config["learning_rate"], total_steps=steps)
    multiplier = None
    if method != "none":
        multiplier = Multiplier(
            Constraint(gamma=gamma, quantile=config["quantile"], metric="l2", **config.get("controller", {}))
        )
    size = min(config["batch"], len(digits.validation))
    validation = Batches(digits.validation, size, 5000 + seed).epochs(steps)
    for step, batch in enumerate(batches.epochs(config["epochs"])):
        entropy, error, _ = nominal_losses(policy, batch)
        loss = task = entropy + error
        if multiplier is not None or mix > 0:
            traj = inner_ascent(config, policy, batch, starts, evaluate_last=False)
        if mix > 0:
            worst_entropy, worst_error, _ = nominal_losses(policy, Split(traj.points[-1], batch.y, batch.u))
            loss = task = (task + mix * (worst_entropy + worst_error)) / (1 + mix)
        if multiplier is not None:
            weight, bound = multiplier.at(step)
            assert bound is not None
            q = measure(method, policy, traj)
            hinge = F.relu(q.clamp(min=1e-12).sqrt() - bound).mean()
            loss = task + (weight or 0.0) * hinge  # λ is found at the first step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if multiplier is not None:
            units = q.detach()
            if followed == "validation":
                (root,) = roots(config, policy, next(validation), others, method)
                units = root.square()
            multiplier.add(step, task, hinge, units, bound)
            multiplier.settle()
            if on_step is not None:
                on_step(step + 1, multiplier)
    return policy, multiplier
