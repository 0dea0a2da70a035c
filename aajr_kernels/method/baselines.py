"""Other penalties at the points of an ascent, under one interface and in the units of the aligned penalty.

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
``layer_product``      c_M Πₗ ‖Wₗ‖²₂, c_M the largest of M       singular values of the weights, no forward
=====================  ========================================  ==================================================

All are differentiable in the parameters, without double backward. Directions are held fixed, and yet the gradients are
those of the penalties as stated: a norm is ‖r‖ = ⟨r, w⟩ with w = r/‖r‖, a spectral norm the largest of the ‖J v‖, and
the derivative of a maximum does not see how the maximiser moves. ``spectral`` is exact as far as its iteration has
converged, and from below; with ``iterations="exact"`` it is exact, for small inputs. ``layer_product`` bounds all the
others in the same metric but the two of the loss, at every point (:mod:`.lipschitz`). ``aligned`` is the reference: the
first four differ only in the choice of v.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..dual import Dual, dual
from ..ops.head.counted import counted
from ..ops.sensitivity import sensitivity
from . import probes
from .attack_state import RandomState, frozen_parameters, modules_of
from .checks import check_choices, check_integers, check_iterations, check_number
from .head import LMHead, as_head
from .lipschitz import layer_product
from .losses import IGNORED
from .options import Metric, PenaltyOptions
from .penalty import measure
from .scopes import SCOPES, Groups, kept, unit_of
from .trajectory import Trajectory, drawn_steps, step_shares

__all__ = ["BASELINES", "METHODS", "baseline_penalty", "trajectory_baseline"]

METHODS = ("aligned", "random", "frobenius", "spectral", "input_gradient", "cure", "finite_difference")
#: those measured at points, of any model, and that of the weights of a plain network
BASELINES = (*METHODS, "layer_product")
NEEDS_DIRECTION = ("aligned", "cure", "finite_difference")
NEEDS_LOSS = ("input_gradient", "cure")
DRAWN = ("random", "frobenius", "spectral")
PER_SEQUENCE = ("frobenius", "spectral", "layer_product")
#: largest q of a metric for a change of the outputs of norm 1: the largest eigenvalue of diag p − ppᵀ is ½
LARGEST = {"l2": 1.0, "logits": 1.0, "fisher": 0.5, "probs": 0.25}


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
    iterations: int | str = 4,
    start: torch.Tensor | None = None,
    h: float = 1e-2,
    attack_mask: torch.Tensor | None = None,
    scope: str | None = None,
    agents: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    module: nn.Module | Iterable[nn.Module] | None = None,
    gamma: float | None = None,
    form: str = "squared",
    mask: torch.Tensor | None = None,
    unit: str | None = None,
    reduction: str = "mean",
    denominator: float | torch.Tensor | None = None,
    return_direction: bool = False,
    return_units: bool = False,
) -> Any:
    """One of :data:`BASELINES` at the point `x`; the first table of this module says what each is.

    Costs, beside the user's backward, in plain forwards (a backward counts two, a dual forward two): ``aligned`` and
    ``random`` 2; ``frobenius`` 1 + samples; ``spectral`` 2 + 6 · iterations, exact 3 for every entry of a row;
    ``input_gradient`` 5; ``cure`` 10; ``finite_difference`` 2; ``layer_product`` none.

    Args:
        method: one of :data:`BASELINES`.
        func: as for :func:`~aajr_kernels.aligned_penalty`; not used by ``input_gradient``, ``cure`` and
            ``layer_product``.
        x: the point, ``[B, ...]``.
        u: the ascent direction, like `x`; for ``aligned``, ``cure`` and ``finite_difference``.
        loss_fn: the adversary's loss, from a tensor or Dual like `x` to ``[B]``; for ``input_gradient`` and ``cure``.
        metric: ``"fisher"``, ``"logits"``, ``"probs"`` or ``"l2"``, or a function from the Dual that func returns to
            q ``[K, *units]``, a quadratic form in its tangents (for outputs of several parts).
        head: the language-model head, as for ``aligned_penalty``; ``finite_difference`` forms its logits.
        samples: random directions of ``random`` and ``frobenius``; their mean is taken before the form.
        iterations: of the power iteration of ``spectral``, at least 0; or ``"exact"``, from all derivatives at once,
            with memory for as many tangents as a row has entries.
        start: its first direction, like `x`; random by default. The last one is returned by `return_direction`, a
            good start for the next training step.
        h: length of the difference of ``cure`` and ``finite_difference``, relative to u.
        attack_mask: which entries of `x` an adversary may move (``Trajectory.mask``); other directions are not drawn.
        scope: ``"sequence"`` (the default), ``"token"`` or ``"agent"``: the scope of u, and of the directions of
            ``random``.
        agents: agent of every token, for ``scope="agent"``.
        generator: of random directions, on the device of `x`.
        module: the model, or several: the gradients of their parameters are off during power iteration and while
            directions are computed. For ``layer_product`` the network itself, of the layers that
            :func:`.lipschitz.layer_product` knows; it has the same value in every row, and `mask` no meaning.
        gamma: as in ``aligned_penalty``, and so are `form`, `mask`, `reduction` and `denominator`; applied to the
            table's penalty (to its share per unit for ``unit="token"``). J has the outputs inside the mask only, in
            the power iteration too. The loss-based methods know rows only: `mask`
            and `unit` have no meaning for them, the loss decides what counts.
        unit: follows the scope of the directions: ``"token"`` in scope ``"token"``, else ``"sequence"``, as always for
            ``frobenius``, ``spectral`` and ``layer_product``, which bound the penalty along directions of the scopes
            ``"sequence"`` and ``"token"`` (joint directions of A agents: A times as much). Another one needs `scope`
            too; per token the first two are shares of ‖J‖²_F and ‖J‖₂², and bound nothing.
        return_direction: also return the direction(s) that were measured, detached: like `x`, or ``[samples, ...]``;
            None for ``layer_product``.
        return_units: also return q of every unit before the form, detached, ``[1, U]``, NaN where not included.

    Returns:
        The penalty, or a tuple of it and what else is to be returned. With ``reduction="none"`` the penalty is
        ``[1, *units]``.

    Raises:
        TypeError, ValueError: an argument is missing for the method, or has a wrong type, shape or value.
        UnsupportedOperation: `func` or `loss_fn` uses a function without a derivative rule; ``layer_product`` does not
            know a layer.
    """
    _check(method, func, x, u, loss_fn, samples, iterations, h, module, metric)
    scope_is_default, scope = scope is None, "sequence" if scope is None else scope
    check_choices(SCOPES, scope=scope)
    of_directions = "sequence" if method in PER_SEQUENCE else scope
    if method not in NEEDS_LOSS:
        unit = unit_of(of_directions, unit, scope_is_default, "baseline_penalty")
    reducing = dict(
        gamma=gamma, form=form, mask=mask, unit=unit or "token", reduction=reduction, denominator=denominator
    )
    options = PenaltyOptions(metric=metric, head=head, **reducing)  # type: ignore[arg-type]
    allowed = functools.partial(probes.restrict, mask=attack_mask, agents=agents)
    v = u
    if method in DRAWN and (method != "spectral" or iterations != "exact"):
        # before the state that every forward starts from is taken: a draw from the global generator advances it
        v = _drawn_direction(method, x, start, samples, allowed, Groups(scope, x.shape, agents), generator)
    modules, random = modules_of(module), RandomState(x.device)
    if method == "layer_product":
        options = replace(options, mask=None, unit="token")
        bound = layer_product(modules[0], None if head is None else as_head(head))
        q = (LARGEST[str(metric)] * bound.square()).expand(1, len(x))
    elif method in NEEDS_LOSS:
        assert loss_fn is not None
        options = replace(options, mask=None, unit="token")
        loss = functools.partial(random.replay, loss_fn)
        with frozen_parameters(modules, evaluate=False):
            _, g = probes.gradient(loss, x)
            if method == "cure":
                assert u is not None
                g = probes.gradient(loss, x + h * u)[1] - g
            v = probes.row_unit(allowed(g))
        slope = _slope(loss, x, v)
        if u is not None and method == "cure":
            slope = (_slope(loss, x + h * u, v) - slope) / h
        q = slope.square().unsqueeze(0)
    else:
        assert func is not None
        policy = functools.partial(random.replay, func)
        if method == "spectral":
            with frozen_parameters(modules, evaluate=False):
                q_of = functools.partial(_quadratic, policy, x.detach(), options=options)
                v = probes.top_direction(q_of, x, v, iterations, allowed)
        assert v is not None
        if method == "finite_difference":
            q = _difference(policy, x, v, options, h)
        else:
            q = _quadratic(policy, x, v, options).mean(0, keepdim=True)
    more: list[torch.Tensor | None] = []
    if return_direction:
        more.append(None if v is None or method == "layer_product" else v.detach())
    if return_units:
        more.append(options.observed(q))
    return (options.reduce(q), *more) if more else options.reduce(q)


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
        method: one of :data:`BASELINES`.
        func: the policy.
        traj: the trajectory; its mask, scope and agents bound the random directions.
        steps: ``"all"``, ``"last"`` (the last direction, at the point it was taken from), or ``"random"``: one step,
            drawn with the probabilities of `weights`, so that its expectation is what ``"all"`` gives.
        weights: w_t ≥ 0 of the T steps, normalised to sum 1; equal by default.
        generator: of the random directions and of the random step.
        start: first direction of ``spectral``; each later step starts from the direction of the one before.
        options: of :func:`baseline_penalty`, without ``reduction="none"``.

    Returns:
        ``(penalty, aux)``: aux holds ``steps`` (indices), ``penalties`` (detached, one for each), ``units``
        (``[steps, 1, U]``, q of every unit, NaN where not included) and ``direction``, the last one measured.

    Raises:
        TypeError, ValueError: as there; unknown `steps`, bad `weights`.
    """
    if options.get("reduction") == "none":
        raise ValueError(
            "reduction must be 'mean' or 'sum' over a trajectory, got 'none': penalties are averaged."
        )
    check_choices(("all", "last", "random"), steps=steps)
    count = len(traj)
    share = step_shares(weights, count)
    weighted = [(t, float(share[t])) for t in range(count) if share[t] > 0]
    if steps != "all":
        weighted = [(count - 1 if steps == "last" else int(drawn_steps(share, 1, generator)), 1.0)]
    scope = None if traj.scope_is_default else traj.scope
    options = dict(attack_mask=traj.mask, scope=scope, agents=traj.agents) | options
    total: torch.Tensor | None = None
    penalties, units, direction = [], [], start
    for t, weight in weighted:
        begin = direction if method == "spectral" else None
        penalty, direction, observed = baseline_penalty(
            *(method, func, traj.points[t], traj.directions[t]),
            start=begin,
            generator=generator,
            return_direction=True,
            return_units=True,
            **options,
        )
        penalties.append(penalty.detach())
        units.append(observed)
        total = weight * penalty if total is None else total + weight * penalty
    assert total is not None
    return total, {
        "steps": [t for t, _ in weighted],
        "penalties": torch.stack(penalties),
        "units": torch.stack(units),
        "direction": direction,
    }


