"""Projected gradient ascent on an input: the adversary whose steps the penalty follows.

    δ_{t+1} = Π(δ_t + η_t s_t),    s_t = g_t (raw), u_t = g_t / ‖g_t‖ per group (normalized) or sign g_t (sign),

with g_t = ∇_δ of the loss at x + δ_t and Π the projection onto the ball. Nothing is unrolled: every point starts a
graph of its own, which is freed before the next.

What a step costs. The gradient is taken with ``torch.autograd.grad(loss, point)``, so ``.grad`` of no parameter is
written, no AccumulateGrad hook fires (DistributedDataParallel does not communicate), and PyTorch's own operations
compute no weight gradients: a step is one forward and the half of a backward that leads to the input. An
``autograd.Function`` written in Python, and a compiled model, cannot see that weight gradients are not wanted. Name
the model with ``module=``: its parameters then need no gradient while the attack runs, these do skip them too, and
activations that serve weight gradients alone are not kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..dual import Dual
from .attack_state import RandomState, frozen_parameters, modules_of, ranks_of
from .checks import check_integers
from .projection import NORMS, Ball, checked_radius
from .scopes import SCOPES, Groups, attackable, checked_agents
from .stepsize import AutoStep, GivenStep, checked_step_size
from .trajectory import Trajectory

__all__ = ["NonFiniteLoss", "ascend"]

STEPS = ("normalized", "raw", "sign")
INITS = ("zero", "uniform")


class NonFiniteLoss(ValueError):
    """The loss or its gradient is NaN or infinite on the way of an ascent."""


def ascend(
    loss_fn: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    radius: float | Tensor,
    steps: int,
    step_size: float | Tensor | str = "auto",
    step: str = "normalized",
    norm: str = "l2",
    scope: str = "sequence",
    agents: Tensor | None = None,
    init: str = "zero",
    restarts: int = 1,
    mask: Tensor | None = None,
    project: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
    module: nn.Module | Iterable[nn.Module] | None = None,
    eval_mode: bool = False,
    evaluate_last: bool = True,
    keep_gradients: bool = False,
    max_backtracks: int = 8,
) -> Trajectory:
    """Maximise a loss over a ball around `x` by projected gradient ascent, and return the way it went.

    Args:
        loss_fn: from a tensor like `x` to one loss per batch row, ``[B]``, which must depend on that row alone. It is
            called with the same random state every time, so that dropout has one mask for the whole attack and the
            training forward that follows it, of plain tensors or of a Dual (docs/ops/attention.md, for attention on a
            GPU). Autocast, where it is on, applies to it and to nothing else here.
        x: ``[B, ..., C]``, floating point, at least two axes; typically embeddings. Not changed, no graph to it.
        radius: of the ball, positive: a number, ``[B]``, or ``[B, G]``, one per group. Infinite leaves the set to
            `project`.
        steps: T ≥ 1.
        step_size: ``"auto"``, a number, ``[B]``, or ``[T, B]``: what multiplies the step's direction. ``"auto"``
            takes, row by row, the longest step it can find with κ‖Δ‖² ≤ ⟨g, Δ⟩, where Δ is the realised displacement
            and κ the negative curvature measured along it, from losses and slopes at both ends
            (:class:`.stepsize.AutoStep`); the loss then rises by at least half of ⟨g, Δ⟩. A row for which no such
            step is found stays where it is, with step size 0.
        step: ``"normalized"``, per group; ``"raw"``, the gradient itself; ``"sign"``.
        norm: ``"l2"``: Euclidean norm of every group ≤ radius; ``"linf"``: every entry.
        scope: what a group is: ``"sequence"``, all of a batch row; ``"token"``, one vector of the last axis;
            ``"agent"``, all tokens of an agent.
        agents: ``[*x.shape[:-1]]``, integers: the agent of every token; negative = nobody's, never attacked.
        init: ``"zero"`` starts at `x`, ``"uniform"`` at a point drawn uniformly from the ball.
        restarts: runs; per batch row the one that reached the largest loss anywhere on its way is returned. The first
            starts as `init` says, the others from uniform draws.
        mask: ``[*x.shape[:-1]]`` or broadcastable to `x`, nonzero = may be attacked. A row with nothing to attack
            stays where it is; a batch with nothing to attack is an error.
        project: from δ like `x` to δ like `x`, applied after the ball's projection (in float32 for lower dtypes). The
            composition is a projection for two boxes; otherwise give it the whole set and ``radius=math.inf``.
        generator: of the uniform draws; the global one by default, which advances.
        module: the model(s) inside `loss_fn`: their parameters need no gradient during the attack, and running
            statistics are put back after it. Sharded parameters (FSDP2) keep their flag; under FSDP2, and for a
            DistributedDataParallel, naming it also makes all ranks step back equally often, without which they would
            wait for each other forever under ``"auto"``.
        eval_mode: `module` is in eval mode during the attack.
        evaluate_last: also evaluate the loss at the last point, one forward more; otherwise it is NaN and counts as
            the worst. ``"auto"`` and restarts need it.
        keep_gradients: store the gradients at all points, the last one too.
        max_backtracks: of ``"auto"``, per step.

    Returns:
        Trajectory: detached. A zero gradient gives a zero direction and a step of zero.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value; `loss_fn` does not return ``[B]``, returns
            a loss that does not depend on its input, or one that is not finite (``"auto"``: at the start; later
            points where it is not finite are stepped back from).
    """
    plan = _plan(locals())
    with torch.inference_mode(False), torch.enable_grad():
        clean = x.detach().clone()
        wide = clean if clean.dtype in (torch.float32, torch.float64) else clean.float()
        groups = Groups(scope, clean.shape, plan.agents)
        ball = Ball(norm, checked_radius(radius, groups), groups)
        if not isinstance(ball.radius, Tensor) and math.isinf(ball.radius) and plan.needs_radius:
            raise ValueError(
                "radius must be finite for step_size='auto', init='uniform' and restarts, got inf: give one that "
                "covers the set of project."
            )
        attack = _Attack(loss_fn, clean, wide, groups, ball, plan)
        # before the random state is taken: draws advance the generator
        drawn = [init == "uniform" or run > 0 for run in range(restarts)]
        starts = [ball.draw(plan.keep, wide, generator) if d else torch.zeros_like(wide) for d in drawn]
        state = RandomState(clean.device)
        try:
            with frozen_parameters(plan.modules, eval_mode):
                attack.state = state
                best = attack.run(starts[0])
                for start in starts[1:]:
                    best = attack.better(best, attack.run(start))
        finally:
            state.restore()
        return replace(best, evaluations=(attack.with_gradient, attack.without))


@dataclass(frozen=True)
class _Plan:
    """The checked arguments that shape a run."""

    steps: int
    step: str
    step_size: Any
    agents: Tensor | None
    keep: Tensor | None
    project: Callable[[Tensor], Tensor] | None
    modules: tuple[nn.Module, ...]
    evaluate_last: bool
    keep_gradients: bool
    max_backtracks: int
    needs_radius: bool


def _plan(given: dict[str, Any]) -> _Plan:
    """Check everything that does not need the groups."""
    x = given["x"]
    if isinstance(x, Dual) or not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"x must be a plain floating point tensor, got {kind}: attack embeddings, not token ids."
        )
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"x must be [B, ..., C] and not empty, got shape {tuple(x.shape)}.")
    if not callable(given["loss_fn"]):
        raise TypeError(f"loss_fn must be callable, got {type(given['loss_fn']).__name__}.")
    for name, choices in (("step", STEPS), ("norm", NORMS), ("scope", SCOPES), ("init", INITS)):
        if given[name] not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {given[name]!r}.")
    check_integers(1, steps=given["steps"], restarts=given["restarts"])
    check_integers(0, max_backtracks=given["max_backtracks"])
    agents = checked_agents(given["agents"], x)
    if given["scope"] == "agent" and agents is None:
        raise ValueError("agents must be given with scope='agent': the agent of every token.")
    auto = isinstance(given["step_size"], str)
    if not given["evaluate_last"] and (auto or given["restarts"] > 1):
        raise ValueError(
            "evaluate_last=False goes with a given step_size and one run: 'auto' and restarts compare the last loss."
        )
    modules = modules_of(given["module"])
    if given["eval_mode"] and not modules:
        raise ValueError("eval_mode needs module=, the model to be put in eval mode.")
    return _Plan(
        steps=given["steps"],
        step=given["step"],
        step_size=checked_step_size(given["step_size"], given["steps"], x),
        agents=agents,
        keep=attackable(given["mask"], agents, x),
        project=given["project"],
        modules=modules,
        evaluate_last=given["evaluate_last"],
        keep_gradients=given["keep_gradients"],
        max_backtracks=given["max_backtracks"],
        needs_radius=auto or given["init"] == "uniform" or given["restarts"] > 1,
    )


class _Attack:
    """One attack on one batch: evaluations, moves, and the record of every run."""

    def __init__(
        self,
        loss_fn: Callable[[Tensor], Tensor],
        x: Tensor,
        wide: Tensor,
        groups: Groups,
        ball: Ball,
        plan: _Plan,
    ) -> None:
        self.loss_fn, self.x, self.wide = loss_fn, x, wide
        self.groups, self.ball, self.plan = groups, ball, plan
        self.state: RandomState | None = None
        self.ranks = ranks_of(plan.modules)
        self.with_gradient = self.without = 0

    def run(self, delta: Tensor) -> Trajectory:
        """From one start."""
        plan, record = self.plan, _Record()
        delta = self._feasible(delta)
        losses, gradient = self.gradient(delta)
        if isinstance(plan.step_size, str):
            rule: AutoStep | GivenStep = AutoStep(self, plan.steps, plan.max_backtracks)
            _finite(losses, gradient, "at the start")
        else:
            rule = GivenStep(self, plan.step_size)
        record.points.append(self.point(delta))
        for t in range(plan.steps):
            unit = self.groups.unit(gradient)
            direction = {"raw": gradient, "normalized": unit, "sign": gradient.sign()}[plan.step]
            record.add(unit, self.groups.norm(gradient), losses, gradient if plan.keep_gradients else None)
            last = t == plan.steps - 1
            want = "gradient" if not last or plan.keep_gradients else "loss" if plan.evaluate_last else "none"
            move = rule.take(t, delta, direction, losses, gradient, want)
            record.moved(move.delta - delta, move.step_size, move.projected, self.point(move.delta))
            delta, losses, gradient = move.delta, move.losses, move.gradient
        record.add(None, None, losses, gradient if plan.keep_gradients else None)
        trajectory = record.trajectory(self)
        known = trajectory.losses if plan.evaluate_last else trajectory.losses[:-1]
        _finite(known, trajectory.gradient_norms, "on the way", "take smaller steps, or step_size='auto'")
        return trajectory

    def better(self, old: Trajectory, new: Trajectory) -> Trajectory:
        """Per batch row the run that reached the larger loss."""
        rows = new.losses.amax(0) > old.losses.amax(0)
        names = (*_PER_RUN, "gradients") if self.plan.keep_gradients else _PER_RUN
        chosen: dict[str, Any] = {}
        for name in names:
            a, b = getattr(new, name), getattr(old, name)
            chosen[name] = torch.where(rows.reshape(1, -1, *(1,) * (a.dim() - 2)), a, b)
        return replace(old, **chosen)

    # -- evaluations --------------------------------------------------------------------------------------------------

    def point(self, delta: Tensor) -> Tensor:
        """x + δ in the dtype of x."""
        return (self.wide + delta).to(self.x.dtype)

    def gradient(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Losses ``[B]`` and their gradient, zero where nothing may be attacked."""
        self.with_gradient += 1
        point = self.point(delta).requires_grad_()
        # a copy may be changed in place, and hooks on what enters a module do not meet a leaf, where some are refused
        losses = self._losses(point.clone())
        with torch.autocast(self.x.device.type, enabled=False):
            found = None
            if losses.requires_grad:
                (found,) = torch.autograd.grad(losses.sum(), point, allow_unused=True)
            if found is None:
                raise ValueError(
                    "the loss of loss_fn does not depend on its input: a detach(), a no-grad block or the clean input "
                    "in place of the argument breaks the path."
                )
        return losses.detach(), self._masked(found.to(self.wide.dtype))

    def loss(self, delta: Tensor) -> Tensor:
        """Losses ``[B]`` alone."""
        self.without += 1
        with torch.no_grad():
            return self._losses(self.point(delta))

    def _losses(self, point: Tensor) -> Tensor:
        assert self.state is not None
        losses = self.state.replay(self.loss_fn, point)
        if not isinstance(losses, Tensor) or not losses.is_floating_point():
            kind = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
            raise TypeError(f"loss_fn must return a floating point tensor of losses, got {kind}.")
        if losses.shape != (self.x.shape[0],):
            raise ValueError(
                f"loss_fn must return one loss per batch row, shape ({self.x.shape[0]},), got {tuple(losses.shape)}: "
                "reduce over every axis but the first."
            )
        return losses

    def all(self, rows: Tensor) -> bool:
        """Whether it is true of all rows, on all ranks that have to agree."""
        if self.ranks is None:
            return bool(rows.all())
        everywhere = rows.all().int()
        torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MIN, group=self.ranks)
        return bool(everywhere)

    # -- moves --------------------------------------------------------------------------------------------------------

    def moved(self, delta: Tensor, direction: Tensor, step_size: Tensor) -> tuple[Tensor, Tensor]:
        """Π(δ + η s) for η ``[B]``, and whether the projection moved it, ``[B]``."""
        rows = (-1, *(1,) * (delta.dim() - 1))
        free = delta + direction * step_size.to(delta).reshape(rows)
        inside = self._feasible(free)
        # a projection of what is inside already may still round
        slack = 4 * torch.finfo(free.dtype).eps * free.abs().flatten(1).amax(-1)
        return inside, (inside - free).abs().flatten(1).amax(-1) > slack

    def _feasible(self, delta: Tensor) -> Tensor:
        delta = self.ball.project(delta)
        if self.plan.project is None:
            return delta
        with torch.no_grad():
            found = self.plan.project(delta)
        if isinstance(found, Tensor) and not found.is_floating_point():
            raise TypeError(f"project must return a floating-point perturbation, got {found.dtype}.")
        if not isinstance(found, Tensor) or found.shape != delta.shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"project must return a perturbation of shape {tuple(delta.shape)}, got {got}.")
        return self._masked(found.to(delta))

    def _masked(self, values: Tensor) -> Tensor:
        return values if self.plan.keep is None else torch.where(self.plan.keep, values, 0.0)


