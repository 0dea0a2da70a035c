"""Measurements of a loss and of a policy at points of an ascent, one number per batch row.

Everything here is exact at the point where it is evaluated, except where a name says difference. Rows of a batch are
independent: row b of the loss depends on row b of the input alone, so one backward of the sum serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..dual import Dual, dual
from ..ops.sensitivity import sensitivity
from .attack_state import RandomState
from .directions import normalize
from .head import LMHead
from .scopes import attackable

__all__ = [
    "curvature_along",
    "difference_curvature",
    "gradient",
    "logits_func",
    "output_probe",
    "repeatable",
    "restrict",
    "row_dot",
    "row_norm",
    "row_unit",
    "sandwich",
    "spectral_norm",
    "sum_units",
]

Loss = Callable[[Any], Any]


def repeatable(call: Callable[[Any], Any], random: RandomState) -> Callable[[Any], Any]:
    """`call` from the same random state every time: dropout draws the same mask at every point of one measurement."""

    return lambda x: random.replay(call, x)


# -- one number per batch row ------------------------------------------------------------------------------------------


def _rows(t: torch.Tensor) -> torch.Tensor:
    """``[B, n]`` in float32 or float64: dot products in lower dtypes lose the digits that are looked for."""
    return (t if t.dtype in (torch.float32, torch.float64) else t.float()).flatten(1)


def row_dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """⟨a, b⟩ per batch row: ``[B, ...]`` and ``[B, ...]`` to ``[B]``."""
    return (_rows(a) * _rows(b)).sum(1)


def row_norm(a: torch.Tensor) -> torch.Tensor:
    """‖a‖ per batch row, ``[B]``; neither overflows nor underflows."""
    rows = _rows(a)
    largest = rows.abs().amax(1, keepdim=True)
    safe = torch.where(largest == 0, 1.0, largest)
    return torch.linalg.vector_norm(rows / safe, 2, 1) * largest.squeeze(1)


def row_unit(a: torch.Tensor) -> torch.Tensor:
    """`a` with every batch row scaled to unit Euclidean norm; a zero row stays zero."""
    return normalize(a.flatten(1), "sequence").reshape(a.shape)


def row_scale(a: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Row b of `a` times ``factor[b]``, in the dtype of `a`."""
    return a * factor.to(a.dtype).reshape(-1, *[1] * (a.dim() - 1))


def restrict(t: torch.Tensor, mask: torch.Tensor | None, agents: torch.Tensor | None = None) -> torch.Tensor:
    """`t` with what may not be attacked set to zero.

    Args:
        t: ``[B, ...]``, like the input.
        mask: the shape of `t` without its last axis, or broadcastable to `t`; nonzero = may be attacked.
        agents: the shape of `t` without its last axis; negative = nobody's, never attacked.

    Raises:
        TypeError, ValueError: the mask is of another type or shape, or leaves nothing.
    """
    keep = attackable(mask, agents, t)
    return t if keep is None else torch.where(keep, t, 0.0)


# -- the loss along a segment ------------------------------------------------------------------------------------------


def _losses(y: Any, batch: int, name: str = "loss_fn") -> torch.Tensor | Dual:
    if not isinstance(y, (torch.Tensor, Dual)) or tuple(y.shape) != (batch,):
        got = tuple(y.shape) if isinstance(y, (torch.Tensor, Dual)) else type(y).__name__
        raise ValueError(
            f"{name} must return one loss per batch row, shape ({batch},), got {got}: use reduction='none' and "
            "reduce every axis but the first."
        )
    return y


