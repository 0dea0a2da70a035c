"""Is the inner maximisation stable? What an ascent met on its way, step by step.

Along a segment Δ = ℓ d of an ascent on g, let κ be the supremum over the segment of the negative part of dᵀ∇²g d. Then
g rises by at least ⟨∇g, Δ⟩ − κ‖Δ‖²/2, so the step is monotone whenever

    κ‖Δ‖² ≤ 2⟨∇g, Δ⟩,

for every kind of step and every projection: d is the displacement that was realised, which after a projection is not
the direction that was asked for. Special cases bound only the step size, ``eta_max``:

==============  =====================  =============================================
step            without projection     with projection on a convex set
==============  =====================  =============================================
raw             η ≤ 2/κ                η ≤ 2/κ
normalised      α ≤ 2‖∇g‖/κ            α ≤ 2‖∇g‖/κ
... per token   α ≤ 2 mean‖∇ᵢg‖/κ      α ≤ 2 min‖∇ᵢg‖/κ (a set for each token)
sign            α ≤ 2‖∇g‖₁/(nκ)        none (NaN)
==============  =====================  =============================================

With f the policy, J its Jacobian and the loss L of its output, dᵀ∇²g d = (Jd)ᵀ∇²L(Jd) + Σₖ ∂ₖL · dᵀ∇²fₖ d. For
cross-entropy on logits the first term is the Fisher q itself and at most ½‖Jd‖², the second at most √2 ‖D²f[d,d]‖:
their sum is the effective smoothness ``smoothness`` of the trajectory, and with q ≤ γ² it is bounded by
``smoothness_at_gamma``.

Where L is convex in the outputs, as cross-entropy is, the first term is positive curvature. It does not shorten a
monotone ascent step: κ, the negative part, comes from the second term only, and η ≤ 2/C with C = G_out ‖D²f[d,d]‖
suffices whatever γ is. γ bounds the curvature from above: how fast the gradient turns along the way, and how far
trajectories from two starts separate there, by 1 + η κ⁺ per raw step where d is an eigenvector of ∇²g, with κ⁺ the
positive part, ``kappa_positive``. Directions that the ascent does not take are not bounded; ``expansion`` has them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..backends import capture
from . import probes
from .attack_state import RandomState, frozen_parameters, modules_of
from .checks import check_choices, check_integers, check_iterations, check_number
from .head import LMHead
from .replay import separation
from .report import StabilityReport

if TYPE_CHECKING:
    from .trajectory import Trajectory

__all__ = ["StabilityReport", "step_condition", "stability_report"]

CURVATURES = ("exact", "difference", "none")
#: per output row: the largest curvature of cross-entropy on logits times ‖Jd‖² (times q for fisher), and its gradient
OUTPUT_BOUNDS = {"l2": (0.5, math.sqrt(2)), "logits": (0.5, math.sqrt(2)), "fisher": (1.0, math.sqrt(2))}


def step_condition(kappa: torch.Tensor, displacement_norm: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """Whether κ‖Δ‖² ≤ 2⟨∇g, Δ⟩: the condition under which a step of an ascent cannot lower g.

    Args:
        kappa: supremum over the segment of the negative part of the curvature along it, ≥ 0.
        displacement_norm: ‖Δ‖, the same shape.
        slope: ⟨∇g, Δ⟩ at the start of the segment, the same shape.
    """
    return kappa * displacement_norm.square() <= 2 * slope


def stability_report(
    loss_fn: Callable[[Any], Any],
    x: torch.Tensor,
    traj: Trajectory,
    *,
    curvature: str = "exact",
    samples: int = 3,
    func: Callable[[Any], Any] | None = None,
    head: LMHead | nn.Linear | None = None,
    output_loss: Callable[[Any], Any] | None = None,
    metric: str = "fisher",
    gamma: float | None = None,
    output_mask: torch.Tensor | None = None,
    output_bounds: tuple[float | torch.Tensor, float | torch.Tensor] | None = None,
    unit: str | None = None,
    power_iterations: int | str = 0,
    nearby: float | torch.Tensor | None = None,
    project: Callable[[torch.Tensor], torch.Tensor] | None = None,
    generator: torch.Generator | None = None,
    module: nn.Module | Iterable[nn.Module] | None = None,
    tolerance: float | None = None,
) -> StabilityReport:
    """Curvature, admissible step, violations and alignment of every step of an ascent.

    For a loss that is convex in the outputs, as cross-entropy is, only ``second_order`` limits monotone steps;
    ``gauss_newton``, which γ bounds, is positive curvature: it decides how fast the gradient turns and how far nearby
    trajectories separate (docs/method.md; ``python -m experiments curvature`` measures both).

    What it costs, in T steps; a dual forward is about two plain ones:

    ======================================  ====================================================================
    displacements, losses, alignment        nothing: they are read from the trajectory
    ``curvature="exact"``                   T · samples dual forwards of `loss_fn`, each with its backward
    ``curvature="difference"``              T · (samples − 1) + 1 plain forwards and backwards
    ``func``                                T · samples dual forwards, T more with `gamma`, no backward
    ``output_loss``                         T plain forwards and backwards, T dual forwards
    ``power_iterations``                    T · (power_iterations + 1) dual forwards and their backwards
    ``nearby``                              2 T plain forwards and backwards
    ======================================  ====================================================================

    κ and κ⁺ are the largest of the sampled values, so they may fall short of the suprema (``unexplained`` counts the
    steps where that shows for κ); they are exact where the curvature along a segment is monotone, or constant as in a
    quadratic. Call it in the mode the trajectory was made in. Every evaluation starts from the same random state, so
    that dropout draws the same mask; the state is put back at the end as it was.

    Args:
        loss_fn: the function that was maximised, called with Duals (and plain tensors for ``"difference"``); returns
            one loss per batch row, ``[B]``. Rows must not depend on each other.
        x: the clean input of the trajectory, ``[B, ...]``; checked against it.
        traj: the trajectory, T steps.
        curvature: ``"exact"``: reverse over forward at every sample; ``"difference"``: mean curvature between
            neighbouring samples, from differences of gradients; ``"none"``.
        samples: points of each segment, its ends included, evenly spaced; at least 2.
        func: the policy, called with one Dual; returns logits ``[B, ..., V]`` or a model output with ``.logits``
            (hidden states with `head`). Adds the effective smoothness and, with `gamma`, the hinge-active fraction.
        head: the language-model head; its logits are formed here, ``[samples, V]`` at a time and row.
        output_loss: from func's output to ``[B]``, ``loss_fn(x) = output_loss(func(x))``. Adds the sandwich.
        metric: ``"fisher"``, ``"logits"`` or ``"l2"``: which q the first term of the smoothness and the hinge take.
        gamma: threshold of a hinge on √q along the directions uₜ.
        output_mask: the units (tokens) of func's output that the loss reads, ``[B, ...]``; True = included.
        output_bounds: (L_out, G_out), the bounds of ∇²L (relative to q) and of ‖∇L‖ per unit of the output: numbers,
            or ``[B]`` for each row; by default those of cross-entropy summed over units. Divide them by the number of
            units for a mean, as ``lm_loss`` takes it: by ``(labels != -100).sum(-1)``.
        unit: ``"sequence"`` compares the summed q of a row with γ², ``"token"`` that of each unit. It follows the
            scope of the trajectory; another one needs ``ascend(scope=)`` too.
        power_iterations: iterations for ‖J‖₂, the upper end of the sandwich; ``"exact"`` for small inputs, with as many
            tangents as a row has entries; 0 leaves it out. Needs `func`.
        nearby: length of the offset of a second start, drawn for every row in a random direction of what may be
            attacked, in the unit of `x`; or the offset itself, like `x`. The recorded steps are repeated from both
            starts, with the recorded step sizes. Adds the expansion. Take it well above the rounding of `x` and well
            below the radius.
        project: of :func:`ascend`, where it had one; for `nearby`.
        generator: of the random start of the power iteration, and of the offset.
        module: the model, or several: their parameters' gradients are switched off meanwhile, which saves the backward
            of the weights.
        tolerance: a loss that falls by less than this times its size counts as rounding; by default 16 eps of the
            losses' dtype.

    Returns:
        StabilityReport, all tensors detached.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value; the recorded steps cannot be repeated.
        UnsupportedOperation: `loss_fn` or `func` uses a function without a derivative rule; a CUDA graph is being
            captured.
    """
    _check(x, traj, curvature, samples, func, output_loss, metric, gamma, power_iterations, tolerance, nearby)
    capture.refuse(x.device, "stability_report reads values on the host", "call it outside of the graph")
    unit = traj.unit(unit)
    offset = None if nearby is None else _offset(nearby, traj, generator)
    modules, random = modules_of(module), RandomState(x.device)
    loss_fn = functools.partial(random.replay, loss_fn)
    try:
        with frozen_parameters(modules, evaluate=False):
            fields = _measure_path(traj, tolerance)
            lengths = fields["displacement_norms"]
            units = [probes.row_unit(delta) for delta in traj.displacements]
            if curvature != "none":
                fields.update(_curvature(loss_fn, traj, units, lengths, samples, curvature))
                fields["violated"] = fields["moved"] & ~step_condition(
                    fields["kappa"], lengths, fields["slopes"]
                )
                fields["eta_max"] = _largest_step(traj, fields["kappa"], lengths, fields["slopes"])
            if func is not None:
                policy = functools.partial(random.replay, probes.logits_func(func, head))
                bounds = OUTPUT_BOUNDS[metric] if output_bounds is None else output_bounds
                output = (metric, output_mask)
                fields.update(
                    _smoothness(policy, traj, units, lengths, samples, *output, bounds, gamma, unit)
                )
                if gamma is not None:
                    fields["hinge_active"] = _hinge(policy, traj, *output, gamma, unit)
                fields.update(_sandwich(policy, output_loss, traj, power_iterations, generator))
            if offset is not None:
                distances = separation(loss_fn, traj, offset, project)
                fields["expansion"] = distances[1:] / distances[:-1]
    finally:
        random.restore()
    return StabilityReport(**{name: value.detach() for name, value in fields.items()})


def _measure_path(traj: Trajectory, tolerance: float | None) -> dict[str, Any]:
    """Quantities that need only the trajectory."""
    lengths = torch.stack([probes.row_norm(delta) for delta in traj.displacements])
    before, after = traj.losses[:-1], traj.losses[1:]
    relative = 16 * torch.finfo(traj.losses.dtype).eps if tolerance is None else tolerance
    moved = lengths > 0
    return {
        "losses": traj.losses,
        "gains": after - before,
        "displacement_norms": lengths,
        "moved": moved,
        "non_monotone": moved & (after - before < -relative * torch.maximum(after.abs(), before.abs())),
        "projected": traj.projected,
        "alignment": _alignment(traj.directions),
    }


def _segment(traj: Trajectory, t: int, samples: int) -> list[torch.Tensor]:
    """Evenly spaced points of step t, its ends included; the ends are exactly those of the trajectory."""
    start, end = traj.points[t], traj.points[t + 1]
    inner = [start + (j / (samples - 1)) * traj.displacements[t] for j in range(1, samples - 1)]
    return [start, *inner, end]


def _curvature(
    loss_fn: Callable[[Any], Any],
    traj: Trajectory,
    units: list[torch.Tensor],
    lengths: torch.Tensor,
    samples: int,
    kind: str,
) -> dict[str, torch.Tensor]:
    """κ, κ⁺, and ⟨∇g, Δ⟩ at the start of every step."""
    kappas, positive, slopes = [], [], []
    at_end: torch.Tensor | None = None
    for t, (d, length) in enumerate(zip(units, lengths)):
        points = _segment(traj, t, samples)
        if kind == "exact":
            measured = [probes.curvature_along(loss_fn, p, d) for p in points]
            slope, curvatures = measured[0][1], torch.stack([curvature for _, _, curvature in measured])
        else:
            first = probes.gradient(loss_fn, points[0])[1] if at_end is None else at_end
            gradients = [first, *(probes.gradient(loss_fn, p)[1] for p in points[1:])]
            along, at_end = torch.stack([probes.row_dot(g, d) for g in gradients]), gradients[-1]
            # means of the curvature between neighbours, within its bounds; off by eps ‖∇L‖ / spacing
            spacing = torch.where(length > 0, length / (samples - 1), 1.0)
            slope, curvatures = along[0], along.diff(dim=0) / spacing
        kappas.append(torch.where(length > 0, (-curvatures.amin(0)).clamp(min=0), 0.0))
        positive.append(torch.where(length > 0, curvatures.amax(0).clamp(min=0), 0.0))
        slopes.append(slope * length)
    return {
        "kappa": torch.stack(kappas),
        "kappa_positive": torch.stack(positive),
        "slopes": torch.stack(slopes),
    }


def _largest_step(
    traj: Trajectory, kappa: torch.Tensor, lengths: torch.Tensor, slopes: torch.Tensor
) -> torch.Tensor:
    """The step size, in the unit of the ascent's own, below which the step condition holds; inf where κ = 0."""
    safe = torch.where(kappa > 0, kappa, 1.0)
    norms = traj.gradient_norms
    if traj.step == "raw":
        bound = 2 / safe
    else:
        # without a projection the condition is linear in the step size
        square = torch.where(lengths > 0, lengths, 1.0).square()
        free = traj.step_sizes * 2 * slopes / (safe * square)
        smallest = torch.where(norms > 0, norms, float("inf")).amin(-1)
        boxed = torch.full_like(kappa, float("nan")) if traj.step == "sign" else 2 * smallest / safe
        bound = torch.where(traj.projected, boxed, free)
    return torch.where((kappa > 0) & (lengths > 0), bound, float("inf"))


