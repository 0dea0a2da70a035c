"""The trajectory of an inner maximisation, a record without a graph, and the penalty along it.

    P = Σ_t w_t penalty(x + δ_t, v_t) / Σ_t w_t

with the directions v_t that the adversary took. Points and directions are constants: the gradient of P reaches the
parameters (and the clean input) only through the policy's derivative, and memory does not grow with the ascent.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..backends import capture
from ..torch_private import pytree
from .checks import check_choices, check_integers
from .options import PenaltyOptions
from .penalty import Measured, measure
from .scopes import Groups, agent_labels, unit_of

__all__ = ["PenaltyStatistics", "Trajectory", "trajectory_penalty"]

STEPS = ("all", "last", "random", "worst")
DIRECTIONS = ("ascent", "displacement", "sign")
PLACES = ("start", "mid", "end")


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Where an adversary went, T steps from ``x + δ_0`` to ``x + δ_T``; everything is detached.

    Attributes:
        x: the clean input, ``[B, ...]``.
        points: ``[T+1, *x.shape]``, x + δ_t.
        directions: ``[T, *x.shape]``, u_t: the gradient at ``points[t]``, scaled to Euclidean norm 1 in every group
            of the scope; zero where it is zero or where nothing may be attacked.
        displacements: ``[T, *x.shape]``, δ_{t+1} − δ_t as realised, after projection. δ is kept in float32 where x is
            in a lower dtype, to which only x + δ is rounded.
        losses: ``[T+1, B]`` at `points`; the last row is NaN where ``evaluate_last=False`` left it out.
        gradient_norms: ``[T, B, G]``, Euclidean norm of the gradient in every group.
        step_sizes: ``[T, B]``, the factor on the step's direction that was used; 0 for a row that stayed.
        projected: ``[T, B]``, bool: the projection moved the step.
        radius: a number, ``[B, 1]`` or ``[B, G]``.
        norm, scope, step: of :func:`ascend`.
        mask: bool, broadcastable to `x`: elements open to attack; None for all.
        agents: ``[*x.shape[:-1]]``, or None.
        gradients: ``[T+1, *x.shape]``, the gradients at `points`, where they were kept.
        evaluations: calls of the loss: with a gradient, and without; of all restarts together.
        scope_is_default: :func:`ascend` was called without a scope, so that another unit has to name it.
    """

    x: Tensor
    points: Tensor
    directions: Tensor
    displacements: Tensor
    losses: Tensor
    gradient_norms: Tensor
    step_sizes: Tensor
    projected: Tensor
    radius: float | Tensor
    norm: str = "l2"
    scope: str = "sequence"
    step: str = "normalized"
    mask: Tensor | None = None
    agents: Tensor | None = None
    gradients: Tensor | None = None
    evaluations: tuple[int, int] = (0, 0)
    scope_is_default: bool = False

    def __len__(self) -> int:
        """T, the number of steps."""
        return self.directions.shape[0]

    @property
    def groups(self) -> Groups:
        """The groups of the scope."""
        return Groups(self.scope, self.x.shape, self.agents)

    def unit(self, unit: str | None = None) -> str:
        """The unit of penalties along the trajectory: `unit` where it is named, else that of the scope.

        Raises:
            ValueError: they do not go together, and the scope is not named.
        """
        return unit_of(self.scope, unit, self.scope_is_default)

    @property
    def worst_index(self) -> Tensor:
        """``[B]``, the point of largest loss of every batch row; the last one where its loss was not evaluated."""
        return torch.where(self.losses.isnan(), torch.inf, self.losses).argmax(0)

    @property
    def worst_steps(self) -> Tensor:
        """``[B]``, the step that led to the worst point; the first one for a row that never got above its start."""
        return (self.worst_index - 1).clamp(min=0)

    @property
    def worst(self) -> Tensor:
        """Like `x`: every batch row at its point of largest loss (see `worst_index`)."""
        return gathered(self.points, self.worst_index.unsqueeze(0)).squeeze(0)

    @property
    def worst_loss(self) -> Tensor:
        """``[B]``, the loss at `worst`; NaN where it was not evaluated."""
        return self.losses.gather(0, self.worst_index.unsqueeze(0)).squeeze(0)

    def of_rows(self, rows: Tensor) -> Trajectory:
        """The trajectories of some batch rows, by index; `evaluations` stay those of the whole ascent."""
        batch = self.x.shape[0]

        def selected(name: str, value: Any) -> Any:
            axis = 0 if name in ("x", "radius", "mask", "agents") else 1
            is_shared = name == "mask" and isinstance(value, Tensor) and value.dim() < self.x.dim()
            if not isinstance(value, Tensor) or is_shared or value.shape[axis] != batch:
                return value
            return value.index_select(axis, rows.to(value.device))

        return replace(self, **{f.name: selected(f.name, getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True, eq=False)
class PenaltyStatistics:
    """Parts of a trajectory penalty; detached, except `primal`.

    Attributes:
        steps: ``[S, B]``, the step t of every batch row in each of the S measurements.
        weights: ``[S]``, what the penalty of each was multiplied by; they sum to 1.
        q: ``[S, K]``, mean of q over the included units (tokens or sequences).
        q_max: ``[S, K]``, the largest.
        active: ``[S, K]``, share of the included units with q above γ² (above 0 without a threshold): those which
            the penalty pushes.
        units: ``[S, K, U]``, q of each of the U units (tokens or sequences) of the batch, NaN where not included.
        primal: with ``return_primal=True``, of the last measurement: the result of func, or with `labels` the mean
            cross-entropy; attached to the graph.
    """

    steps: Tensor
    weights: Tensor
    q: Tensor
    q_max: Tensor
    active: Tensor
    units: Tensor
    primal: Any = None


def trajectory_penalty(
    func: Callable[..., Any],
    x: Tensor,
    traj: Trajectory,
    *,
    steps: str = "all",
    weights: Sequence[float] | Tensor | None = None,
    direction: str = "ascent",
    at: str | None = None,
    per_agent: bool = False,
    batch_steps: int = 1,
    inputs: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
    **penalty_options: Any,
) -> tuple[Tensor, PenaltyStatistics]:
    """Penalty on the sensitivity of `func` along the trajectory of an adversary: a weighted mean over its steps.

    Args:
        func: as in :func:`aligned_penalty`; called with one Dual, and with `inputs` as keyword arguments.
        x: the clean input ``[B, ...]`` that the trajectory started from. If it requires grad, gradients reach it as
            they reach every point x + δ_t; the values of the points are those of the trajectory.
        traj: from :func:`ascend`.
        steps: ``"all"``; ``"last"``; ``"random"``: every batch row draws one step, with probabilities `weights`, an
            unbiased estimate of ``"all"`` at the price of one step; ``"worst"``: every batch row at its point of
            largest loss, with the direction of the step that led there (of the first step for a row that never got
            above its start).
        weights: ``[T]``, nonnegative, one per step, for ``"all"`` and ``"random"``; equal by default. Steps of weight
            zero are not computed.
        direction: ``"ascent"``: u_t; ``"displacement"``: the realised δ_{t+1} − δ_t; ``"sign"``: the sign of the
            gradient. All are scaled to norm 1 in every group of the trajectory's scope.
        at: where on the segment from δ_t to δ_{t+1} the derivative is taken: ``"start"`` (the default), where the
            direction was computed; ``"mid"``; ``"end"``, where the last step of the attack ends, so that the
            adversarial loss comes from the same forward. ``"worst"`` has its own place.
        per_agent: one direction per agent of the trajectory, K in all, which share one primal: the joint direction
            restricted to the agent's tokens, scaled to norm 1 over them (every token by itself in scope ``"token"``).
            The mean is over agents too.
        batch_steps: so many points of the trajectory go through `func` at once, as a batch of ``batch_steps · B``,
            point by point. What `func` needs besides of the batch then has to come through `inputs`.
        inputs: tensors with leading axis B (attention masks, positions...), in any tree; they are repeated for
            ``batch_steps``, as are `mask` and `labels`.
        generator: of ``"random"``.
        penalty_options: metric, head, labels, gamma, form, mask, unit, reduction, denominator, return_primal and
            penalty_weight, see :func:`aligned_penalty`. `unit` follows the scope of the trajectory: ``"token"`` for
            directions of norm 1 per token, else ``"sequence"``; another one needs ``ascend(scope=)`` too. With
            ``reduction="none"`` the mean over steps keeps ``[K, *units]``. With ``return_primal=True`` the last
            measurement's primal is in the statistics.

    Returns:
        The penalty, and :class:`PenaltyStatistics`.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value; and errors of :func:`aligned_penalty`.
        UnsupportedOperation: a CUDA graph is being captured, and `per_agent` or `weights` would have the host read
            values.
    """
    _check(x, traj, steps, direction, at, per_agent, batch_steps, inputs)
    if unknown := sorted(set(penalty_options) - {field.name for field in fields(PenaltyOptions)}):
        raise TypeError(
            f"trajectory_penalty() has no option {', '.join(unknown)}, and aligned_penalty() neither."
        )
    options = PenaltyOptions(**penalty_options | {"unit": traj.unit(penalty_options.get("unit"))})
    index, shares = _steps_and_shares(traj, steps, weights, generator)
    place = "end" if steps == "worst" else at or "start"
    total: Tensor | None = None
    columns: list[dict[str, Tensor]] = []
    primal = None
    for part in _chunks(len(index), batch_steps, options.return_primal):
        rows, share = index[part], shares[part]
        point = traj.worst.unsqueeze(0) if steps == "worst" else _points(traj, rows, place)
        if x.requires_grad:  # the value stays that of the point, to the last bit
            point = point + (x - x.detach())
        repeated = _repeated(dict(inputs or {}), x.shape[0], len(rows))
        call = functools.partial(func, **repeated) if inputs else func
        here = _for_points(options, x, len(rows), float(share.sum()), part.stop == len(index))
        v = _tangents(traj, rows, direction, per_agent).flatten(1, 2)
        measured = measure(call, point.flatten(0, 1), v, here)
        value, primal = _weighted(measured, share, here), measured.primal
        total = value if total is None else total + value
        columns.append(_statistics(measured.q, len(rows), options))
    assert total is not None
    joined = {name: torch.cat([c[name] for c in columns]) for name in columns[0]}
    return total, PenaltyStatistics(index, shares, **joined, primal=primal)


def _steps_and_shares(
    traj: Trajectory, steps: str, weights: Sequence[float] | Tensor | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Step of every batch row ``[S, B]`` in S measurements, and their weights ``[S]``."""
    count, batch = len(traj), traj.x.shape[0]
    if weights is not None and steps not in ("all", "random"):
        raise ValueError(f"weights go with steps='all' or 'random', got steps={steps!r}.")
    if isinstance(weights, Tensor) or (weights is not None and steps == "random"):
        capture.refuse(
            traj.x.device,
            "trajectory_penalty reads a tensor of weights, and weights of steps='random', on the host",
            "leave them out, or pass numbers to steps='all'",
        )
    shares = step_shares(weights, count)
    one = torch.ones(1, dtype=torch.float64)
    if steps == "random":
        if capture.reads_no_value(traj.x.device):
            return torch.randint(count, (1, batch), device=traj.x.device, generator=generator), one
        return drawn_steps(shares, batch, generator).unsqueeze(0), one
    if steps == "worst":
        return traj.worst_steps.unsqueeze(0), one
    kept = torch.tensor([count - 1]) if steps == "last" else shares.nonzero().squeeze(-1)
    return kept.unsqueeze(-1).expand(-1, batch), one if steps == "last" else shares[kept]


def step_shares(weights: Sequence[float] | Tensor | None, count: int) -> Tensor:
    """Weights of the steps ``[T]``, float64 on the CPU, with sum 1.

    Raises:
        TypeError, ValueError: they are not `count` finite nonnegative numbers, or all zero.
    """
    if weights is None:
        return torch.full((count,), 1.0 / count, dtype=torch.float64)
    wrong = f"weights must be {count} finite numbers >= 0 with a positive sum, got {weights!r}."
    try:
        shares = torch.as_tensor(weights, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(wrong) from error
    if shares.shape != (count,) or not bool((shares >= 0).all()) or not 0 < float(shares.sum()) < math.inf:
        raise ValueError(wrong)
    return shares / shares.sum()


def drawn_steps(shares: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """So many steps, independently, with probabilities `shares`: ``[count]`` on the CPU."""
    chances = shares if generator is None else shares.to(generator.device)
    return torch.multinomial(chances, count, replacement=True, generator=generator).cpu()


def _chunks(count: int, size: int, last_alone: bool) -> list[slice]:
    """Measurements by forward; one whose primal is wanted has a forward of its own."""
    together = count - 1 if last_alone else count
    chunks = [slice(i, min(i + size, together)) for i in range(0, together, size)]
    return [*chunks, slice(together, count)] if last_alone else chunks


def _points(traj: Trajectory, index: Tensor, place: str) -> Tensor:
    """``[S, B, ...]``."""
    start = gathered(traj.points[:-1], index)
    if place == "start":
        return start
    end = gathered(traj.points[1:], index)
    return end if place == "end" else torch.lerp(start, end, 0.5)


def _tangents(traj: Trajectory, index: Tensor, direction: str, per_agent: bool) -> Tensor:
    """``[K, S, B, ...]``, of norm 1 in every group."""
    along = gathered(traj.displacements if direction == "displacement" else traj.directions, index)
    groups = (
        Groups("agent", along.shape[1:], traj.agents) if per_agent and traj.scope != "token" else traj.groups
    )
    if direction == "sign":
        along = along.sign()
    if direction != "ascent" or groups.scope != traj.scope:
        along = torch.stack([groups.unit(v) for v in along])
    if not per_agent:
        return along.unsqueeze(0)
    assert traj.agents is not None
    return torch.stack(
        [torch.where((traj.agents == a).unsqueeze(-1), along, 0.0) for a in agent_labels(traj.agents)]
    )


def gathered(values: Tensor, index: Tensor) -> Tensor:
    """``[S, B, ...]`` from ``[T, B, ...]`` and the step ``[S, B]`` of every batch row."""
    if index.device.type == "cpu" and (index.stride(1) == 0 or index.shape[1] == 1):
        return torch.stack(
            [values[step] for step in index[:, 0].tolist()]
        )  # no index has to go to the device
    return values[index.to(values.device), torch.arange(values.shape[1], device=values.device)]


def _for_points(
    options: PenaltyOptions, x: Tensor, count: int, share: float, is_last: bool
) -> PenaltyOptions:
    """The options for `count` points at once, which carry `share` of the weight."""
    changes: dict[str, Any] = {}
    if not is_last:  # the loss is that of the last measurement
        changes = {"return_primal": False, "labels": None}
    if options.penalty_weight is not None:
        changes["penalty_weight"] = options.penalty_weight * share
    if count > 1:
        per_row = {"mask": options.mask, "labels": changes.get("labels", options.labels)}
        for name, value in per_row.items():
            if value is not None:
                changes[name] = _repeated({name: value}, x.shape[0], count)[name]
        if options.denominator is not None:
            changes["denominator"] = options.denominator * count
    return replace(options, **changes) if changes else options


def _repeated(inputs: dict[str, Any], batch: int, count: int) -> dict[str, Any]:
    """Tensors of the batch for `count` points, one batch after the other.

    Raises:
        ValueError: a tensor does not start with the batch axis.
    """

    def repeat(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.dim() == 0 or leaf.shape[0] != batch:
            raise ValueError(
                f"tensors in {', '.join(inputs)} must have the batch of {batch} as their first axis, got shape "
                f"{tuple(leaf.shape)}: what does not depend on the batch belongs into func itself."
            )
        return leaf if count == 1 else leaf.repeat(count, *(1,) * (leaf.dim() - 1))

    repeated: dict[str, Any] = pytree.tree_map(repeat, inputs)
    return repeated


def _weighted(measured: Measured, share: Tensor, options: PenaltyOptions) -> Tensor:
    """The measurements of one forward, summed with their weights."""
    count, reduction = len(share), options.reduction
    if count == 1 or (reduction != "none" and bool((share == share[0]).all())):
        # a mean over several points is that of their means, a sum is the sum of their sums
        factor = float(share.sum() if reduction == "mean" else share[0])
        return measured.penalty if factor == 1.0 else measured.penalty * factor
    if reduction == "none":
        values = measured.penalty.unflatten(1, (count, -1)).movedim(1, 0)
    else:  # another weight for every step: reduced one by one
        rows = measured.q.shape[1] // count
        masks = [None] * count if options.mask is None else options.mask.split(rows)
        denominator = None if options.denominator is None else options.denominator / count
        values = torch.stack(
            [
                replace(options, mask=mask, denominator=denominator).reduce(q)
                for q, mask in zip(measured.q.split(rows, 1), masks)
            ]
        )
    return functools.reduce(torch.add, (value * weight for value, weight in zip(values, share.tolist())))


@torch.no_grad()
def _statistics(q: Tensor, count: int, options: PenaltyOptions) -> dict[str, Tensor]:
    """q ``[K, S · B, *batch]`` of one forward in numbers ``[S, K]``."""
    columns, observed = [], []
    for part in q.detach().split(q.shape[1] // count, 1) if count > 1 else (q.detach(),):
        units, keep = options.units(part)
        units = units.reshape(len(units), -1)
        number: Any = units.shape[1]
        if keep is not None:
            units, number = torch.where(keep.reshape(-1), units, 0.0), keep.sum().clamp(min=1)
        above = (units > (options.gamma or 0.0) ** 2).to(units).sum(-1)
        columns.append(torch.stack([units.sum(-1) / number, units.amax(-1), above / number]))
        observed.append(options.observed(part))
    mean, largest, active = torch.stack(columns, 1)
    return {"q": mean, "q_max": largest, "active": active, "units": torch.stack(observed)}


def _check(
    x: Any,
    traj: Any,
    steps: str,
    direction: str,
    at: str | None,
    per_agent: bool,
    batch_steps: int,
    inputs: Any,
) -> None:
    if not isinstance(traj, Trajectory):
        raise TypeError(f"traj must be a Trajectory, got {type(traj).__name__}: call ascend.")
    if not isinstance(x, Tensor) or x.shape != traj.x.shape or x.dtype != traj.x.dtype:
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"x must be the clean input of the trajectory, {traj.x.dtype} {tuple(traj.x.shape)}, got {got}."
        )
    check_choices(STEPS, steps=steps)
    check_choices(DIRECTIONS, direction=direction)
    check_choices(PLACES, at=at or "start")
    if steps == "worst" and at is not None:
        raise ValueError(
            f"at does not go with steps='worst', which is the worst point itself, got at={at!r}."
        )
    check_integers(1, batch_steps=batch_steps)
    if per_agent and traj.agents is None:
        raise ValueError("per_agent needs a trajectory with agents: give agents= to ascend.")
    if inputs is not None and not isinstance(inputs, Mapping):
        raise TypeError(f"inputs must be a mapping from names to tensors, got {type(inputs).__name__}.")
