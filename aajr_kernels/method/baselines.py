"""What else one may penalise at the points of an ascent, under one interface and in the units of the aligned penalty.

With J the Jacobian of the policy f at a point, M the metric (the identity, or the Fisher matrix of the outputs) and L
the adversary's loss:

=====================  ========================================  ==================================================
method                 penalty per batch row                     how
=====================  ========================================  ==================================================
``aligned``            ‖J u‖²_M                                  one tangent
``random``             ‖J v‖²_M, v uniform on the unit sphere    one tangent; its expectation is ‖J‖²_F / n
``frobenius``          ‖J‖²_F = tr JᵀMJ                          Hutchinson: E ‖J v‖²_M over random signs v
``spectral``           ‖J‖²₂, the top eigenvalue of JᵀMJ         power iteration for v, then ‖J v‖²_M
``input_gradient``     ‖∇L‖²                                     (D_w L)² along w = ∇L/‖∇L‖, held fixed
``cure``               ‖∇L(x + hu) − ∇L(x)‖² / h²                difference of D_w L along its own direction w
``finite_difference``  ‖f(x + hu) − f(x)‖²_M / h²                two plain forwards
=====================  ========================================  ==================================================

All are differentiable in the parameters, without double backward. Directions are held fixed, and yet the gradients are
those of the penalties as stated: a norm is ‖r‖ = ⟨r, w⟩ with w = r/‖r‖, a spectral norm the largest of the ‖J v‖, and
the derivative of a maximum does not see how the maximiser moves. ``spectral`` is exact as far as its iteration has
converged, and from below. ``aligned`` is what it is measured against: the first four differ in the choice of v alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..dual import Dual, dual
from ..ops.sensitivity import sensitivity
from . import probes
from .attack_state import RandomState, frozen_parameters, modules_of
from .checks import check_integers, check_number
from .head import LMHead, as_head
from .penalty import aligned_penalty, check_reduction, reduce_units
from .scopes import Groups
from .trajectory import Trajectory, drawn_steps, step_shares

__all__ = ["METHODS", "baseline_penalty", "trajectory_baseline"]

METHODS = ("aligned", "random", "frobenius", "spectral", "input_gradient", "cure", "finite_difference")
NEEDS_DIRECTION = ("aligned", "cure", "finite_difference")
NEEDS_LOSS = ("input_gradient", "cure")

Metric = str | Callable[[Dual], torch.Tensor]


def baseline_penalty(
    method: str,
    func: Callable[[Any], Any] | None,
    x: torch.Tensor,
    u: torch.Tensor | None = None,
    *,
    loss_fn: Callable[[Any], Any] | None = None,
    metric: Metric = "fisher",
    head: LMHead | nn.Linear | None = None,
    samples: int = 1,
    iterations: int = 4,
    start: torch.Tensor | None = None,
    h: float = 1e-2,
    attack_mask: torch.Tensor | None = None,
    scope: str = "sequence",
    agents: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    module: nn.Module | Iterable[nn.Module] | None = None,
    gamma: float | None = None,
    form: str = "squared",
    mask: torch.Tensor | None = None,
    unit: str = "sequence",
    reduction: str = "mean",
    denominator: float | torch.Tensor | None = None,
    return_direction: bool = False,
) -> Any:
    """One of :data:`METHODS` at the point `x`; the first table of this module says what each is.

    Costs, beside the user's backward, in plain forwards (a backward counts two, a dual forward two): ``aligned`` and
    ``random`` 2; ``frobenius`` 1 + samples; ``spectral`` 2 + 6 · iterations; ``input_gradient`` 5; ``cure`` 10;
    ``finite_difference`` 2.

    Args:
        method: one of :data:`METHODS`.
        func: as for :func:`~aajr_kernels.aligned_penalty`; not used by ``input_gradient`` and ``cure``.
        x: the point, ``[B, ...]``.
        u: the ascent direction, like `x`; for ``aligned``, ``cure`` and ``finite_difference``.
        loss_fn: the adversary's loss, from a tensor or Dual like `x` to ``[B]``; for ``input_gradient`` and ``cure``.
        metric: ``"fisher"``, ``"logits"``, ``"probs"`` or ``"l2"``, or a function from the Dual that func returns to
            q ``[K, *units]``, a quadratic form in its tangents (for outputs of several parts).
        head: the language-model head, as for ``aligned_penalty``; ``finite_difference`` forms its logits.
        samples: random directions of ``random`` and ``frobenius``; their mean is taken before the form.
        iterations: of the power iteration of ``spectral``, at least 0.
        start: its first direction, like `x`; random by default. The one found is returned by `return_direction`, a
            good start for the next training step.
        h: length of the difference of ``cure`` and ``finite_difference``, relative to u.
        attack_mask: which entries of `x` an adversary may move (``Trajectory.mask``); other directions are not drawn.
        scope: ``"sequence"``, ``"token"`` or ``"agent"``: what has unit norm in ``random``.
        agents: agent of every token, for ``scope="agent"``.
        generator: of random directions, on the device of `x`.
        module: the model, or several: the gradients of their parameters are off during power iteration and while
            directions are computed.
        gamma: as in ``aligned_penalty``, and so are `form`, `mask`, `unit`, `reduction` and `denominator`; applied to
            the table's penalty (to its share per unit for ``unit="token"``). The loss-based methods know rows only:
            `mask` and `unit` have no meaning for them, the loss decides what counts.
        return_direction: also return the direction(s) that were measured, detached: like `x`, or ``[samples, ...]``.

    Returns:
        The penalty, or ``(penalty, direction)``. With ``reduction="none"``: ``[1, *units]``.

    Raises:
        TypeError, ValueError: an argument is missing for the method, or has a wrong type, shape or value.
        UnsupportedOperation: `func` or `loss_fn` uses a function without a derivative rule.
    """
    _check(method, func, x, u, loss_fn, samples, iterations, h)
    check_reduction(form, unit, reduction, gamma, denominator)
    modules = modules_of(module)
    v = _first_direction(method, x, u, start, samples, attack_mask, scope, agents, generator)
    random = RandomState(x.device)
    policy = None if func is None else probes.repeatable(func, random)
    if method in NEEDS_LOSS:
        assert loss_fn is not None
        with frozen_parameters(modules, evaluate=False):
            loss = probes.repeatable(loss_fn, random)
            v = _loss_direction(method, loss, x, u, h, attack_mask, agents)
        slope = _slope(loss, x, v)
        if method == "cure":
            assert u is not None
            slope = (_slope(loss, x + h * u, v) - slope) / h
        q = slope.square().unsqueeze(0)
        mask, unit = None, "token"
    else:
        assert policy is not None and v is not None
        if method == "spectral":
            with frozen_parameters(modules, evaluate=False):
                v = _power_iteration(policy, x, v, metric, head, iterations, attack_mask, agents)
        if method == "finite_difference":
            q = _difference(policy, x, v, metric, head, h)
        else:
            q = _quadratic(policy, x, v, metric, head).mean(0, keepdim=True)
    options = dict(gamma=gamma, form=form, mask=mask, unit=unit, reduction=reduction, denominator=denominator)
    penalty = reduce_units(q, **options)  # type: ignore[arg-type]
    return (penalty, v.detach()) if return_direction else penalty


def trajectory_baseline(
    method: str,
    func: Callable[[Any], Any] | None,
    traj: Trajectory,
    *,
    steps: str = "all",
    weights: Sequence[float] | torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    start: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The mean of :func:`baseline_penalty` over the steps of an ascent, at ``points[t]`` with u = ``directions[t]``.

    Args:
        method: one of :data:`METHODS`.
        func: the policy.
        traj: the trajectory; its mask, scope and agents bound the random directions.
        steps: ``"all"``, ``"last"`` (the last direction, at the point it was taken from), or ``"random"``: one step,
            drawn with the probabilities of `weights`, so that its expectation is what ``"all"`` gives.
        weights: w_t ≥ 0 of the T steps, normalised to sum 1; equal by default.
        generator: of the random directions and of the random step.
        start: first direction of ``spectral``; each later step starts from what the one before it found.
        options: of :func:`baseline_penalty`, without ``reduction="none"``.

    Returns:
        ``(penalty, aux)``: aux holds ``steps`` (indices), ``penalties`` (detached, one for each) and ``direction``,
        the last one measured.

    Raises:
        TypeError, ValueError: as there; unknown `steps`, bad `weights`.
    """
    if options.get("reduction") == "none":
        raise ValueError(
            "reduction must be 'mean' or 'sum' over a trajectory, got 'none': penalties are averaged."
        )
    count = traj.directions.shape[0]
    share = step_shares(weights, count)
    if steps == "all":
        chosen = [(t, float(share[t])) for t in range(count) if share[t] > 0]
    elif steps == "last":
        chosen = [(count - 1, 1.0)]
    elif steps == "random":
        chosen = [(int(drawn_steps(share, 1, generator)), 1.0)]
    else:
        raise ValueError(f"steps must be one of all, last, random, got {steps!r}.")
    options = dict(attack_mask=traj.mask, scope=traj.scope, agents=traj.agents) | options
    total: torch.Tensor | None = None
    penalties, direction = [], start
    for t, weight in chosen:
        begin = direction if method == "spectral" else None
        penalty, direction = baseline_penalty(
            *(method, func, traj.points[t], traj.directions[t]),
            start=begin,
            generator=generator,
            return_direction=True,
            **options,
        )
        penalties.append(penalty.detach())
        total = weight * penalty if total is None else total + weight * penalty
    assert total is not None
    return total, {
        "steps": [t for t, _ in chosen],
        "penalties": torch.stack(penalties),
        "direction": direction,
    }