def _smoothness(
    policy: Callable[[Any], Any],
    traj: Trajectory,
    units: list[torch.Tensor],
    lengths: torch.Tensor,
    samples: int,
    metric: str,
    mask: torch.Tensor | None,
    bounds: tuple[float | torch.Tensor, float | torch.Tensor],
    gamma: float | None,
    unit: str,
) -> dict[str, torch.Tensor]:
    """L_out q + G_out ‖D²f[d,d]‖ along every segment; D²f from the change of Jd between neighbouring samples."""
    firsts, seconds, largest, at_gamma = [], [], [], []
    for t, (d, length) in enumerate(zip(units, lengths)):
        spacing = torch.where(length > 0, length / (samples - 1), 1.0)
        q_max = second_max = torch.zeros_like(length)
        before: torch.Tensor | None = None
        for p in _segment(traj, t, samples):
            q, y_tan = probes.output_probe(policy, p, d, metric)
            q_max = torch.maximum(q_max, probes.sum_units(q, mask))
            if before is not None:
                sizes = torch.linalg.vector_norm((y_tan - before).to(q.dtype), 2, -1)
                change = torch.where(length > 0, probes.sum_units(sizes, mask) / spacing, 0.0)
                second_max = torch.maximum(second_max, change)
            before = y_tan
        if gamma is not None:
            # ‖u‖² is the number of groups that move: γ² bounds q of a direction so much longer than d, and per unit
            square = probes.row_norm(traj.directions[t]).square()
            count = probes.sum_units(torch.ones_like(q), mask) if unit == "token" else 1.0
            at_gamma.append(bounds[0] * gamma**2 * count / torch.where(square > 0, square, 1.0))
        firsts.append(bounds[0] * q_max)
        seconds.append(bounds[1] * second_max)
        largest.append(q_max)
    first, second = torch.stack(firsts), torch.stack(seconds)
    fields = {"gauss_newton": first, "second_order": second, "smoothness": first + second}
    fields["sensitivity"] = torch.stack(largest).sqrt()
    if gamma is not None:
        fields["smoothness_at_gamma"] = torch.stack(at_gamma) + second
    return fields


