"""The numbers of one step of a training: schedules, and λ and γ where they are found or moved."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .config import ObjectiveConfig
from .multiplier import Multiplier
from .schedules import value_at

__all__ = ["ScheduledValues"]


@dataclass(frozen=True)
class ScheduledValues:
    """The scheduled numbers at one step; `weight` is k·λ on every k-th step and 0 between.

    `measures` says whether the penalty is computed: it is, with a weight of 0, where λ is to be found.
    """

    radius: float
    weight: float
    gamma: float | None
    adversarial: float
    clean: float
    anchor: float
    measures: bool

    @classmethod
    def at(cls, config: ObjectiveConfig, step: int, multiplier: Multiplier | None = None) -> ScheduledValues:
        """Evaluate the schedules; `multiplier` has λ and γ, by default one that has measured nothing."""
        penalty = config.penalty
        weight, gamma = (multiplier or Multiplier(penalty)).at(step)
        is_due = penalty.method != "none" and (step + 1) % penalty.every == 0
        scheduled = cls(
            value_at(config.attack.radius, step, "radius"),
            penalty.every * (weight or 0.0) if is_due else 0.0,
            gamma,
            value_at(config.adversarial_weight, step, "adversarial_weight"),
            value_at(config.clean_weight, step, "clean_weight"),
            value_at(config.anchor_weight, step, "anchor_weight"),
            is_due and (weight is None or weight > 0),
        )
        if scheduled.radius:
            return scheduled
        return replace(scheduled, weight=0.0, adversarial=0.0, clean=1.0, measures=False)

    @property
    def without_losses(self) -> ScheduledValues:
        """The penalty only."""
        return replace(self, adversarial=0.0, clean=0.0, anchor=0.0)

    @property
    def has_loss(self) -> bool:
        """Whether any loss has a weight."""
        return bool(self.adversarial or self.clean or self.anchor)

    @property
    def attacks(self) -> bool:
        """Whether an ascent is needed."""
        return self.radius > 0 and (self.measures or self.adversarial > 0)
