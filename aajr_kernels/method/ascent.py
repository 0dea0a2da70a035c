"""Projected gradient ascent on an input: the adversary whose steps the penalty follows.

    δ_{t+1} = Π(δ_t + η_t s_t),    s_t = g_t (raw), u_t = g_t / ‖g_t‖ per group (normalized) or sign g_t (sign),

with g_t = ∇_δ of the loss at x + δ_t and Π the projection onto the ball. Nothing is unrolled: every point starts a
graph of its own, which is freed before the next.

What a step costs. The gradient is taken with ``torch.autograd.grad(loss, point)``, so ``.grad`` of no parameter is
written, no AccumulateGrad hook fires (DistributedDataParallel does not communicate), and PyTorch's own operations
compute no weight gradients: a step is one forward and the half of a backward that leads to the input. An
``autograd.Function`` written in Python, and a compiled model, cannot see that weight gradients are not wanted. Name
the model with ``module=``: its parameters then need no gradient while the attack runs, these do skip them too, and
activations that serve only weight gradients are not saved.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import capture
from ..dual import Dual
from .attack_state import frozen_parameters, modules_of, ranks_of
from .checks import check_choices, check_integers, kind_of
from .evaluator import Evaluator
from .projection import NORMS, Ball, checked_radius
from .scopes import SCOPES, Groups, attackable, checked_agents, widened
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
    scope: str | None = None,
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
        loss_fn: from a tensor like `x` to one loss per batch row, ``[B]``, which must depend only on that row. It is
            called with the same random state every time, so that dropout has one mask for the whole attack and the
            training forward that follows it, of plain tensors or of a Dual (docs/ops/attention.md, for attention on a
            GPU). Autocast, where it is on, applies to it and to nothing else here.
        x: ``[B, ..., C]``, floating point, at least two axes; typically embeddings. Not changed, no graph to it.
        radius: of the ball, positive: a number, ``[B]``, or ``[B, G]``, one per group. Infinite leaves the set to
            `project`.
        steps: T ≥ 1.
        step_size: ``"auto"``, a number, ``[B]``, or ``[T, B]``: the factor of the step's direction. ``"auto"``
            takes, row by row, the longest step it can find with κ‖Δ‖² ≤ ⟨g, Δ⟩, where Δ is the realised displacement
            and κ the negative curvature measured along it, from losses and slopes at both ends
            (:class:`.stepsize.AutoStep`); the loss then rises by at least half of ⟨g, Δ⟩. A row for which no such
            step is found stays where it is, with step size 0.
        step: ``"normalized"``, per group; ``"raw"``, the gradient itself; ``"sign"``.
        norm: ``"l2"``: Euclidean norm of every group ≤ radius; ``"linf"``: every entry.
        scope: the group: ``"sequence"`` (the default), all of a batch row; ``"token"``, one vector of the last
            axis; ``"agent"``, all tokens of an agent. The unit of penalties along the trajectory follows it.
        agents: ``[*x.shape[:-1]]``, integers: the agent of every token; negative = none, never attacked.
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

    While a CUDA graph is captured (:func:`aajr_kernels.graphed`) values go unchecked: NaN reaches the trajectory.

    Raises:
        UnsupportedOperation: a CUDA graph is being captured, and ``step_size="auto"``, ``scope="agent"`` or a
            `loss_fn` that draws random numbers would have the host read values.
        TypeError, ValueError: an argument has a wrong type, shape or value; `loss_fn` does not return ``[B]``, returns
            a loss that does not depend on its input, or one that is not finite (``"auto"``: at the start; later
            points where it is not finite are stepped back from).
    """
    _check_input(loss_fn, x)
    check_choices(STEPS, step=step)
    check_choices(NORMS, norm=norm)
    scope_is_default, scope = scope is None, "sequence" if scope is None else scope
    check_choices(SCOPES, scope=scope)
    check_choices(INITS, init=init)
    check_integers(1, steps=steps, restarts=restarts)
    check_integers(0, max_backtracks=max_backtracks)
    agents = checked_agents(agents, x)
    if scope == "agent" and agents is None:
        raise ValueError("agents must be given with scope='agent': the agent of every token.")
    auto = isinstance(step_size, str)
    if not evaluate_last and (auto or restarts > 1):
        raise ValueError(
            "evaluate_last=False goes with a given step_size and one run: 'auto' and restarts compare the last loss."
        )
    if auto:
        capture.refuse(
            x.device, "step_size='auto' steps back by what it measures", "give a number or a tensor"
        )
    modules = modules_of(module)
    if eval_mode and not modules:
        raise ValueError("eval_mode needs module=, the model to be put in eval mode.")
    step_sizes = checked_step_size(step_size, steps, x)
    keep = attackable(mask, agents, x)
    with torch.inference_mode(False), torch.enable_grad():
        clean = x.detach().clone()
        groups = Groups(scope, clean.shape, agents)
        ball = Ball(norm, checked_radius(radius, groups), groups)
        drawn = [init == "uniform" or run > 0 for run in range(restarts)]
        if not isinstance(ball.radius, Tensor) and math.isinf(ball.radius) and (auto or any(drawn)):
            raise ValueError(
                "radius must be finite for step_size='auto', init='uniform' and restarts, got inf: give one that "
                "covers the set of project."
            )
        # before the random state is taken: draws advance the generator
        zero = torch.zeros_like(widened(clean))
        starts = [ball.draw(keep, zero, generator) if is_drawn else zero for is_drawn in drawn]
        evaluator = Evaluator(loss_fn, clean, ball, keep, project, ranks_of(modules))
        run = functools.partial(
            _run,
            evaluator,
            steps=steps,
            step=step,
            step_sizes=step_sizes,
            max_backtracks=max_backtracks,
            evaluate_last=evaluate_last,
            keep_gradients=keep_gradients,
        )
        try:
            with frozen_parameters(modules, eval_mode):
                columns = run(starts[0])
                for start in starts[1:]:
                    columns = _better(columns, run(start))
        finally:
            evaluator.random.restore()
    return Trajectory(
        x=clean,
        radius=ball.radius,
        norm=norm,
        scope=scope,
        step=step,
        mask=keep,
        agents=agents,
        evaluations=evaluator.calls,
        scope_is_default=scope_is_default,
        **columns,
    )