def _hinge(
    policy: Callable[[Any], Any],
    traj: Trajectory,
    metric: str,
    mask: torch.Tensor | None,
    gamma: float,
    unit: str,
) -> torch.Tensor:
    """Fraction of the units of every row where √q along uₜ is above γ, ``[T, B]``."""
    active = []
    for point, u in zip(traj.points, traj.directions):
        q, _ = probes.output_probe(policy, point, u, metric)
        if unit == "sequence":
            active.append((probes.sum_units(q, mask) > gamma**2).to(q.dtype))
        else:
            count = probes.sum_units(torch.ones_like(q), mask).clamp(min=1)
            active.append(probes.sum_units((q > gamma**2).to(q.dtype), mask) / count)
    return torch.stack(active)


def _sandwich(
    policy: Callable[[Any], Any],
    output_loss: Callable[[Any], Any] | None,
    traj: Trajectory,
    iterations: int | str,
    generator: torch.Generator | None,
) -> dict[str, torch.Tensor]:
    """‖Jᵀ∇L‖/‖∇L‖ ≤ ‖Ju‖ ≤ ‖J‖₂ at the start of every step, u of unit norm over the whole row."""
    fields: dict[str, list[torch.Tensor]] = {}
    v: torch.Tensor | None = None
    for point in traj.points[:-1]:
        if output_loss is not None:
            lower, middle = probes.sandwich(policy, output_loss, point, traj.mask)
            fields.setdefault("sandwich_lower", []).append(lower)
            fields.setdefault("sandwich_middle", []).append(middle)
        if iterations:
            if v is None and iterations != "exact":  # later steps start from the direction of the one before
                v = torch.randn(point.shape, generator=generator, dtype=point.dtype, device=point.device)
            norm, v = probes.spectral_norm(policy, point, v, iterations, traj.mask)
            fields.setdefault("spectral_norm", []).append(norm)
    return {name: torch.stack(values) for name, values in fields.items()}