#: fields of a trajectory that differ between restarts
_PER_RUN = (
    "points",
    "directions",
    "displacements",
    "losses",
    "gradient_norms",
    "step_sizes",
    "projected",
)


class _Record:
    """What one run leaves behind, step by step."""

    def __init__(self) -> None:
        self.points: list[Tensor] = []
        self.columns: dict[str, list[Tensor]] = {name: [] for name in (*_PER_RUN[1:], "gradients")}

    def add(self, unit: Tensor | None, norms: Tensor | None, losses: Tensor, gradient: Tensor | None) -> None:
        for name, value in (
            ("directions", unit),
            ("gradient_norms", norms),
            ("losses", losses),
            ("gradients", gradient),
        ):
            if value is not None:
                self.columns[name].append(value)

    def moved(self, displacement: Tensor, step_size: Tensor, projected: Tensor, point: Tensor) -> None:
        self.columns["displacements"].append(displacement)
        self.columns["step_sizes"].append(step_size)
        self.columns["projected"].append(projected)
        self.points.append(point)

    def trajectory(self, attack: _Attack) -> Trajectory:
        plan, x = attack.plan, attack.x
        stacked: dict[str, Any] = {name: torch.stack(v) for name, v in self.columns.items() if v}
        for name in ("directions", "displacements", "gradients"):
            if name in stacked:
                stacked[name] = stacked[name].to(x.dtype)
        return Trajectory(
            x=x,
            points=torch.stack(self.points),
            radius=attack.ball.radius,
            norm=attack.ball.norm,
            scope=attack.groups.scope,
            step=plan.step,
            mask=plan.keep,
            agents=plan.agents,
            **stacked,
        )


def _finite(losses: Tensor, gradients: Tensor, where: str, remedy: str = "check x and the model") -> None:
    """Raise if a loss or a gradient is NaN or infinite."""
    for name, values in (("loss", losses), ("gradient", gradients)):
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteLoss(f"loss_fn gave a {name} that is NaN or infinite {where}: {remedy}.")