def curvature_along(
    loss_fn: Loss, x: torch.Tensor, d: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, directional derivative and curvature along `d`, all exact: L, ⟨∇L, d⟩ and dᵀ∇²L d.

    The tangent of the loss along d is ⟨∇L, d⟩; its gradient with respect to the input, reverse over forward, is ∇²L d.
    Costs one dual forward and its backward (four to five plain forwards), whatever the size of the input.

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
        y = _losses(loss_fn(dual(point, d.detach().to(x.dtype))), x.shape[0])
        if not isinstance(y, Dual):
            raise ValueError(
                "the result of loss_fn does not depend on its input (no tangent arrived): a detach(), a no-grad copy "
                "or token ids instead of embeddings break the path."
            )
        slope = y.tangent
        product = None
        if slope.requires_grad:  # a loss that is linear in x with frozen parameters has a constant slope
            (product,) = torch.autograd.grad(slope.sum(), point, allow_unused=True)
    bend = torch.zeros_like(slope) if product is None else row_dot(product, d)
    return y.primal.detach(), slope.detach(), bend.detach()


def gradient(loss_fn: Loss, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses ``[B]`` and their gradient like `x`, detached.

    Raises:
        ValueError: `loss_fn` does not return ``[B]``, or its result does not depend on its input.
    """
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        y = _losses(loss_fn(point), x.shape[0])
        g = torch.autograd.grad(y.sum(), point, allow_unused=True)[0] if y.requires_grad else None
    if g is None:
        raise ValueError("the result of loss_fn does not depend on its input: a detach() breaks the path.")
    return y.detach(), g


def difference_curvature(
    gradients: Sequence[torch.Tensor], d: torch.Tensor, spacing: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slope at the first point and the lowest mean curvature between neighbours, from plain gradients.

    ⟨∇L(p_{j+1}) − ∇L(p_j), d⟩ / spacing is the mean of dᵀ∇²L d over the sub-segment, so its minimum never lies below
    that of the curvature itself. The subtraction costs digits: the absolute error is about eps ‖∇L‖ / spacing.

    Args:
        gradients: at two or more points, evenly spaced along `d`; like `d`.
        d: unit direction per batch row, ``[B, ...]``.
        spacing: distance of neighbours, ``[B]``; 0 gives a curvature of 0.

    Returns:
        Two tensors ``[B]``.
    """
    along = torch.stack([row_dot(g, d) for g in gradients])
    safe = torch.where(spacing == 0, 1.0, spacing)
    bends = torch.where(spacing == 0, 0.0, (along[1:] - along[:-1]) / safe)
    return along[0], bends.amin(0)


# -- the policy ------------------------------------------------------------------------------------------


def logits_func(func: Callable[[Any], Any], head: LMHead | None) -> Callable[[Any], Any]:
    """`func` followed by the head, whose logits are formed: diagnostics look at them one by one."""

    def call(x: Any) -> Any:
        y = func(x)
        if head is not None:
            z = torch.nn.functional.linear(y, head.weight, head.bias) * head.scale
            return z if head.softcap is None else torch.tanh(z / head.softcap) * head.softcap
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
    agents: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """‖Jᵀ∇L‖/‖∇L‖ and ‖Ju‖ per batch row, u the unit direction of the (masked) gradient over the whole row.

    Costs a plain forward and backward and a dual forward. Rows with a zero gradient give 0 and 0.
    """
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        y = _output(func(point), torch.Tensor)
        losses = _losses(output_loss(y), x.shape[0], "output_loss")
        assert isinstance(losses, torch.Tensor)
        g, y_bar = torch.autograd.grad(losses.sum(), [point, y])
    g = restrict(g, mask, agents)
    outer = row_norm(y_bar)
    lower = torch.where(outer == 0, 0.0, row_norm(g) / torch.where(outer == 0, 1.0, outer))
    _, y_tan = output_probe(func, x, row_unit(g), "l2")
    return lower, row_norm(y_tan)


def spectral_norm(
    func: Callable[[Any], Any],
    x: torch.Tensor,
    start: torch.Tensor,
    iterations: int,
    mask: torch.Tensor | None = None,
    agents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """‖J‖₂ per batch row from below by power iteration on JᵀJ, and the direction that attains it.

    Every iteration is a dual forward, ‖Jv‖, and its backward to the primal, Jᵀ(Jv). The values never fall from one
    iteration to the next; with singular values σ₁ > σ₂ the relative error falls like (σ₂/σ₁)^{4·iterations}.

    Args:
        func: returns ``[B, ..., D]``.
        x: the point, ``[B, ...]``.
        start: first direction, like `x`; random in general, the last result as a warm start.
        iterations: at least 1.
        mask: as in :func:`restrict`.
        agents: as in :func:`restrict`.

    Returns:
        ‖Jv‖ ``[B]`` at the last v, and v like `x` with unit rows.
    """
    v = row_unit(restrict(start, mask, agents))
    for _ in range(iterations):
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            y = _output(func(dual(point, v)), Dual)
            y_tan = y.tangent.detach()
            g = None
            if y.primal.requires_grad:
                (g,) = torch.autograd.grad((y.primal * y_tan).sum(), point, allow_unused=True)
        if g is None:  # func is constant
            break
        pulled = row_unit(restrict(g, mask, agents))
        # where Jv = 0 the start was unlucky or J is zero: keep it
        v = torch.where((row_norm(pulled) == 0).reshape(-1, *[1] * (x.dim() - 1)), v, pulled)
    return row_norm(output_probe(func, x, v, "l2")[1]), v
