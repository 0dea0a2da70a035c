"""Numbers that change in the course of a training: λ, γ, the radius, the learning rate.

A schedule is a number, or any function from the index of the step (0, 1, ...) to a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..method.checks import check_integers, check_number

__all__ = ["Cosine", "Linear", "Schedule", "Share", "WarmUp", "value_at"]

Schedule = float | Callable[[int], float]


@dataclass(frozen=True)
class _Ramp:
    start: float
    end: float
    steps: int
    begin: int = 0

    def __post_init__(self) -> None:
        _positive(self.steps)
        for name in ("start", "end", "begin"):
            check_number(name, getattr(self, name))

    def _share(self, step: int) -> float:
        """Of the way that is done, 0 to 1."""
        return min(max((step - self.begin) / self.steps, 0.0), 1.0)


@dataclass(frozen=True)
class Linear(_Ramp):
    """From `start` to `end` on a straight line over `steps` steps, which begin at step `begin`; constant outside."""

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * self._share(step)


@dataclass(frozen=True)
class Cosine(_Ramp):
    """The same on half a period of a cosine."""

    def __call__(self, step: int) -> float:
        rest = (1 + math.cos(math.pi * self._share(step))) / 2
        return self.end + (self.start - self.end) * rest


@dataclass(frozen=True)
class WarmUp:
    """`then`, multiplied by (step + 1) / `steps` in the first `steps` steps."""

    steps: int
    then: Schedule

    def __post_init__(self) -> None:
        _positive(self.steps)
        checked_schedule(self.then, "then")

    def __call__(self, step: int) -> float:
        return value_at(self.then, step, "then") * min(1.0, (step + 1) / self.steps)


@dataclass(frozen=True)
class Share:
    """A share of a number that is measured once, when the training begins, and kept in its checkpoints.

    ``Penalty(weight=Share(0.1))``: λ · penalty is a tenth of the task loss at the first step whose penalty is positive.
    That step only measures; the penalty has its weight from the next one on. :class:`.constraint.Constraint` says
    which numbers its shares are of.

    Attributes:
        share: a schedule, as of ``Share(WarmUp(10, 0.1))``.
        within: steps with a penalty in which the number has to be found.
    """

    share: Schedule = 0.1
    within: int = 100

    def __post_init__(self) -> None:
        checked_schedule(self.share, "share")
        check_integers(1, within=self.within)


def value_at(schedule: Schedule, step: int, name: str) -> float:
    """The value of a schedule, checked.

    Raises:
        TypeError: it is no number.
        ValueError: it is negative or not finite.
    """
    number = schedule(step) if callable(schedule) else schedule
    if not hasattr(number, "__float__"):
        raise TypeError(f"{name} must be a number at every step, got {type(number).__name__} at step {step}.")
    value = float(number)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and >= 0 at every step, got {value} at step {step}.")
    return value


def checked_schedule(schedule: Any, name: str) -> None:
    """Raise if it is neither a number >= 0 nor callable.

    Raises:
        TypeError, ValueError: as said.
    """
    if callable(schedule):
        return
    if isinstance(schedule, bool) or not isinstance(schedule, (int, float)):
        remedy = f": pass float({name})" if hasattr(schedule, "__float__") else ""
        raise TypeError(
            f"{name} must be a number or a function from the step to one, got {type(schedule).__name__}{remedy}."
        )
    value_at(schedule, 0, name)


def _positive(steps: int) -> None:
    check_number("steps", steps)
    if steps < 1:
        raise ValueError(f"steps of a schedule must be at least 1, got {steps}.")
