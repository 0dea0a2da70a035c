"""Measurements of a loss and of a policy at points of an ascent, one number per batch row.

Everything here is exact at the point where it is evaluated, except where a name says difference. Rows of a batch are
independent: row b of the loss depends only on row b of the input, so one backward of the sum serves them all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..dual import Dual, dual
from ..ops.sensitivity import sensitivity
from .evaluator import checked_losses, input_gradient
from .head import LMHead, as_head
from .scopes import Groups, attackable, kept, widened

__all__ = [
    "curvature_along",
    "gradient",
    "logits_func",
    "output_probe",
    "power_iteration",
    "restrict",
    "row_dot",
    "row_norm",
    "row_unit",
    "sandwich",
    "spectral_norm",
    "sum_units",
    "top_direction",
]

Loss = Callable[[Any], Any]


# -- one number per batch row ------------------------------------------------------------------------------------------


def row_dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """⟨a, b⟩ per batch row: ``[B, ...]`` and ``[B, ...]`` to ``[B]``; in float32 for lower dtypes."""
    return (widened(a) * widened(b)).flatten(1).sum(1)


def row_norm(a: torch.Tensor) -> torch.Tensor:
    """‖a‖ per batch row, ``[B]``; neither overflows nor underflows."""
    return Groups("sequence", a.shape).norm(a).squeeze(1)


def row_unit(a: torch.Tensor) -> torch.Tensor:
    """`a` with every batch row scaled to unit Euclidean norm; a zero row stays zero."""
    return Groups("sequence", a.shape).unit(a)


def restrict(t: torch.Tensor, mask: torch.Tensor | None, agents: torch.Tensor | None = None) -> torch.Tensor:
    """`t` with what may not be attacked set to zero.

    Args:
        t: ``[B, ...]``, like the input.
        mask: the shape of `t` without its last axis, or broadcastable to `t`; nonzero = may be attacked.
        agents: the shape of `t` without its last axis; negative = none, never attacked.

    Raises:
        TypeError, ValueError: the mask is of another type or shape, or leaves nothing.
    """
    return kept(t, attackable(mask, agents, t))


# -- the loss along a segment ------------------------------------------------------------------------------------------


def curvature_along(
    loss_fn: Loss, x: torch.Tensor, d: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, directional derivative and curvature along `d`, all exact: L, ⟨∇L, d⟩ and dᵀ∇²L d.

    The tangent of the loss along d is ⟨∇L, d⟩; its gradient with respect to the input, reverse over forward, is ∇²L d.
    Costs one dual forward and its backward (four to five plain forwards) for any size of the input.

    Args:
        loss_fn: called with a Dual shaped like `x`; returns ``[B]``.
        x: ``[B, ...]``, floating point.
        d: like `x`.

    Returns:
        Three tensors ``[B]``, detached.

    Raises:
        ValueError: `loss_fn` does not return ``[B]``, or its result does not depend on its input.
        UnsupportedOperation: `loss_fn` uses a function without a derivative rule.
    """
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        y = checked_losses(loss_fn(dual(point, d.detach().to(x.dtype))), x.shape[0])
        if not isinstance(y, Dual):
            raise ValueError(
                "the result of loss_fn does not depend on its input (no tangent arrived): a detach(), a no-grad copy "
                "or token ids instead of embeddings break the path."
            )
        slope = y.tangent
        product = None
        if slope.requires_grad:  # a loss that is linear in x with frozen parameters has a constant slope
            (product,) = torch.autograd.grad(slope.sum(), point, allow_unused=True)
    curvature = torch.zeros_like(slope) if product is None else row_dot(product, d)
    return y.primal.detach(), slope.detach(), curvature.detach()