def _offset(
    nearby: float | torch.Tensor, traj: Trajectory, generator: torch.Generator | None
) -> torch.Tensor:
    """From the start of the trajectory to the second one, like x."""
    if isinstance(nearby, torch.Tensor):
        return nearby
    draw = torch.randn(traj.x.shape, generator=generator, dtype=traj.x.dtype, device=traj.x.device)
    return nearby * probes.row_unit(probes.restrict(draw, traj.mask, traj.agents))


def _alignment(directions: torch.Tensor) -> torch.Tensor:
    """Cosine of successive directions per row, ``[T − 1, B]``; NaN where one of them is zero."""
    if directions.shape[0] < 2:
        return directions.new_zeros((0, directions.shape[1]), dtype=torch.float32)
    units = [probes.row_unit(u) for u in directions]
    cosines = torch.stack([probes.row_dot(a, b) for a, b in pairwise(units)])
    norms = torch.stack([probes.row_norm(u) for u in units])
    return torch.where((norms[1:] > 0) & (norms[:-1] > 0), cosines, float("nan"))


def _check(
    x: torch.Tensor,
    traj: Trajectory,
    curvature: str,
    samples: int,
    func: Any,
    output_loss: Any,
    metric: str,
    gamma: float | None,
    power_iterations: int | str,
    tolerance: float | None,
    nearby: Any,
) -> None:
    check_choices(CURVATURES, curvature=curvature)
    check_choices(OUTPUT_BOUNDS, metric=metric)
    if not isinstance(x, torch.Tensor) or x.shape != traj.x.shape:
        got = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"x must be the input of traj, shape {tuple(traj.x.shape)}, got {got}.")
    check_integers(2, samples=samples)  # the ends of a segment
    check_iterations(power_iterations=power_iterations)
    for name, number in (("gamma", gamma), ("tolerance", tolerance)):
        if number is not None:
            check_number(name, number, 0)
    if isinstance(nearby, torch.Tensor):
        if nearby.shape != x.shape:
            raise ValueError(
                f"nearby must be a length, or an offset of the shape of x {tuple(x.shape)}, got shape "
                f"{tuple(nearby.shape)}."
            )
    elif nearby is not None:
        check_number("nearby", nearby)
        if not nearby > 0:
            raise ValueError(f"nearby must be a positive length in the unit of x, got {nearby}.")
    for name, wanted in (
        ("output_loss", output_loss is not None),
        ("gamma", gamma is not None),
        ("power_iterations", power_iterations != 0),
    ):
        if wanted and func is None:
            raise ValueError(f"{name} needs func=, the policy whose output is measured.")
