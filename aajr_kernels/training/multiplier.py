"""λ and γ of a penalty in the course of a training: read from schedules, found at the start, or moved."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .config import Penalty
from .constraint import Constraint
from .schedules import Schedule, Share, value_at

__all__ = ["Multiplier"]


class Multiplier:
    """λ and γ of a penalty in the course of a training: read from schedules, found at the start, or moved.

    The micro-batches of a step :meth:`add` what they measured; :meth:`settle` takes it in, once per step. All processes
    settle with the same sums, so that they have the same λ.

    Args:
        config: of a :class:`Penalty` a :class:`Share` is found; of a :class:`Constraint` λ moves, too.
    """

    def __init__(self, config: Penalty) -> None:
        self.config = config
        self.constraint = config if isinstance(config, Constraint) else None
        self.step = 0  # of what was added last
        # λ is its schedule times scale and exp(log), γ its schedule times bound
        self._scale = None if isinstance(config.weight, Share) else 1.0
        self._bound = None if isinstance(config.gamma, Share) else 1.0
        self._log = 0.0
        self._window: list[tuple[float, float]] = []  # units above γ and units, of the last steps
        self._loss: float | None = None
        self._roots: list[float] = []
        self._tries = 0
        self._sums: list[Tensor] = []
        self._units: list[Tensor] = []
        self._has_warned = False

    def at(self, step: int) -> tuple[float | None, float | None]:
        """λ and γ at a step. λ is None where it is to be found; γ too, or where there is none.

        Raises:
            ValueError: γ of a constraint is 0.
        """
        config, gamma = self.config, None
        if config.gamma is not None and self._bound is not None:
            gamma = self._bound * value_at(_schedule(config.gamma), step, "gamma")
            if self.constraint is not None and not gamma > 0:
                raise ValueError(
                    f"gamma of a Constraint must be > 0 at every step, got {gamma} at step {step}."
                )
        if self._scale is None or self._bound is None:
            return None, gamma
        return self._scale * value_at(_schedule(config.weight), step, "weight") * math.exp(self._log), gamma

    @property
    def has_measurements(self) -> bool:
        """Whether something was added since it settled."""
        return bool(self._sums)

    def add(self, step: int, loss: Tensor, penalty: Tensor, units: Tensor, gamma: float | None) -> None:
        """Take note of a micro-batch; nothing waits for the device once γ is known.

        Args:
            step: of the training.
            loss, penalty: its shares of those of the step, times the number of processes that have shares in it.
            units: q of every unit, NaN where not included; may be empty.
            gamma: the threshold on √q at this step, None while it is to be found.
        """
        if self.constraint is None and self._scale is not None:
            return
        self.step = step
        is_included = ~units.isnan()
        above = units > (gamma or 0.0) ** 2
        numbers = (loss, penalty, above.sum(), is_included.sum())
        self._sums.append(torch.stack([number.detach().to(units.device).double() for number in numbers]))
        if self.constraint is not None and self._bound is None:
            self._units.append(units[is_included])

    def discard(self) -> None:
        """Forget what was added, of a step that was not taken."""
        self._sums, self._units = [], []

    def settle(self, group: Any = None) -> None:
        """Find λ and γ, or move λ, from what was added since the last time.

        Args:
            group: of processes that all call this.

        Raises:
            ValueError: a Share is not found in the steps that it gives.
        """
        if not self._sums:
            return
        totals = torch.stack(self._sums).sum(0)
        roots = torch.cat(self._units).double().sqrt().tolist() if self._units else []
        self.discard()
        processes = 1
        if group is not None:
            processes = group.size()
            torch.distributed.all_reduce(totals, group=group)
            if self._bound is None:
                of_all: list[list[float]] = [[] for _ in range(processes)]
                torch.distributed.all_gather_object(of_all, roots, group=group)
                roots = [root for one in of_all for root in one]
        loss, penalty, above, units = totals.tolist()
        is_known = self._scale is not None and self._bound is not None
        if is_known:
            self._follow(above, units)
        else:
            self._find(loss / processes, penalty / processes, roots)

    def _find(self, loss: float, penalty: float, roots: list[float]) -> None:
        """Scale and bound at the start."""
        self._tries += 1
        if self._loss is None and 0 < loss < math.inf:
            self._loss = loss
        if self.constraint is None:
            if 0 < penalty < math.inf and 0 < loss < math.inf:
                self._scale = loss / penalty
            self._give_up(
                "weight", f"loss {loss:.4g} and penalty {penalty:.4g}", "lower gamma, or give a number"
            )
            return
        if self._bound is None:
            self._roots += roots
            count = len(self._roots)
            if count >= self.constraint.window:
                # the smallest number that the quantile of them does not exceed
                quantile = sorted(self._roots)[math.ceil(self.constraint.quantile * count) - 1]
                self._bound = quantile if 0 < quantile < math.inf else None
                self._roots = []
            seen = f"{count} units of {self.constraint.window}, the largest root of q {max(roots, default=0.0):.4g}"
            self._give_up("gamma", seen, "set window lower or within higher, or give a number")
        if self._bound is not None and self._scale is None:
            if self._loss is not None:
                gamma = self._bound * value_at(_schedule(self.config.gamma), self.step, "gamma")
                self._scale = self._loss / gamma if gamma > 0 else None
            self._give_up("weight", f"loss {loss:.4g}", "give a number")

    def _give_up(self, name: str, seen: str, remedy: str) -> None:
        value, measured = getattr(self.config, name), self._scale if name == "weight" else self._bound
        if measured is None and isinstance(value, Share) and self._tries >= value.within:
            raise ValueError(
                f"{name}={value} must find a positive number in {value.within} steps with a penalty, got {seen}: "
                f"{remedy}."
            )

    def _follow(self, above: float, units: float) -> None:
        """Dual ascent on the log of λ."""
        constraint = self.constraint
        assert constraint is not None
        self._window.append((above, units))
        while sum(n for _, n in self._window[1:]) >= constraint.window:
            del self._window[0]
        if sum(n for _, n in self._window) < constraint.window:
            return
        error = (self.violation - constraint.allowed) / constraint.allowed
        end = math.log(constraint.span)
        self._log = max(-end, min(end, self._log + constraint.rate * min(error, 1.0)))
        if self._log == end and error > 0 and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"the constraint is not met at step {self.step + 1}: {self.violation:.1%} of the units are above gamma "
                f"where {constraint.allowed:.1%} may be, and λ is at the upper end of its span; the training goes on: "
                "give a larger gamma or span, or more steps.",
                RuntimeWarning,
                stacklevel=2,
            )

    @property
    def violation(self) -> float:
        """Share of the units of the window above γ; NaN before there is one."""
        units = math.fsum(n for _, n in self._window)
        return math.fsum(above for above, _ in self._window) / units if units else math.nan

    @property
    def facts(self) -> dict[str, float]:
        """Of a constraint: λ, the share of violations, and whether λ is above its floor; nothing of a Penalty."""
        if self.constraint is None or not self._window:
            return {}
        weight, _ = self.at(self.step)
        is_binding = self._log > -math.log(self.constraint.span)
        return {"multiplier": weight or 0.0, "violation": self.violation, "binding": float(is_binding)}

    def state_dict(self) -> dict[str, Any]:
        """Numbers and lists, for a checkpoint; settle before."""
        return {
            "scale": self._scale if isinstance(self.config.weight, Share) else None,
            "bound": self._bound if isinstance(self.config.gamma, Share) else None,
            "log": self._log,
            "window": [list(pair) for pair in self._window],
            "loss": self._loss,
            "roots": self._roots,
            "tries": self._tries,
            "step": self.step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was; of a configuration that changed, with what it still uses."""
        if isinstance(self.config.weight, Share):
            self._scale = state["scale"]
        if isinstance(self.config.gamma, Share):
            self._bound = state["bound"]
        self._log, self._loss, self._tries = state["log"], state["loss"], state["tries"]
        self._window = [(above, units) for above, units in state["window"]]
        self._roots, self.step = list(state["roots"]), state["step"]
        self.discard()


def _schedule(value: Any) -> Schedule:
    schedule: Schedule = value.share if isinstance(value, Share) else value
    return schedule
