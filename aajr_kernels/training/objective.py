"""Contribution of one micro-batch to the objective of a step.

    c · L(x) + a · L(x + δ*) + λ · P + w · KL(reference ‖ policy at x)

with δ* where the ascent found the largest loss of every row, and P the penalty along the ascent. L and P are sums over
the micro-batch divided by the counts of the whole step: gradients then add up to those of one large batch. P may be
computed on every k-th step, with k times its weight, and on rows drawn at random, whose sum is divided by their share.
The second loss may be a KL from the output at x or from that of a reference; the last one is an anchor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..method.ascent import NonFiniteLoss, ascend
from ..method.baselines import NEEDS_LOSS, trajectory_baseline
from ..method.batch import Prepared
from ..method.losses import IGNORED
from ..method.places import Opened
from ..method.policy import Policy
from ..method.scopes import widened
from ..method.sharing import Shared
from ..method.trajectory import PenaltyStatistics, Trajectory, gathered, trajectory_penalty
from .config import ObjectiveConfig
from .counts import Counts, units_of
from .losses import (
    adversary_of,
    can_share,
    clean_losses,
    clean_output,
    divergence,
    is_cross_entropy,
    keeps_clean,
    loss_under_attack,
)
from .opened import groups_in, opened_of
from .scheduled import ScheduledValues
from .sharing import Sharing
from .wrappers import entered, group_of, smallest

__all__ = ["Terms", "Work", "terms_of"]

#: penalties that differentiate while they look for a direction
SEARCHES = ("spectral", *NEEDS_LOSS)

#: called with a trajectory, the rows that were attacked, and γ in the embedding's own unit
AfterAttack = Callable[[Trajectory, "Work", float | None], None]


@dataclass(frozen=True)
class Terms:
    """Of one micro-batch.

    Attributes:
        total: attached; what is differentiated on this process.
        parts: detached shares of the step's clean loss, adversarial loss, anchor and penalty (without their weights),
            numbers on the attack, and from :func:`terms_of` ``units``, q of every unit.
        penalty: the part λ · penalty of `total`, attached; None without one, and under DistributedDataParallel.
    """

    total: Tensor
    parts: dict[str, Tensor]
    penalty: Tensor | None = None


def terms_of(
    model: nn.Module,
    policy: Policy,
    batch: Prepared,
    config: ObjectiveConfig,
    scheduled: ScheduledValues,
    counts: Counts,
    generator: torch.Generator,
    after_attack: AfterAttack | None = None,
    row_weights: Tensor | None = None,
    sharing: Sharing | None = None,
) -> Terms:
    """Forward passes of one micro-batch; call it under autocast, and backward on the total outside.

    `after_attack` is called in the random state of the attack. `row_weights` ``[B]`` multiply the losses, those that
    are maximised and those that are minimised. `sharing` decides whether the batch's context is computed once. Where
    `model` is fully sharded all its processes call this.
    """
    x = entered(model)(batch.embedded)(policy)
    unit = _unit(x, batch, config)
    total = torch.zeros((), device=x.device)
    parts: dict[str, Tensor] = {}
    is_shareable = (
        config.penalty.method in ("none", "aligned") and config.penalty.rows == 1 and can_share(config)
    )
    shared = None
    if sharing and is_shareable and scheduled.attacks:
        shared = sharing.of(policy, batch, x, entered(model, policy.head), group_of(model))
    if shared is not None:
        rows, length = batch.labels.shape
        parts["shared"] = x.new_tensor(
            (1 - shared.x.shape[1] / length) * rows / counts.rows, dtype=torch.float64
        )
        of_context = units_of(batch, config) - units_of(shared.batch, config)
        policy, batch, x = shared.policy, shared.batch, shared.x
    opened = opened_of(policy, batch, x, config.attack, group_of(model)) if scheduled.attacks else None
    if opened is not None:
        policy, x, unit = replace(policy, forward=opened, places=None), opened.x, _one()
    whole = Work(model, policy, batch, config, counts, generator, row_weights, x, unit, shared, opened)
    penalty: Tensor | None = None
    if scheduled.attacks:
        total, penalty, under_attack = _under_attack(whole, scheduled, after_attack)
        parts |= under_attack
    if shared is not None and "units" in parts:  # q is 0 in the context
        parts["units"] = nn.functional.pad(parts["units"], (0, of_context))
    if scheduled.clean > 0:
        clean = whole.loss(x)
        parts["clean_loss"] = clean.detach()
        total = total + scheduled.clean * clean
    if scheduled.anchor > 0:
        anchor = divergence(whole, config.anchor, x)
        parts["anchor"] = anchor.detach()
        total = total + scheduled.anchor * anchor
    if penalty is not None:
        total = total + penalty
    if counts.processes > 1:  # gradients are averaged over them
        total, penalty = total * counts.processes, None if penalty is None else penalty * counts.processes
    return Terms(total, parts, penalty)


def _under_attack(
    whole: Work, scheduled: ScheduledValues, after_attack: AfterAttack | None
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Adversarial loss and penalty with their weights, and the parts."""
    counts, total = whole.counts, torch.zeros((), device=whole.x.device)
    drawn, share = whole.drawn(scheduled)
    penalised = whole.of_rows(drawn)
    # without an adversarial loss only the rows that the penalty looks at are attacked
    is_narrow = scheduled.adversarial == 0 and penalised.is_attackable()
    attacked = penalised if is_narrow else whole
    if not len(attacked.x):
        return total, None, {"penalty": total}
    trajectory = attacked.attack(scheduled.radius)
    rows = counts.rows * (share if is_narrow else 1.0)
    parts = {
        "attack_start": trajectory.losses[0].sum() / rows,
        "attack_worst": trajectory.worst_loss.sum() / rows,
    }
    if after_attack is not None:
        gamma = None if scheduled.gamma is None else scheduled.gamma / whole.unit_value
        after_attack(trajectory, attacked, gamma)
    loss = weighted = None
    if scheduled.measures:
        along = trajectory if is_narrow or drawn is None else trajectory.of_rows(drawn)
        penalty, loss, more = penalised.penalty(along, scheduled, share)
        parts |= {"penalty": penalty.detach(), **more}
        weighted = scheduled.weight * penalty
    if scheduled.adversarial > 0:
        if loss is None:
            loss = loss_under_attack(whole, trajectory.worst)
        elif drawn is not None:  # the forward of the penalty had the rows drawn
            others = _others(drawn, len(whole.x))
            loss = loss + whole.of_rows(others).loss(trajectory.of_rows(others).worst)
        parts["adversarial_loss"] = loss.detach()
        total = total + scheduled.adversarial * loss
    return total, weighted, parts