def _check_input(loss_fn: Any, x: Any) -> None:
    if isinstance(x, Dual) or not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(
            f"x must be a plain floating point tensor, got {kind_of(x)}: attack embeddings, not token ids."
        )
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"x must be [B, ..., C] and not empty, got shape {tuple(x.shape)}.")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}.")


def _run(
    evaluator: Evaluator,
    start: Tensor,
    *,
    steps: int,
    step: str,
    step_sizes: str | Tensor,
    max_backtracks: int,
    evaluate_last: bool,
    keep_gradients: bool,
) -> dict[str, Tensor]:
    """The ascent from one start: the fields of its trajectory, steps along the first axis."""
    groups = evaluator.ball.groups
    delta = evaluator.feasible(start)
    losses, gradient = evaluator.gradient(delta)
    if isinstance(step_sizes, str):
        rule: AutoStep | GivenStep = AutoStep(evaluator, steps, max_backtracks)
        _require_finite(evaluator, losses, gradient, "at the start")
    else:
        rule = GivenStep(evaluator, step_sizes)

    def at_point(losses: Tensor, gradient: Tensor) -> dict[str, Tensor]:
        return {"losses": losses, "gradients": gradient} if keep_gradients else {"losses": losses}

    rows: list[dict[str, Tensor]] = [{"points": evaluator.point(delta)}]
    for t in range(steps):
        unit = groups.unit(gradient)
        direction = {"raw": gradient, "normalized": unit, "sign": gradient.sign()}[step]
        rows.append(
            {"directions": unit, "gradient_norms": groups.norm(gradient), **at_point(losses, gradient)}
        )
        is_last = t == steps - 1
        want = "gradient" if not is_last or keep_gradients else "loss" if evaluate_last else "none"
        end = rule.take(t, delta, direction, losses, gradient, want)
        rows.append(
            {
                "displacements": end.delta - delta,
                "step_sizes": end.step_size,
                "projected": end.projected,
                "points": evaluator.point(end.delta),
            }
        )
        delta, losses, gradient = end.delta, end.losses, end.gradient
    rows.append(at_point(losses, gradient))
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: torch.stack([row[name] for row in rows if name in row]) for name in names}
    for name in ("directions", "displacements", "gradients"):
        if name in columns:
            columns[name] = columns[name].to(evaluator.x.dtype)
    known = columns["losses"] if evaluate_last else columns["losses"][:-1]
    remedy = "take smaller steps, or step_size='auto'"
    _require_finite(evaluator, known, columns["gradient_norms"], "on the way", remedy)
    return columns


def _better(old: dict[str, Tensor], new: dict[str, Tensor]) -> dict[str, Tensor]:
    """Per batch row the run that reached the larger loss."""
    rows = new["losses"].amax(0) > old["losses"].amax(0)
    return {
        name: torch.where(rows.reshape(1, -1, *(1,) * (old[name].dim() - 2)), new[name], old[name])
        for name in old
    }


def _require_finite(
    evaluator: Evaluator,
    losses: Tensor,
    gradients: Tensor,
    where: str,
    remedy: str = "check x and the model",
) -> None:
    """Raise on all ranks that call the model equally often, or on none."""
    if capture.reads_no_value(losses.device):
        return
    for name, values in (("loss", losses), ("gradient", gradients)):
        if not evaluator.all(torch.isfinite(values)):
            raise NonFiniteLoss(f"loss_fn gave a {name} that is NaN or infinite {where}: {remedy}.")