def gradient(loss_fn: Loss, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses ``[B]`` and their gradient like `x`, detached.

    Raises:
        ValueError: `loss_fn` does not return ``[B]``, or its result does not depend on its input.
    """
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        y = checked_losses(loss_fn(point), x.shape[0])
        return y.detach(), input_gradient(y, point)


# -- the policy ------------------------------------------------------------------------------------------


def logits_func(func: Callable[[Any], Any], head: LMHead | nn.Linear | None) -> Callable[[Any], Any]:
    """`func` followed by the head, whose logits are formed: diagnostics look at them one by one."""
    described = None if head is None else as_head(head)

    def call(x: Any) -> Any:
        y = func(x)
        if described is not None:
            return described.logits(y)
        return y if isinstance(y, (torch.Tensor, Dual)) else getattr(y, "logits", y)

    return call


def _output(y: Any, kind: Any) -> Any:
    if isinstance(y, kind) and y.dim() >= 2:
        return y
    if isinstance(y, (torch.Tensor, Dual)) and y.dim() < 2:
        raise ValueError(
            f"func must return [B, ..., D], got shape {tuple(y.shape)}: unsqueeze the last axis."
        )
    if isinstance(y, torch.Tensor):
        raise ValueError("the output of func does not depend on its input x (no tangent arrived).")
    raise TypeError(f"func must return a tensor or a model output with .logits, got {type(y).__name__}.")


def sum_units(q: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Sum over everything after the batch axis: ``[B, *units]`` to ``[B]``."""
    return (q if mask is None else torch.where(mask != 0, q, 0.0)).reshape(q.shape[0], -1).sum(1)


@torch.no_grad()
def output_probe(
    func: Callable[[Any], Any], x: torch.Tensor, v: torch.Tensor, metric: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """q ``[B, *units]`` of `metric` along `v`, and the tangent of the output; one dual forward.

    Raises:
        TypeError, ValueError: func does not return ``[B, ..., D]`` that depends on its input.
    """
    y = _output(func(dual(x.detach(), v.detach().to(x.dtype))), Dual)
    return sensitivity(y, metric)[0], y.tangent


def sandwich(
    func: Callable[[Any], Any],
    output_loss: Loss,
    x: torch.Tensor,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """‖Jᵀ∇L‖/‖∇L‖ and ‖Ju‖ per batch row, u the unit direction of the (masked) gradient over the whole row.

    Costs a plain forward and backward and a dual forward. Rows with a zero gradient give 0 and 0.
    """
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        y = _output(func(point), torch.Tensor)
        losses = checked_losses(output_loss(y), x.shape[0], "output_loss")
        assert isinstance(losses, torch.Tensor)
        g, y_bar = torch.autograd.grad(losses.sum(), [point, y])
    g = restrict(g, mask)
    outer = row_norm(y_bar)
    lower = torch.where(outer == 0, 0.0, row_norm(g) / torch.where(outer == 0, 1.0, outer))
    _, y_tan = output_probe(func, x, row_unit(g), "l2")
    return lower, row_norm(y_tan)


def power_iteration(
    q_of: Callable[[torch.Tensor], torch.Tensor],
    v: torch.Tensor,
    iterations: int,
    allowed: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Unit rows v after v ← JᵀMJ v / ‖JᵀMJ v‖, as ½ ∂q/∂v = JᵀMJ v for every metric M.

    The values √q never fall from one iteration to the next; with singular values σ₁ > σ₂ the relative error falls like
    (σ₂/σ₁)^{4·iterations}. A row that is mapped to zero keeps its direction: the start was unlucky, or J is zero.

    Args:
        q_of: q of a direction like `v`, whose sum over a row is ‖J v‖²_M.
        v: first direction, ``[B, ...]``, unit rows.
        iterations: at least 0.
        allowed: sets what may not be attacked to zero.
    """
    for _ in range(iterations):
        with torch.enable_grad():
            leaf = v.detach().requires_grad_()
            (pulled,) = torch.autograd.grad(q_of(leaf).sum(), leaf)
        pulled = row_unit(allowed(pulled))
        v = torch.where((row_norm(pulled) == 0).reshape(-1, *[1] * (v.dim() - 1)), v, pulled)
    return v.detach()


def exact_direction(
    q_of: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    allowed: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The unit rows v with the largest ‖J v‖_M, from the eigenvectors of JᵀMJ: all of its columns in one backward.

    As many tangents as a row of `x` has entries share one primal: for small inputs.

    Args:
        q_of: q of directions ``[K, *x.shape]``, whose sum over a row is ‖J v‖²_M.
        x: the point, ``[B, ...]``.
        allowed: sets what may not be attacked to zero.
    """
    size, keep = x[0].numel(), allowed(torch.ones_like(x))
    basis = torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, 1, *x.shape[1:]) * keep
    with torch.enable_grad():
        leaf = basis.requires_grad_()
        (pulled,) = torch.autograd.grad(q_of(leaf).sum(), leaf)
    form = widened(pulled * keep).flatten(2).transpose(0, 1) / 2
    _, vectors = torch.linalg.eigh((form + form.mT) / 2)
    return row_unit(allowed(vectors[..., -1].to(x.dtype).reshape(x.shape))).detach()


def top_direction(
    q_of: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    start: torch.Tensor | None,
    iterations: int | str,
    allowed: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """By :func:`power_iteration` from `start`, or for ``"exact"`` by :func:`exact_direction`."""
    if iterations == "exact":
        return exact_direction(q_of, x, allowed)
    assert start is not None and isinstance(iterations, int)
    return power_iteration(q_of, start, iterations, allowed)


def spectral_norm(
    func: Callable[[Any], Any],
    x: torch.Tensor,
    start: torch.Tensor | None,
    iterations: int | str,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """‖J‖₂ per batch row, from below by power iteration or exact, and the direction that attains it.

    Args:
        func: returns ``[B, ..., D]``.
        x: the point, ``[B, ...]``.
        start: first direction, like `x`; random in general, the last result as a warm start. None for ``"exact"``.
        iterations: at least 1, or ``"exact"``.
        mask: as in :func:`restrict`.

    Returns:
        ‖Jv‖ ``[B]`` at the last v, and v like `x` with unit rows.
    """
    allowed = functools.partial(restrict, mask=mask)
    q_of = lambda v: sensitivity(_output(func(dual(x.detach(), v)), Dual), "l2")
    v = top_direction(q_of, x, None if start is None else row_unit(allowed(start)), iterations, allowed)
    return row_norm(output_probe(func, x, v, "l2")[1]), v