def _drawn_direction(
    method: str,
    x: torch.Tensor,
    start: torch.Tensor | None,
    samples: int,
    allowed: Callable[[torch.Tensor], torch.Tensor],
    groups: Groups,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Random draws ``[samples, ...]``, or the start of the power iteration, like `x`."""
    if method == "spectral":
        v = start if start is not None else _noise(x, (), generator)
        if v.shape != x.shape:
            raise ValueError(f"start must have the shape of x {tuple(x.shape)}, got {tuple(v.shape)}.")
        return probes.row_unit(allowed(v.detach().to(x.dtype)))
    draws = _noise(x, (samples,), generator)
    if method == "frobenius":  # signs: no other distribution with E vvᵀ = 1 has a smaller variance
        return torch.stack([allowed(v) for v in torch.where(draws >= 0, 1.0, -1.0).to(x.dtype)])
    return torch.stack([groups.unit(allowed(v)) for v in draws])


def _noise(x: torch.Tensor, lead: tuple[int, ...], generator: torch.Generator | None) -> torch.Tensor:
    return torch.randn((*lead, *x.shape), generator=generator, dtype=x.dtype, device=x.device)


def _quadratic(
    policy: Callable[[Any], Any], x: torch.Tensor, v: torch.Tensor, options: PenaltyOptions
) -> torch.Tensor:
    """q ``[K, *units]`` of ‖J v‖²_M, 0 outside the mask."""
    if isinstance(options.metric, str):
        q = measure(policy, x, v, replace(options, reduction="none", denominator=None)).q
    else:
        y = policy(dual(x, v))
        if not isinstance(y, Dual):
            raise ValueError("the output of func does not depend on its input x (no tangent arrived).")
        q = options.metric(y)
    return kept(q, options.included(tuple(q.shape[1:]), q.device))


def _difference(
    policy: Callable[[Any], Any], x: torch.Tensor, u: torch.Tensor, options: PenaltyOptions, h: float
) -> torch.Tensor:
    """The same of (f(x + hu) − f(x)) / h."""
    metric, tokens = options.metric, None
    near, far = policy(x), policy(x + h * u)
    batch = near.shape[:-1] if isinstance(near, torch.Tensor) else torch.Size()
    if options.head is not None and options.mask is not None and isinstance(metric, str) and batch:
        keep = options.included(tuple(batch), near.device)
        assert keep is not None  # there is a mask
        tokens = counted(keep.reshape(-1), None, IGNORED, 1)
        if tokens is not None and tokens.count is None:  # their number is known: logits of these only
            near, far = (tokens.gather(y.reshape(1, -1, y.shape[-1]))[0] for y in (near, far))
        else:
            tokens = None
    logits = probes.logits_func(lambda y: y, options.head)
    y = logits(near)
    if not isinstance(y, torch.Tensor):
        raise TypeError(f"func must return a tensor or a model output with .logits, got {type(y).__name__}.")
    pair = Dual(torch.stack([y, (logits(far) - y) / h]))
    q = sensitivity(pair, metric) if isinstance(metric, str) else metric(pair)
    return q if tokens is None else tokens.spread(q, batch.numel()).reshape(len(q), *batch)


def _slope(loss: Callable[[Any], Any], x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """⟨∇L, w⟩ per row, ``[B]``, differentiable in the parameters."""
    y = loss(dual(x, w))
    assert isinstance(y, Dual)  # its gradient was just taken
    return y.tangent


def _check(
    method: str,
    func: Any,
    x: Any,
    u: Any,
    loss_fn: Any,
    samples: int,
    iterations: int | str,
    h: float,
    module: Any,
    metric: Metric,
) -> None:
    check_choices(BASELINES, method=method)
    if not isinstance(x, torch.Tensor) or isinstance(x, Dual) or x.dim() < 2:
        got = f"shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"x must be a plain tensor [B, ...], got {got}.")
    if method in NEEDS_DIRECTION and u is None:
        raise ValueError(f"u must be given for method {method!r}: the direction of the ascent at x.")
    if method in NEEDS_LOSS and loss_fn is None:
        raise ValueError(f"loss_fn must be given for method {method!r}: the adversary's loss per batch row.")
    if method == "layer_product" and not isinstance(module, nn.Module):
        raise ValueError(
            f"module must be the network for method {method!r}, one nn.Module whose layers are known, got {module!r}."
        )
    if method == "layer_product" and not isinstance(metric, str):
        raise ValueError(f"metric must be one of {', '.join(LARGEST)} for method {method!r}, got {metric!r}.")
    if method not in (*NEEDS_LOSS, "layer_product") and func is None:
        raise ValueError(f"func must be given for method {method!r}: the policy.")
    if u is not None and u.shape != x.shape:
        raise ValueError(f"u must have the shape of x {tuple(x.shape)}, got {tuple(u.shape)}.")
    check_integers(1, samples=samples)
    check_iterations(iterations=iterations)
    check_number("h", h)
    if not 0 < h < math.inf:
        raise ValueError(f"h must be a positive number, got {h}.")