# -- directions ------------------------------------------------------------------------------------------


def _first_direction(
    method: str,
    x: torch.Tensor,
    u: torch.Tensor | None,
    start: torch.Tensor | None,
    samples: int,
    attack_mask: torch.Tensor | None,
    scope: str,
    agents: torch.Tensor | None,
    generator: torch.Generator | None,
) -> torch.Tensor | None:
    """What is known before a model has run: u, a random draw, or the start of the power iteration."""
    if method in NEEDS_LOSS:
        return None
    if method in NEEDS_DIRECTION:
        assert u is not None
        return u
    if method == "spectral":
        v = start if start is not None else _noise(x, (), generator)
        if v.shape != x.shape:
            raise ValueError(f"start must have the shape of x {tuple(x.shape)}, got {tuple(v.shape)}.")
        return probes.row_unit(probes.restrict(v.detach().to(x.dtype), attack_mask, agents))
    noise = _noise(x, (samples,), generator)
    if method == "frobenius":  # signs: no other distribution with E vvᵀ = 1 has a smaller variance
        noise = torch.where(noise >= 0, 1.0, -1.0).to(x.dtype)
    noise = torch.stack([probes.restrict(v, attack_mask, agents) for v in noise])
    if method == "random":
        groups = Groups(scope, x.shape, agents)
        noise = torch.stack([groups.unit(v) for v in noise])
    return noise