#: penalty, the adversarial loss if it comes from the same forward, statistics
_Measured = tuple[Tensor, Tensor | None, dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Work:
    """A micro-batch under attack: what its ascent and its penalty need.

    `x` are its embedded tokens ``[B, N, C]``, `unit` that of perturbations (see :func:`_unit`), `row_weights` those of
    all losses. With `shared` all of it is a suffix, and losses are those of the whole rows. With `opened` `x` are zeros
    ``[B, P·N, C]`` in the units of its places, of which the policy is a function.
    """

    model: nn.Module
    policy: Policy
    batch: Prepared
    config: ObjectiveConfig
    counts: Counts
    generator: torch.Generator
    row_weights: Tensor | None
    x: Tensor
    unit: Tensor
    shared: Shared | None = None
    opened: Opened | None = None

    @property
    def group(self) -> Any:
        """The processes that gather parameters together, and call the model equally often; or None."""
        return group_of(self.model)

    def enter(self, func: Any) -> Any:
        """The function with the parameters of a sharded model gathered."""
        return entered(self.model, self.policy.head)(func)

    @functools.cached_property
    def unit_value(self) -> float:
        """Read once."""
        return float(self.unit.detach())

    def drawn(self, scheduled: ScheduledValues) -> tuple[Tensor | None, float]:
        """Indices of the rows that the penalty is computed on, None for all, and the expectation of their share.

        At least one where nothing else would be differentiated, and where other processes wait for this one.
        """
        count, share = len(self.x), self.config.penalty.rows
        if share == 1 or not scheduled.measures:
            return None, 1.0
        has_least = self.group is not None or not scheduled.has_loss
        expected = max(share * count, 1.0) if has_least else share * count
        options: dict[str, Any] = dict(generator=self.generator, device=self.generator.device)
        number = int(expected + float(torch.rand((), dtype=torch.float64, **options)))
        rows = torch.randperm(count, **options)[:number].sort().values.to(self.x.device)
        return (rows if number < count else None), expected / count

    def of_rows(self, rows: Tensor | None) -> Work:
        """The same of some rows; None for all."""
        if rows is None:
            return self
        weights = None if self.row_weights is None else self.row_weights[rows]
        part = replace(self, batch=self.batch.of_rows(rows), row_weights=weights, x=self.x[rows])
        if self.opened is None:
            return part
        opened = self.opened.of_rows(rows)
        return replace(part, opened=opened, policy=replace(self.policy, forward=opened))

    def is_attackable(self) -> bool:
        """Whether an ascent finds something to move; with no row there is none to be missed."""
        return not len(self.x) or bool(self.batch.masks[2].any())

    @property
    def adversary(self) -> Callable[[Any], Any]:
        """The losses ``[B]`` that are maximised, a function of points like `x`."""
        if not is_cross_entropy(self.config.attack.loss):
            return adversary_of(self)
        shared, weights = self.shared, self.row_weights
        kind = "mean" if shared is None else "sum"
        losses = suffix = self.enter(self.policy.loss_fn(self.batch.inputs, self.batch.labels, kind))
        if shared is not None:
            fixed, counts = shared.losses.detach(), shared.counts
            losses = lambda x: (suffix(x) + fixed) / counts
        return losses if weights is None else lambda x: losses(x) * weights

    @property
    def token_weights(self) -> Tensor:
        """The size of the weight of one token's cross-entropy in the losses that are maximised, ``[B]``."""
        learnt = (self.batch.labels != IGNORED).sum(-1).clamp(min=1)
        weights = 1.0 / widened((learnt if self.shared is None else self.shared.counts).to(self.x.dtype))
        return weights if self.row_weights is None else weights * self.row_weights.abs()

    def step_share(self, losses: Tensor) -> Tensor:
        """Sums of losses over these tokens, with those of a shared context, in the mean over the step's tokens.

        Args:
            losses: ``[B]``, or their sum where rows have no weights.
        """
        if self.shared is not None:
            losses = losses + (self.shared.losses if losses.dim() else self.shared.losses.sum())
        if self.row_weights is not None:
            losses = losses * self.row_weights.to(losses)
        return losses.sum() / self.counts.tokens

    def loss(self, point: Tensor) -> Tensor:
        """Share of these rows in the step's mean cross-entropy at `point`, times their weights; gradients reach x."""
        if point is self.x and keeps_clean(self.config):
            return self.step_share(clean_losses(self))
        if point is not self.x:
            point = point + (self.x - self.x.detach())
        losses = self.enter(self.policy.loss_fn(self.batch.inputs, self.batch.labels, "sum"))(point)
        return self.step_share(losses)

    #: the output at the clean input, attached, for several losses
    clean = functools.cached_property(clean_output)

    @property
    def groups(self) -> dict[str, Any]:
        """Mask and agents of an ascent."""
        if self.opened is not None:
            return groups_in(self.opened, self.batch, self.config)
        return {"mask": self.batch.attackable, "agents": self.batch.agents}

    def attack(self, radius: float) -> Trajectory:
        attack, x, unit = self.config.attack, self.x, self.unit_value
        if not smallest([math.isfinite(unit)], self.group, x.device)[0]:
            raise NonFiniteLoss(
                f"the norm of the embedded tokens is {unit}: check the embedding and the batch."
            )
        if attack.norm == "linf" and attack.relative:
            unit /= x.shape[-1] ** 0.5
        step_size = attack.step_size if isinstance(attack.step_size, str) else attack.step_size * unit
        return ascend(
            self.adversary,
            x.detach(),
            radius=radius * unit,
            step_size=step_size,
            generator=self.generator,
            module=self.model,
            scope=self.config.scope,
            **self.groups,
            **_entries(attack, "steps", "step", "norm", "init", "restarts", "eval_mode"),
        )

    def penalty(self, trajectory: Trajectory, scheduled: ScheduledValues, share: float) -> _Measured:
        """The penalty in the unit of perturbations, as an estimate of that of all rows where these are a `share`."""
        if not len(self.x):
            return torch.zeros((), device=self.x.device), None, {}
        config = self.config.penalty
        # a slope of the output in units of c is c times as large; CURE differentiates twice
        order = 2 if config.method == "cure" else 1
        slope, value = self.unit**order, self.unit_value**order
        power = 1 if config.form == "hinge" else 2
        threshold = None if scheduled.gamma is None else scheduled.gamma / value
        here = replace(scheduled, weight=scheduled.weight * value**power / share, gamma=threshold)
        measure = self.aligned if config.method == "aligned" else self.baseline
        penalty, loss, more = measure(trajectory, here)
        square = slope.detach() ** 2
        changed = {
            "active": lambda v: v / share,
            "q_max": lambda v: v * square,
            "units": lambda v: v * square,
        }
        return (
            penalty * (slope**power / share),
            loss,
            {name: changed[name](value) for name, value in more.items()},
        )

    def aligned(self, trajectory: Trajectory, scheduled: ScheduledValues) -> _Measured:
        config, policy, batch, counts = self.config.penalty, self.policy, self.batch, self.counts
        options = self.options(scheduled)
        learnt = int(batch.masks[0].sum())
        # what the head divides the cross-entropy by, of which a mean over the step's tokens is wanted
        divisor = counts.units if self.config.unit == "token" else max(learnt, 1)
        rescale = divisor / counts.tokens
        # the forward of rows drawn is one more where others are left, which may differ among processes; the head adds
        # rows up before they can have weights
        is_whole = (self.group is None or config.rows == 1) and self.row_weights is None
        is_minimised = scheduled.adversarial > 0 and is_cross_entropy(self.config.adversarial_loss)
        share = config.steps == "worst" and is_minimised and is_whole
        if share:
            options["return_primal"] = True
            if policy.head is not None:
                options["labels"] = batch.labels
                options["penalty_weight"] = scheduled.weight / (scheduled.adversarial * rescale)
        several = config.batch_steps > 1
        forward = policy.forward if several else functools.partial(policy.forward, **batch.inputs)

        def measured() -> tuple[Tensor, Any, PenaltyStatistics]:
            penalty, aux = trajectory_penalty(
                forward,
                self.x,
                trajectory,
                inputs=batch.inputs if several else None,
                generator=self.generator,
                head=policy.described_head(),
                **_entries(config, "steps", "weights", "direction", "at", "per_agent", "batch_steps"),
                **options,
            )
            return penalty, aux.primal, aux

        penalty, primal, aux = self.enter(measured)()
        loss = None
        if share and policy.head is not None:
            loss = self.step_share(primal * divisor)
        elif share:
            loss = self.step_share(policy.token_losses(primal, batch.labels).sum(-1))
        weight = aux.weights.to(aux.q) @ aux.active.mean(-1)
        active = weight * units_of(batch, self.config) / counts.units
        return penalty, loss, {"active": active, "q_max": aux.q_max.max(), "units": aux.units}

    def baseline(self, trajectory: Trajectory, scheduled: ScheduledValues) -> _Measured:
        config, batch, x = self.config.penalty, self.batch, self.x
        steps = config.steps
        if steps == "worst":
            trajectory, steps = _at_the_worst(trajectory), "last"
        if x.requires_grad:  # gradients reach the clean input as they do for the aligned penalty
            trajectory = replace(trajectory, points=trajectory.points + (x - x.detach()))
        # a search for directions has backwards of its own, which free gathered parameters: its calls enter one by one
        searches = self.group is not None and config.method in SEARCHES
        formed = searches and config.metric != "l2"
        forward = functools.partial(self.policy.logits if formed else self.policy.forward, **batch.inputs)

        def measured() -> tuple[Tensor, dict[str, Any]]:
            return trajectory_baseline(
                config.method,
                self.enter(forward) if searches else forward,
                trajectory,
                steps=steps,
                generator=self.generator,
                loss_fn=self.adversary if config.method in NEEDS_LOSS else None,
                h=config.h * self.unit_value,
                module=self.model,
                head=None if searches else self.policy.described_head(),
                **_entries(config, "weights", "samples", "iterations"),
                **self.options(scheduled),
            )

        penalty, aux = (measured if searches else self.enter(measured))()
        return penalty, None, {"units": aux["units"]}

    def options(self, scheduled: ScheduledValues) -> dict[str, Any]:
        """Arguments of all penalties."""
        config, gamma = self.config.penalty, scheduled.gamma
        return dict(
            # a threshold that is to be found
            gamma=0.0 if gamma is None and config.gamma is not None else gamma,
            mask=self.batch.tokens(config.tokens),
            denominator=float(self.counts.units),
            unit=self.config.unit,
            **_entries(config, "metric", "form"),
        )


def _entries(config: Any, *names: str) -> dict[str, Any]:
    """Entries of a configuration that are arguments of the same names."""
    return {name: getattr(config, name) for name in names}


def _others(rows: Tensor, count: int) -> Tensor:
    """Indices of all other rows."""
    keep = torch.ones(count, dtype=torch.bool, device=rows.device)
    keep[rows] = False
    return keep.nonzero().squeeze(-1)


def _unit(x: Tensor, batch: Prepared, config: ObjectiveConfig) -> Tensor:
    """Unit of perturbations; attached, so that a penalty in this unit has its own gradient."""
    if not config.attack.relative:
        return _one()
    return batch.norm_of(x)


def _one() -> Tensor:
    return torch.ones((), dtype=torch.float64)


def _at_the_worst(trajectory: Trajectory) -> Trajectory:
    """One step: every row at its worst point, with the direction that led there."""
    directions = gathered(trajectory.directions, trajectory.worst_steps.unsqueeze(0))
    worst = trajectory.worst
    return replace(trajectory, points=torch.stack([worst, worst]), directions=directions)
