"""A bound on the sensitivity along the ascent in place of a weight: the constraint.

    √q ≤ γ for a share ``quantile`` of the units (tokens or sequences), at the points and directions that are measured

Minimised is the objective with the penalty λ · mean relu(√q − γ), and λ is moved by dual ascent on what the constraint
says: log λ rises while more units than 1 − quantile are above γ and falls while fewer are. The gradient is that of the
hinge, a proxy: the share itself has none. The multiplier follows the share and not the hinge, which would drive the
last violation to nothing; see Cotter, Jiang and Sridharan, "Two-Player Games for Efficient Non-Convex Constrained
Optimization", `arXiv 1804.06500 <https://arxiv.org/abs/1804.06500>`_. What holds is measured on the units that λ
followed: a *sampled* constraint, no certificate for others.

A library of multipliers (cooper) brings additive multipliers and an optimizer for them; the logarithm with limits, the
share over several steps, sums over processes and micro-batches, and the start from the loss would stay here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..method.baselines import NEEDS_LOSS
from ..method.checks import check_choices, check_integers, check_number
from ..method.stability import OUTPUT_BOUNDS
from .config import Penalty
from .schedules import Share, checked_schedule

__all__ = ["Constraint", "gamma_for_step"]

#: the γ of ``gamma="auto"``: of the quantile at the start
AUTO = Share(0.5)
FOLLOWED = ("training", "validation")


@dataclass(frozen=True)
class Constraint(Penalty):
    """√q ≤ γ for a share of the units, held by a penalty whose weight follows the violations; in place of a Penalty.

    All attributes of :class:`Penalty` mean the same, but for these.

    Attributes:
        gamma: γ > 0: a schedule; or ``Share(s)``: s times the `quantile` of √q at the start, over at least `window`
            units. Until it is known nothing is penalised. ``"auto"``: ``Share(0.5)``, or with a `step_size` from it.
        quantile: share of the units that have to be within γ, in (0, 1).
        weight: λ at the start: a schedule, or ``Share(s)``: s times the task loss over γ, at which units with √q = 2γ
            would cost s times the loss (with a `step_size` over the γ of C = 0).
        form: ``"hinge"``.
        window: units that the share of violations is averaged over, at least; where a step has fewer, over several.
        rate: largest change of log λ in a step, at a share of twice what is allowed, or of none.
        span: λ stays within this factor of its start, on both sides. At the lower end γ does not bind; at the upper
            one it is not met, which is reported, and the training goes on.
        follow: ``"training"``: λ follows the units that the hinge is minimised on; ``"validation"``: those of held-out
            batches (``fit(validation=)``, the trainers' ``eval_dataset``, :meth:`.step.Objective.measure`), in eval
            mode, one ascent and one measurement more in every step with a penalty.
        step_size: η > 0 of a raw step of the ascent, with ``gamma="auto"``, in the unit of the attack's `relative`.
            The constraint then is L_eff ≤ 1/η for the share `quantile` of the steps of the ascents, with the measured
            L_eff = L_out q + C along each realised step: λ follows that share, and γ is :func:`gamma_for_step` of C at
            this quantile, over the last `window` steps. Where C leaves nothing of 1/η, it is ``infeasible``: no γ is
            enough for the policy as it is. That is reported, and the training goes on with γ = 0. Costs two dual
            forwards for every step of an ascent.
    """

    form: str = "hinge"
    quantile: float = 0.95
    window: int = 500
    rate: float = 0.05
    span: float = 1e3
    follow: str = "training"
    step_size: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "none":
            raise ValueError(
                "method of a Constraint must measure something, got 'none': leave it out, or use Penalty."
            )
        if self.form != "hinge":
            raise ValueError(
                f"form of a Constraint must be 'hinge', got {self.form!r}: leave it out, or use Penalty."
            )
        for name in ("quantile", "rate", "span"):
            check_number(name, getattr(self, name))
        check_integers(1, window=self.window)
        if not 0 < self.quantile < 1:
            raise ValueError(
                f"quantile must be in (0, 1), got {self.quantile}: the share of the units that are within gamma."
            )
        if not self.rate > 0:
            raise ValueError(f"rate must be positive, got {self.rate}: the change of log λ in a step.")
        if not self.span > 1:
            raise ValueError(f"span must be larger than 1, got {self.span}: the factor within which λ stays.")
        check_choices(FOLLOWED, follow=self.follow)
        if self.step_size is not None:
            self._check_step(self.step_size)

    def _check_step(self, step_size: float) -> None:
        check_number("step_size", step_size)
        if not step_size > 0:
            raise ValueError(f"step_size must be positive, got {step_size}: η of a raw step.")
        if self.gamma != "auto":
            raise ValueError(
                f"gamma must be 'auto' with step_size={step_size}, from which it comes, got {self.gamma!r}."
            )
        if self.method in NEEDS_LOSS:
            raise ValueError(
                f"method must measure the policy's output for a step_size, got {self.method!r}, whose q is no part of "
                "the smoothness: use 'aligned' or another baseline."
            )
        if self.metric not in OUTPUT_BOUNDS:
            raise ValueError(
                f"metric must be one of {', '.join(OUTPUT_BOUNDS)} for a step_size, got {self.metric!r}: the curvature "
                "of the loss is bounded in these."
            )

    def _check_gamma(self) -> None:
        if self.gamma == "auto":
            return
        gamma = self.gamma.share if isinstance(self.gamma, Share) else self.gamma
        if gamma is None:
            raise ValueError(
                "gamma of a Constraint must be a positive number, a schedule, a Share or 'auto', got None."
            )
        checked_schedule(gamma, "gamma")
        if isinstance(gamma, (int, float)) and not gamma > 0:
            raise ValueError(f"gamma of a Constraint must be > 0, got {gamma}: the bound on the root of q.")

    @property
    def allowed(self) -> float:
        """Share of the units that may be above γ."""
        return 1 - self.quantile


def gamma_for_step(step_size: float, second_order: float, output_bound: float = 1.0) -> float | None:
    """γ at which the effective smoothness L_out γ² + C along the ascent is 1/η.

    Args:
        step_size: η of a raw step, positive.
        second_order: C ≥ 0, the measured ``second_order`` of a :class:`~aajr_kernels.StabilityReport`.
        output_bound: L_out > 0: 1 for the Fisher metric, 1/2 for the Euclidean norm of logits, over the number of
            units where the loss is their mean.

    Returns:
        γ, or None if C > 1/η: the step is infeasible whatever γ is.

    Raises:
        TypeError, ValueError: an argument is no number, or out of its range.
    """
    for name, value in (
        ("step_size", step_size),
        ("second_order", second_order),
        ("output_bound", output_bound),
    ):
        check_number(name, value, 0)
    for name, value in (("step_size", step_size), ("output_bound", output_bound)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}.")
    rest = 1 / step_size - second_order
    return None if rest < 0 else math.sqrt(rest / output_bound)