def _noise(x: torch.Tensor, lead: tuple[int, ...], generator: torch.Generator | None) -> torch.Tensor:
    return torch.randn((*lead, *x.shape), generator=generator, dtype=x.dtype, device=x.device)


def _loss_direction(
    method: str,
    loss: Callable[[Any], Any],
    x: torch.Tensor,
    u: torch.Tensor | None,
    h: float,
    attack_mask: torch.Tensor | None,
    agents: torch.Tensor | None,
) -> torch.Tensor:
    """w: the unit direction of ∇L, or of its difference, among the entries that may be attacked."""
    _, g = probes.gradient(loss, x)
    if method == "cure":
        assert u is not None
        g = probes.gradient(loss, x + h * u)[1] - g
    return probes.row_unit(probes.restrict(g, attack_mask, agents))


def _power_iteration(
    policy: Callable[[Any], Any],
    x: torch.Tensor,
    v: torch.Tensor,
    metric: Metric,
    head: LMHead | nn.Linear | None,
    iterations: int,
    attack_mask: torch.Tensor | None,
    agents: torch.Tensor | None,
) -> torch.Tensor:
    """Top direction of JᵀMJ: ½ ∂q/∂v = JᵀMJ v, for every metric."""
    x = x.detach()
    for _ in range(iterations):
        with torch.enable_grad():
            leaf = v.detach().requires_grad_()
            q = _quadratic(policy, x, leaf, metric, head)
            (pulled,) = torch.autograd.grad(q.sum(), leaf)
        found = probes.row_unit(probes.restrict(pulled, attack_mask, agents))
        zero = (probes.row_norm(found) == 0).reshape(-1, *[1] * (x.dim() - 1))
        v = torch.where(zero, v, found)
    return v.detach()


