"""How far a step goes: a given number, or the longest step whose measured curvature keeps it monotone.

Let φ(τ) be the loss along the realised segment δ + τΔ, 0 ≤ τ ≤ 1, with φ'(τ) = ⟨∇g, Δ⟩. From losses and slopes at both
ends follow two averages of the curvature −φ'' along the segment, with weights 2(1 − τ) and 2τ:

    κ₁‖Δ‖² = 2 (φ'(0) − (φ(1) − φ(0))),        κ₂‖Δ‖² = 2 ((φ(1) − φ(0)) − φ'(1)).

κ is the larger one, or 0. The condition κ‖Δ‖² ≤ φ'(0) contains κ₁‖Δ‖² ≤ φ'(0), which is φ(1) − φ(0) ≥ φ'(0)/2 itself:
what the condition promises where κ bounds the curvature everywhere on the segment holds here by measurement. On a
quadratic loss κ₁ = κ₂ is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..backends import capture
from .checks import is_number, kind_of
from .evaluator import Evaluator
from .scopes import Groups

__all__ = ["AutoStep", "GivenStep", "StepEnd", "checked_step_size"]

#: a first step as long as this share of the ball's radius times T reaches the border from the centre with some to spare
TRIAL = 2.5
GROWTH, SAFETY = 2.0, 0.9
#: bounds on the factor of a backtrack
LEAST, MOST = 0.1, 0.5
#: losses are compared up to so many units in the last place
ULPS = 8.0


@dataclass
class StepEnd:
    """The end of a step.

    Attributes:
        delta: like x.
        losses: ``[B]`` there; NaN if not wanted.
        gradient: like x, there; zero if not wanted.
        step_size: ``[B]``.
        projected: ``[B]``.
    """

    delta: Tensor
    losses: Tensor
    gradient: Tensor
    step_size: Tensor
    projected: Tensor


def checked_step_size(step_size: object, steps: int, x: Tensor) -> str | Tensor:
    """``"auto"``, or the step sizes ``[T, B]``.

    Raises:
        TypeError: it is neither a number, a floating point tensor nor a string.
        ValueError: it is another string, not positive, or of a shape that does not fit.
    """
    if isinstance(step_size, str):
        if step_size != "auto":
            raise ValueError(f"step_size must be 'auto', a number or a tensor, got {step_size!r}.")
        return step_size
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    shape = (steps, x.shape[0])
    if is_number(step_size):
        if not 0 < step_size < math.inf:
            raise ValueError(f"step_size must be positive and finite, got {step_size}.")
        return torch.full(shape, float(step_size), dtype=dtype, device=x.device)
    if not isinstance(step_size, Tensor) or not step_size.is_floating_point():
        raise TypeError(
            f"step_size must be 'auto', a number or a floating point tensor, got {kind_of(step_size)}."
        )
    if step_size.shape not in ((), shape[1:], shape, (steps, 1)):
        raise ValueError(
            f"step_size must be a number, [{shape[1]}] (one per batch row) or [{steps}, {shape[1]}] (steps by rows), "
            f"got shape {tuple(step_size.shape)}."
        )
    if not capture.reads_no_value(step_size.device) and not bool(
        ((step_size > 0) & step_size.isfinite()).all()
    ):
        raise ValueError("step_size must be positive and finite everywhere.")
    return step_size.detach().to(device=x.device, dtype=dtype).expand(shape)


class GivenStep:
    """Step sizes from outside, ``[T, B]``."""

    def __init__(self, evaluator: Evaluator, step_sizes: Tensor) -> None:
        self.evaluator, self.step_sizes = evaluator, step_sizes

    def take(
        self, t: int, delta: Tensor, direction: Tensor, losses: Tensor, gradient: Tensor, want: str
    ) -> StepEnd:
        """Step t, and the ``"gradient"``, the ``"loss"`` or ``"none"`` of both at its end."""
        evaluator, step_size = self.evaluator, self.step_sizes[t]
        end, projected = evaluator.step(delta, direction, step_size)
        if want == "gradient":
            losses, gradient = evaluator.gradient(end)
        else:
            losses = evaluator.loss(end) if want == "loss" else torch.full_like(losses, math.nan)
            gradient = torch.zeros_like(gradient)
        return StepEnd(end, losses, gradient, step_size, projected)


class AutoStep:
    """Backtracking, row by row, to κ‖Δ‖² ≤ ⟨g, Δ⟩ with κ measured on the step just tried.

    The gradient at the end of a step that is taken is the next step's, so a step that needs no backtracking costs
    nothing beyond a given one. The last step is judged only from losses, by κ₁, unless its gradient is kept. The
    measured κ gives the length of the next trial: it may double, and is bounded by the diameter of the ball.
    """

    def __init__(self, evaluator: Evaluator, steps: int, max_backtracks: int) -> None:
        self.evaluator, self.max_backtracks = evaluator, max_backtracks
        self.rows = Groups("sequence", evaluator.wide.shape)
        self.reach = evaluator.ball.reach(evaluator.keep, evaluator.wide)
        self.share = min(TRIAL / steps, GROWTH)
        self.curvature: Tensor | None = None  # κ of the last step, [B]
        self.length: Tensor | None = None  # ‖η s‖ last tried, [B]

    def take(
        self, t: int, delta: Tensor, direction: Tensor, losses: Tensor, gradient: Tensor, want: str
    ) -> StepEnd:
        """Step t; see :meth:`GivenStep.take`."""
        evaluator = self.evaluator
        # lengths from here on: a raw gradient may be tiny, and what follows squares the direction
        size = self.rows.norm(direction).squeeze(-1)
        direction = self.rows.unit(direction)
        trial = self._trial(direction, gradient)
        zeros = torch.zeros_like(trial)
        best = StepEnd(delta, losses, gradient, zeros, zeros.bool())
        trial, stuck = self._uphill(delta, direction, gradient, trial)
        accepted, kappa = stuck, zeros
        for attempt in range(self.max_backtracks + 1):
            if evaluator.all(accepted):
                break
            end, projected = evaluator.step(delta, direction, trial)
            end = _where(accepted, best.delta, end)
            if want == "gradient":
                new_losses, new_gradient = evaluator.gradient(end)
            else:
                new_losses, new_gradient = evaluator.loss(end), gradient
            displacement = end - delta
            slope = _row_dot(gradient, displacement)
            gain = (new_losses - losses).to(slope)
            deficit = 2 * (slope - gain)
            if want == "gradient":
                deficit = torch.maximum(deficit, 2 * (gain - _row_dot(new_gradient, displacement)))
            slack = ULPS * self._epsilon(losses) * torch.maximum(losses.abs(), new_losses.abs()).to(slope)
            uphill = slope > self._noise(gradient, end)
            accepted_now = (deficit <= slope + slack) & uphill & deficit.isfinite() & ~accepted
            kappa = torch.where(
                accepted_now, deficit.clamp(min=0) / displacement.flatten(1).square().sum(-1), kappa
            )
            attempt_end = StepEnd(end, new_losses, new_gradient, trial, projected)
            best, accepted = _merge(accepted_now, attempt_end, best), accepted | accepted_now
            if attempt < self.max_backtracks:
                # κ‖Δ‖² grows with the square of the length, the slope with the length
                factor = torch.nan_to_num(SAFETY * slope / deficit, nan=LEAST).clamp(LEAST, MOST)
                trial = torch.where(accepted, trial, trial * factor)
        self.curvature = torch.where(accepted & ~stuck, kappa, torch.inf)
        self.length = trial
        used = torch.where(size > 0, best.step_size / torch.where(size > 0, size, 1.0), 0.0)
        return replace(best, step_size=used)

    def _uphill(
        self, delta: Tensor, direction: Tensor, gradient: Tensor, trial: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Shorter trials where the projection turns a step downhill, and the rows where none leads uphill."""
        for _ in range(self.max_backtracks + 1):
            end, _projected = self.evaluator.step(delta, direction, trial)
            flat = _row_dot(gradient, end - delta) <= self._noise(gradient, end)
            if not bool((flat & (trial > 0)).any()):
                break
            trial = torch.where(flat, trial * LEAST, trial)
        return trial, flat

    def _trial(self, direction: Tensor, gradient: Tensor) -> Tensor:
        """First length to try, ``[B]``, of a direction whose rows have length 1; 0 where it is zero."""
        shares = self.evaluator.ball.groups.norm(direction)
        has_direction = shares > 0
        reach = torch.where(
            has_direction, self.reach / torch.where(has_direction, shares, 1.0), torch.inf
        ).amin(-1)
        reach = torch.where(reach.isinf(), 0.0, reach)
        if self.curvature is None or self.length is None:
            return reach * self.share
        failed = self.curvature.isinf()  # the last search failed: go on where it stopped
        longest = torch.where(failed, self.length, GROWTH * self.length)
        longest = torch.where(self.length > 0, longest, reach * self.share)
        curved = SAFETY * _row_dot(gradient, direction) / self.curvature
        curved = torch.where(failed | (self.curvature <= 0), torch.inf, curved)
        return torch.minimum(torch.minimum(longest, curved), GROWTH * reach)

    def _noise(self, gradient: Tensor, delta: Tensor) -> Tensor:
        """Largest change of a slope by rounding of a perturbation, ``[B]``."""
        sizes = self.rows.norm(gradient) * self.rows.norm(delta)
        return 4 * torch.finfo(delta.dtype).eps * sizes.squeeze(-1)

    def _epsilon(self, losses: Tensor) -> float:
        """Rounding unit of the coarsest arithmetic known to be inside the loss."""
        dtypes = [losses.dtype, self.evaluator.x.dtype]
        device = self.evaluator.x.device.type
        if torch.is_autocast_enabled(device):
            dtypes.append(torch.get_autocast_dtype(device))
        return max(torch.finfo(dtype).eps for dtype in dtypes)


def _merge(rows: Tensor, new: StepEnd, old: StepEnd) -> StepEnd:
    return StepEnd(*(_where(rows, a, b) for a, b in zip(new.__dict__.values(), old.__dict__.values())))


def _where(rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(rows.reshape(-1, *(1,) * (a.dim() - 1)), a, b)


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(-1)
