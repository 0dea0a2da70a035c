"""λ and γ of a penalty in the course of a training: read from schedules, found at the start, or moved."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .config import Penalty
from .constraint import AUTO, Constraint, gamma_for_step
from .schedules import Schedule, Share, value_at

__all__ = ["Multiplier"]


class Multiplier:
    """λ and γ of a penalty in the course of a training: read from schedules, found at the start, or moved.

    The micro-batches of a step :meth:`add` what they measured, and those of held-out rows are for :meth:`follow`;
    :meth:`settle` takes it in, once per step. All processes settle with the same sums, so that they have the same λ.

    Args:
        config: of a :class:`Penalty` a :class:`Share` is found; of a :class:`Constraint` λ moves, too.
    """

    def __init__(self, config: Penalty) -> None:
        self.config = config
        self.constraint = config if isinstance(config, Constraint) else None
        self.step = 0  # of what was added last
        self._step_size = self.constraint.step_size if self.constraint is not None else None
        self._gamma: Schedule | Share | None = config.gamma if config.gamma != "auto" else AUTO  # type: ignore[assignment]
        # λ is its schedule times scale and exp(log), γ its schedule times bound
        self._scale = None if isinstance(config.weight, Share) else 1.0
        self._bound = None if isinstance(self._gamma, Share) else 1.0
        self._log = 0.0
        self._window: list[tuple[float, float]] = []  # units above γ and units, of the last steps
        self._curvatures: list[list[tuple[float, float]]] = []  # C and L_out of the rows of the same steps
        self._loss: float | None = None
        self._roots: list[float] = []
        self._tries = 0
        self._has_followed = self._is_infeasible = False
        self._reference: float | None = None  # γ of the step size without C
        self._warned: set[str] = set()
        self.discard()

    def at(self, step: int) -> tuple[float | None, float | None]:
        """λ and γ at a step. λ is None where it is to be found; γ too, or where there is none.

        Raises:
            ValueError: γ of a constraint is 0, and not because its step is infeasible.
        """
        gamma = None
        if self._gamma is not None and self._bound is not None:
            gamma = self._bound * (
                1.0 if self._step_size else value_at(_schedule(self._gamma), step, "gamma")
            )
            if self.constraint is not None and not gamma > 0 and not self._is_infeasible:
                raise ValueError(
                    f"gamma of a Constraint must be > 0 at every step, got {gamma} at step {step}."
                )
        if self._scale is None or self._bound is None:
            return None, gamma
        weight = value_at(_schedule(self.config.weight), step, "weight")
        return self._scale * weight * math.exp(self._log), gamma

    @property
    def has_measurements(self) -> bool:
        """Whether something was added since it settled."""
        return bool(self._sums)

    def add(self, step: int, loss: Tensor, penalty: Tensor, units: Tensor, gamma: float | None) -> None:
        """Take note of a micro-batch that is learnt; nothing waits for the device once γ is known.

        Args:
            step: of the training.
            loss: its share of the loss of the step, times the number of processes that have shares in it.
            penalty: its share of the penalty, likewise.
            units: q of every unit, NaN where not included; may be empty. Not read where λ follows something else.
            gamma: the threshold on √q at this step, None while it is to be found.
        """
        if self.constraint is None and self._scale is not None:
            return
        if self.constraint is not None and (self.constraint.follow != "training" or self._step_size):
            units = units.new_empty(0)
        self._add(step, loss, penalty, units, gamma)

    def follow(self, step: int, units: Tensor, gamma: float | None) -> None:
        """Take note of a micro-batch of held-out rows, for ``Constraint(follow="validation")``.

        Args:
            step: as for :meth:`add`.
            units: as for :meth:`add`.
            gamma: as for :meth:`add`.
        """
        zero = torch.zeros((), dtype=torch.float64, device=units.device)
        self._has_followed = True
        self._add(step, zero, zero, units, gamma)

    def follow_smoothness(
        self, step: int, smoothness: Tensor, second_order: Tensor, output_bound: float | Tensor
    ) -> None:
        """Take note of the smoothness along realised steps, for ``Constraint(gamma="auto", step_size=)``.

        Args:
            step: of the training.
            smoothness: L_eff of every row at every step of its ascent, any shape; NaN where the row did not move.
            second_order: C, the same shape: both are fields of a :class:`~aajr_kernels.StabilityReport`.
            output_bound: the factor of γ² in L_eff: L_out for directions of norm 1 over a row, a number or a tensor
                that broadcasts.
        """
        bounds = torch.as_tensor(output_bound, device=smoothness.device).expand_as(smoothness)
        rows = torch.stack([smoothness.double(), second_order.double(), bounds.double()], -1).flatten(0, -2)
        self.step, self._has_followed = step, True
        self._rows.append(rows[~rows.isnan().any(-1)].detach())

    def _add(self, step: int, loss: Tensor, penalty: Tensor, units: Tensor, gamma: float | None) -> None:
        self.step = step
        is_included = ~units.isnan()
        above = units > (gamma or 0.0) ** 2
        numbers = (loss, penalty, above.sum(), is_included.sum())
        self._sums.append(torch.stack([number.detach().to(units.device).double() for number in numbers]))
        if self.constraint is not None and self._bound is None:
            self._units.append(units[is_included])

    def discard(self) -> None:
        """Forget what was added, of a step that was not taken."""
        self._sums: list[Tensor] = []
        self._units: list[Tensor] = []
        self._rows: list[Tensor] = []

    def settle(self, group: Any = None) -> None:
        """Find λ and γ, or move them, from what was added since the last time.

        Args:
            group: of processes that all call this.

        Raises:
            ValueError: a Share is not found in the steps that it gives; nothing was measured of what λ follows.
        """
        if not self._sums:
            return
        totals = torch.stack(self._sums).sum(0)
        roots = torch.cat(self._units).double().sqrt().tolist() if self._units else []
        rows = torch.cat(self._rows).tolist() if self._rows else []
        self.discard()
        processes = 1
        if group is not None:
            processes = group.size()
            torch.distributed.all_reduce(totals, group=group)
            if self._bound is None or self._step_size:
                roots, rows = _gathered((roots, rows), group)
        loss, penalty, above, units = totals.tolist()
        constraint = self.constraint
        if constraint is not None and (constraint.follow != "training" or self._step_size):
            self._check_followed(constraint)
        if self._step_size:
            above, units = sum(one > 1 / self._step_size for one, _, _ in rows), len(rows)
        is_known = self._scale is not None and self._bound is not None
        if units and (is_known or self._step_size):
            self._remember(above, units, [(second, bound) for _, second, bound in rows])
        if not is_known:
            self._find(loss / processes, penalty / processes, roots)
        elif units:
            self._move()

    def _check_followed(self, constraint: Constraint) -> None:
        if not self._has_followed:
            remedy = (
                "call Objective.measure(batch, step=step) with a held-out batch, or give validation= to fit"
                if constraint.follow != "training"
                else "call Multiplier.follow_smoothness before it settles"
            )
            raise ValueError(
                f"a Constraint with follow={constraint.follow!r} and step_size={constraint.step_size} must measure "
                f"what λ follows, got nothing until step {self.step}: {remedy}."
            )

    def _remember(self, above: float, units: float, curvatures: list[tuple[float, float]]) -> None:
        """The units of a step in the window; with a step size, γ from their curvature once it is full."""
        assert self.constraint is not None
        self._window.append((above, units))
        self._curvatures.append(curvatures)
        while sum(n for _, n in self._window[1:]) >= self.constraint.window:
            del self._window[0], self._curvatures[0]
        if self._step_size is None or not self._is_full:
            return
        mean = math.fsum(bound for step in self._curvatures for _, bound in step) / self._count
        gamma = gamma_for_step(self._step_size, max(self.second_order, 0.0), mean)
        self._bound, self._is_infeasible = gamma or 0.0, not gamma
        self._reference = gamma_for_step(self._step_size, 0.0, mean)
        if self._is_infeasible:
            self._warn(
                "infeasible",
                f"the constraint is infeasible at step {self.step + 1}: the second-order term C, "
                f"{self.second_order:.4g} at the {self.constraint.quantile:.0%} quantile, leaves nothing of "
                f"1/step_size = {1 / self._step_size:.4g}, whatever gamma is; the training goes on with gamma 0: give "
                "a smaller step_size.",
            )

    @property
    def _count(self) -> float:
        return math.fsum(n for _, n in self._window)

    @property
    def _is_full(self) -> bool:
        return self.constraint is not None and self._count >= self.constraint.window

    def _find(self, loss: float, penalty: float, roots: list[float]) -> None:
        """Scale and bound at the start."""
        self._tries += self._bound is not None or self._step_size is None
        if self._loss is None and 0 < loss < math.inf:
            self._loss = loss
        if self.constraint is None:
            if 0 < penalty < math.inf and 0 < loss < math.inf:
                self._scale = loss / penalty
            seen = f"loss {loss:.4g} and penalty {penalty:.4g}"
            self._give_up("weight", self.config.weight, self._scale, seen, "lower gamma, or give a number")
            return
        if self._bound is None and self._step_size is None:
            self._roots += roots
            count = len(self._roots)
            if count >= self.constraint.window:
                quantile = _quantile(self._roots, self.constraint.quantile)
                self._bound = quantile if 0 < quantile < math.inf else None
                self._roots = []
            seen = f"{count} units of {self.constraint.window}, the largest root of q {max(roots, default=0.0):.4g}"
            remedy = "set window lower or within higher, or give a number"
            self._give_up("gamma", self._gamma, self._bound, seen, remedy)
        if self._bound is not None and self._scale is None:
            if self._loss is not None:
                gamma = self._reference if self._step_size else self.at(self.step)[1]
                self._scale = self._loss / gamma if gamma else None
            self._give_up("weight", self.config.weight, self._scale, f"loss {loss:.4g}", "give a number")

    def _give_up(self, name: str, share: Any, measured: float | None, seen: str, remedy: str) -> None:
        if measured is None and isinstance(share, Share) and self._tries >= share.within:
            raise ValueError(
                f"{name}={share} must find a positive number in {share.within} steps with a penalty, got {seen}: "
                f"{remedy}."
            )

    def _move(self) -> None:
        """Dual ascent on the log of λ."""
        constraint = self.constraint
        assert constraint is not None
        if not self._is_full:
            return
        error = (self.violation - constraint.allowed) / constraint.allowed
        end = math.log(constraint.span)
        self._log = max(-end, min(end, self._log + constraint.rate * min(error, 1.0)))
        if self._log == end and error > 0:
            what = "units are above gamma" if self._step_size is None else "steps are above 1/step_size"
            remedy = "gamma" if self._step_size is None else "1/step_size"
            self._warn(
                "not met",
                f"the constraint is not met at step {self.step + 1}: {self.violation:.1%} of the {what} where "
                f"{constraint.allowed:.1%} may be, and λ is at the upper end of its span; the training goes on: give a "
                f"larger {remedy} or span, or more steps.",
            )

    def _warn(self, kind: str, sentence: str) -> None:
        """Once for every kind."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(sentence, RuntimeWarning, stacklevel=2)

    @property
    def violation(self) -> float:
        """Share of the units of the window above γ, or of the steps above 1/η; NaN before there is one."""
        return math.fsum(above for above, _ in self._window) / self._count if self._count else math.nan

    @property
    def second_order(self) -> float:
        """C of the window, at the constraint's quantile; NaN where it is not measured."""
        seconds = [second for step in self._curvatures for second, _ in step]
        if self.constraint is None or not seconds:
            return math.nan
        return _quantile(seconds, self.constraint.quantile)

    @property
    def facts(self) -> dict[str, float]:
        """Of a constraint: λ, the share of violations, and whether λ is above its floor; nothing of a Penalty.

        With a step size C, too, and whether it is infeasible: whether C leaves nothing of 1/η.
        """
        if self.constraint is None or not self._window:
            return {}
        weight, _ = self.at(self.step)
        is_binding = self._log > -math.log(self.constraint.span)
        facts = {"multiplier": weight or 0.0, "violation": self.violation, "binding": float(is_binding)}
        if self._step_size is not None:
            facts |= {"second_order": self.second_order, "infeasible": float(self._is_infeasible)}
        return facts

    @property
    def is_kept(self) -> bool:
        """Whether λ or γ is found or moved in training, so that it depends on more than the step."""
        return self.constraint is not None or any(
            isinstance(v, Share) for v in (self.config.weight, self._gamma)
        )

    def state_dict(self) -> dict[str, Any]:
        """Numbers and lists, for a checkpoint; settle before."""
        return {
            "scale": self._scale if isinstance(self.config.weight, Share) else None,
            "bound": self._bound if isinstance(self._gamma, Share) else None,
            "log": self._log,
            "window": [list(pair) for pair in self._window],
            "curvatures": [[list(pair) for pair in step] for step in self._curvatures],
            "infeasible": self._is_infeasible,
            "loss": self._loss,
            "roots": self._roots,
            "tries": self._tries,
            "step": self.step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was; of a configuration that changed, with what it still uses."""
        if isinstance(self.config.weight, Share):
            self._scale = state["scale"]
        if isinstance(self._gamma, Share):
            self._bound = state["bound"]
        self._log, self._loss, self._tries = state["log"], state["loss"], state["tries"]
        self._window = [(above, units) for above, units in state["window"]]
        # not in checkpoints of earlier versions
        steps = state.get("curvatures") or [[] for _ in self._window]
        self._curvatures = [[(second, bound) for second, bound in step] for step in steps]
        self._is_infeasible = state.get("infeasible", False)
        self._roots, self.step = list(state["roots"]), state["step"]
        self.discard()


def _schedule(value: Any) -> Schedule:
    schedule: Schedule = value.share if isinstance(value, Share) else value
    return schedule


def _quantile(values: list[float], share: float) -> float:
    """The smallest number that a share of the values does not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def _gathered(lists: tuple[list[Any], ...], group: Any) -> tuple[list[Any], ...]:
    """The lists of all processes one after the other; all of them call this."""
    of_all: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(of_all, lists, group=group)
    return tuple([entry for own in of_all for entry in own[i]] for i in range(len(lists)))
