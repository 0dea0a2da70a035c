"""Losses and gradients by the oracle in aajr_kernels/testing/oracle.py, for comparisons with ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aajr_kernels.testing.oracle import jvp, mean_over_units, metric_values, oracle_mode


@dataclass
class Outcome:
    """A loss, its parts, and its gradients by parameter name (``x`` and ``v`` included; None where unused)."""

    loss: Tensor
    penalty: Tensor
    primal: Tensor
    tangents: Tensor
    gradients: dict[str, Tensor | None] = field(default_factory=dict)


def loss_of(
    func: Callable[[Tensor], Tensor],
    x: Tensor,
    v: Tensor,
    *,
    metric: str,
    probe: Tensor | None = None,
    mask: Tensor | None = None,
) -> Outcome:
    """Penalty plus <probe, primal>, without gradients; x and v [K, *x.shape] in the dtype of the computation."""
    with oracle_mode(float64=x.dtype == torch.float64):
        primal, tangents = jvp(func, x, v)
        penalty = mean_over_units(metric_values(primal, tangents, metric), mask)
        loss = penalty if probe is None else penalty + (probe * primal).sum()
    return Outcome(loss, penalty, primal, tangents)


def gradients_of(loss: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Gradient of ``loss`` for every leaf, None for one that it does not depend on."""
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True))


def loss_and_gradients(
    func: Callable[[Tensor], Tensor],
    x: Tensor,
    v: Tensor,
    parameters: Mapping[str, Tensor],
    *,
    metric: str,
    probe: Tensor | None = None,
    mask: Tensor | None = None,
) -> Outcome:
    """`loss_of` with the gradients to every parameter, to ``x`` and to ``v``.

    Args:
        func: maps a tensor like ``x`` to one tensor (logits or features on the last axis).
        x: input; v: directions [K, *x.shape]; both of the dtype to compute in (float64 for the oracle, float32 for
            the eager error of the budget).
        parameters: leaves that require grad, by name.
        metric: one of ``oracle.METRICS``.
        probe: weights of a linear functional of the primal, of its shape.
        mask: True for the units [*primal.shape[:-1]] that count.
    """
    x, v = x.detach().clone().requires_grad_(), v.detach().clone().requires_grad_()
    outcome = loss_of(func, x, v, metric=metric, probe=probe, mask=mask)
    outcome.gradients = gradients_of(outcome.loss, {**parameters, "x": x, "v": v})
    return outcome


@torch.no_grad()
def tangent_by_differences(
    func: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, step: float = 1e-3
) -> Tensor:
    """Tangent of ``func`` at ``x`` along one direction ``v``, by fourth-order central differences of its values."""
    with oracle_mode(float64=x.dtype == torch.float64):
        near = func(x + step * v) - func(x - step * v)
        far = func(x + 2 * step * v) - func(x - 2 * step * v)
    return (8 * near - far) / (12 * step)