# -- penalties per unit ------------------------------------------------------------------------------------------


def _quadratic(
    policy: Callable[[Any], Any],
    x: torch.Tensor,
    v: torch.Tensor,
    metric: Metric,
    head: LMHead | nn.Linear | None,
) -> torch.Tensor:
    """q ``[K, *units]`` of ‖J v‖²_M."""
    if isinstance(metric, str):
        found: torch.Tensor = aligned_penalty(policy, x, v, metric=metric, head=head, reduction="none")
        return found
    y = policy(dual(x, v))
    if not isinstance(y, Dual):
        raise ValueError("the output of func does not depend on its input x (no tangent arrived).")
    return metric(y)


def _difference(
    policy: Callable[[Any], Any],
    x: torch.Tensor,
    u: torch.Tensor,
    metric: Metric,
    head: LMHead | nn.Linear | None,
    h: float,
) -> torch.Tensor:
    """The same of (f(x + hu) − f(x)) / h."""
    logits = probes.logits_func(policy, None if head is None else as_head(head))
    y = logits(x)
    if not isinstance(y, torch.Tensor):
        raise TypeError(f"func must return a tensor or a model output with .logits, got {type(y).__name__}.")
    pair = Dual(torch.stack([y, (logits(x + h * u) - y) / h]))
    return sensitivity(pair, metric) if isinstance(metric, str) else metric(pair)


def _slope(loss: Callable[[Any], Any], x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """⟨∇L, w⟩ per row, ``[B]``, differentiable in the parameters."""
    y = loss(dual(x, w))
    assert isinstance(y, Dual)  # its gradient was just taken
    return y.tangent


# -- arguments ------------------------------------------------------------------------------------------


def _check(
    method: str, func: Any, x: Any, u: Any, loss_fn: Any, samples: int, iterations: int, h: float
) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    if not isinstance(x, torch.Tensor) or isinstance(x, Dual) or x.dim() < 2:
        got = f"shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"x must be a plain tensor [B, ...], got {got}.")
    if method in NEEDS_DIRECTION and u is None:
        raise ValueError(f"u must be given for method {method!r}: the direction of the ascent at x.")
    if method in NEEDS_LOSS and loss_fn is None:
        raise ValueError(f"loss_fn must be given for method {method!r}: the adversary's loss per batch row.")
    if method not in NEEDS_LOSS and func is None:
        raise ValueError(f"func must be given for method {method!r}: the policy.")
    if u is not None and u.shape != x.shape:
        raise ValueError(f"u must have the shape of x {tuple(x.shape)}, got {tuple(u.shape)}.")
    check_integers(1, samples=samples)
    check_integers(0, iterations=iterations)
    check_number("h", h)
    if not 0 < h < math.inf:
        raise ValueError(f"h must be a positive number, got {h}.")
