"""The objective as the loss of a micro-batch, for a loop that is not :func:`fit`'s.

    objective = Objective(model, ObjectiveConfig(attack=..., penalty=...))
    for step in range(steps):
        batches = [next(data) for _ in range(accumulate)]
        counts = objective.counts(batches)
        for part, batch in enumerate(batches):
            objective(batch, counts=counts, step=step, part=part).total.backward()
        optimizer.step()
        optimizer.zero_grad()

With ``Constraint(follow="validation")`` every step also calls ``objective.measure(held_out, step=step)``. Under
DistributedDataParallel and ``fully_shard`` all processes do the same, each with its own batches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..autocast import autocasting
from ..method.attack_state import frozen_parameters, one_dropout_mask
from ..method.batch import Prepared, prepared
from ..method.losses import IGNORED
from ..method.policy import Policy
from ..method.report import StabilityReport
from ..method.stability import OUTPUT_BOUNDS, stability_report
from ..method.trajectory import Trajectory
from ..method.wrapped import inside
from . import randomness
from .config import Diagnostics, ObjectiveConfig
from .counts import Counts
from .losses import check_policy
from .multiplier import Multiplier
from .objective import AfterAttack, Terms, Work, terms_of
from .opened import with_places
from .policy import policy_of
from .scheduled import ScheduledValues
from .sharing import Sharing
from .wrappers import group_of, reshard, smallest, unwrapped

__all__ = ["Objective"]

OnReport = Callable[[StabilityReport], None]


def _discarded(report: StabilityReport) -> None:
    """A report that another process has, too."""


class Objective:
    """The objective of :func:`fit`, micro-batch by micro-batch.

        clean_weight · L(x)  +  adversarial_weight · L(x + δ*)  +  λ · P

    where the second loss may be another one, and an anchor may be added; see :class:`ObjectiveConfig`.

    Args:
        model: a causal language model of Hugging Face, with adapters or not, or any module that takes
            ``inputs_embeds`` and returns logits; plain, in DistributedDataParallel or after ``fully_shard``, on its
            device.
        config: attack, penalty, weights.
        policy: how to call the model (the module inside the wrapper), where :func:`policy_of` does not know.

    Attributes:
        module: the model without its wrapper.
        sharing: of contexts; its ``reason`` says why one was not shared.
        multiplier: λ and γ, which a :class:`Share` and a :class:`Constraint` find and move.

    Raises:
        TypeError: `model` is in a wrapper that is not understood, or cannot be called by itself; `config` is none.
        ValueError: the policy lacks a reference that a loss compares it with.
    """

    def __init__(self, model: nn.Module, config: ObjectiveConfig, *, policy: Policy | None = None) -> None:
        if not isinstance(config, ObjectiveConfig):
            raise TypeError(f"config must be an ObjectiveConfig, got {type(config).__name__}.")
        self.model, self.module = model, unwrapped(model)
        self.config = config
        policy = policy_of(self.module) if policy is None else policy
        check_policy(config, policy)
        self.policy = with_places(policy, self.module, config.attack)
        self.sharing = Sharing(config)
        self.multiplier = Multiplier(config.penalty)

    @property
    def device(self) -> torch.device:
        """Of the model's parameters."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    @property
    def group(self) -> Any:
        """The process group whose gradients are averaged, or None."""
        return group_of(self.model)

    def prepared(self, batch: Any) -> Prepared:
        """A checked micro-batch on the device, with its labels aligned; see :func:`~aajr_kernels.training.prepared`."""
        if isinstance(batch, Prepared):
            return batch
        return prepared(batch, self.device, self.config.shift_labels)

    def counts(self, batches: Sequence[Any], *, across: bool = True) -> Counts:
        """Counts that the means of a step divide by.

        Args:
            batches: all micro-batches of the step on this process.
            across: add up over the processes whose gradients are averaged, all of which call this; False: every
                process has means of its own.

        Raises:
            ValueError: there is nothing to learn in them.
        """
        ours = [self.prepared(batch) for batch in batches]
        return Counts.of(ours, self.config, self.group if across else None, self.device)

    def scheduled(self, step: int) -> ScheduledValues:
        """The numbers of a step, with λ and γ as the steps before have left them; all processes call this."""
        if self.multiplier.has_measurements and self.multiplier.step != step:
            self.multiplier.settle(self.group)
        return ScheduledValues.at(self.config, step, self.multiplier)

    def state_dict(self) -> dict[str, Any]:
        """λ, γ and what they follow, as numbers and lists; all processes call this, between two steps."""
        self.multiplier.settle(self.group)
        return {"multiplier": self.multiplier.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was."""
        self.multiplier.load_state_dict(state["multiplier"])

    def __call__(
        self,
        batch: Any,
        *,
        counts: Counts | None = None,
        row_weights: Tensor | None = None,
        step: int = 0,
        part: int = 0,
        on_report: OnReport | None = None,
    ) -> Terms:
        """The share of one micro-batch in the objective of a step; call it under autocast, backward outside.

        Args:
            batch: see :func:`~aajr_kernels.training.prepared`.
            counts: of the whole step; by default this batch is all of it (on this process).
            row_weights: ``[B]``: L and the loss that the adversary maximises are every row's cross-entropy times its
                weight, so with advantages the surrogate −A log π of a policy gradient. λ then is a number.
            step: 0, 1, ...: where the schedules are, and with `part` what the attack draws. When it changes, a
                :class:`Share` or a :class:`Constraint` takes in what the step before measured.
            part: the index of the micro-batch in the step.
            on_report: called with the :class:`StabilityReport` where ``config.diagnostics`` says that one is due.

        Returns:
            Terms: ``total.backward()`` for all micro-batches, on all processes whose gradients are averaged, adds up
            to the gradient of the objective of one large batch.

        Raises:
            TypeError, ValueError: the batch has wrong entries; nothing depends on a parameter that is trained.
            NonFiniteLoss: in the attack.
            RuntimeError: the model was prepared for mixed precision and autocast is off.
        """
        if row_weights is not None:
            self.config.penalty.check_alone()
        terms = self._terms(batch, self.scheduled(step), counts, step, part, row_weights, on_report)
        if not terms.total.requires_grad:
            raise ValueError(
                "the objective does not depend on any parameter that is trained: check the weights of the losses, that "
                "a parameter requires a gradient, and that with Penalty(every=) a loss has a weight at every step."
            )
        return terms

    def penalty(
        self,
        batch: Any,
        *,
        counts: Counts | None = None,
        row_weights: Tensor | None = None,
        step: int = 0,
        part: int = 0,
        on_report: OnReport | None = None,
    ) -> Terms:
        """Only λ · P, to be added to a loss of another kind.

        Args:
            batch: as for the objective; labels say where the policy acted.
            counts: as for the objective.
            step: as for the objective.
            part: as for the objective.
            on_report: as for the objective.
            row_weights: ``[B]``: the adversary maximises every row's cross-entropy times its weight, so with
                advantages the surrogate loss −A log π of a policy gradient. By default the cross-entropy.

        Returns:
            Terms: whose total is 0 without a gradient where λ or the radius is 0, on the steps between those of
            ``Penalty(every=)``, or where the batch has no labels, under ``fully_shard`` on one of the processes.

        Raises:
            ValueError: λ is a share of the task loss, which is not known here.
        """
        self.config.penalty.check_alone()
        scheduled = self.scheduled(step).without_losses
        batch = self.prepared(batch)
        is_labelled = bool((batch.labels != IGNORED).any())
        if counts is None and not smallest([is_labelled], group_of(self.module), self.device)[0]:
            return Terms(torch.zeros((), device=self.device), {})
        return self._terms(batch, scheduled, counts, step, part, row_weights, on_report)

    def measure(self, batch: Any, *, step: int = 0, part: int = 0) -> None:
        """Measure held-out rows, which λ of a ``Constraint(follow="validation")`` follows; under autocast as the rest.

        Their ascent and q have no graph, in eval mode. Call it once or several times in every step, before the step
        changes; under DistributedDataParallel every process measures rows of its own. Where no penalty is due, it does
        nothing.

        Args:
            batch: as for the objective, of data that is not trained on.
            step: of the training, as for the objective.
            part: the index of the micro-batch among those that are measured in the step.

        Raises:
            ValueError: λ follows something else; the batch has no labels.
            NonFiniteLoss: in the attack.
        """
        constraint = self.multiplier.constraint
        if constraint is None or constraint.follow != "validation":
            raise ValueError(
                "penalty must be a Constraint(follow='validation') for measure, got "
                f"{type(self.config.penalty).__name__}: λ follows the rows that are learnt otherwise."
            )
        scheduled = self.scheduled(step).without_losses
        if not scheduled.measures:
            return
        self._check_autocast()
        ours, group = self.prepared(batch), self.group
        config = replace(self.config, penalty=replace(constraint, rows=1.0))
        draw = part if group is None else part * group.size() + group.rank()
        generator = randomness.generator_for(self.config.seed or 0, step, -2 - draw, self.device)
        hook = functools.partial(self._follow_smoothness, step) if constraint.step_size else None
        arguments = (self.module, self.policy, ours, config, scheduled, Counts.of([ours], config), generator)
        try:
            with torch.no_grad(), frozen_parameters((self.module,), True):
                parts = terms_of(*arguments, hook, None, self.sharing).parts
        finally:
            # no backward frees them: the next forward would compute with those of before the optimizer's step
            reshard(self.module)
        if hook is None and "units" in parts:
            self.multiplier.follow(step, parts["units"], scheduled.gamma)

    def _terms(
        self,
        batch: Any,
        scheduled: ScheduledValues,
        counts: Counts | None,
        step: int,
        part: int,
        row_weights: Tensor | None = None,
        on_report: OnReport | None = None,
    ) -> Terms:
        self._check_autocast()
        ours = self.prepared(batch)
        if row_weights is not None and tuple(row_weights.shape) != tuple(ours.labels.shape[:1]):
            raise ValueError(
                f"row_weights must be one number per row, shape ({len(ours.labels)},), got {tuple(row_weights.shape)}."
            )
        if counts is None:
            counts = Counts.of([ours], self.config)
        group = self.group
        draw = part if group is None else part * group.size() + group.rank()
        generator = randomness.generator_for(self.config.seed or 0, step, draw, self.device)
        hooks: list[AfterAttack] = []
        diagnostics, constraint = self.config.diagnostics, self.multiplier.constraint
        # of the first micro-batch; processes that gather parameters for the first one compute it, too
        is_first = draw == 0 or (part == 0 and group_of(self.module) is not None)
        if on_report is not None and diagnostics and is_first and (step + 1) % diagnostics.every == 0:
            report = on_report if draw == 0 else _discarded
            hooks.append(functools.partial(self._diagnose, diagnostics, step, report))
        if scheduled.measures and constraint and constraint.step_size and constraint.follow == "training":
            hooks.append(functools.partial(self._follow_smoothness, step))
        arguments = (self.module, self.policy, ours, self.config, scheduled, counts, generator)

        def after_attack(*attacked: Any) -> None:
            for hook in hooks:
                hook(*attacked)

        def work() -> Terms:
            with one_dropout_mask(self.device):
                return terms_of(*arguments, after_attack if hooks else None, row_weights, self.sharing)

        def outputs() -> tuple[Tensor, dict[str, Tensor]]:
            terms = work()
            return terms.total, terms.parts

        if self.module is self.model or not (scheduled.measures or scheduled.has_loss):
            # nothing to be differentiated
            terms = work()
        else:
            # DistributedDataParallel wants one forward from which one backward comes: the whole objective is it.
            # Buffers are synchronised before, and unused parameters are found in the loss.
            terms = Terms(*inside(self.model, outputs)())
        units = terms.parts.pop("units", None)
        if scheduled.measures:
            self._measured(terms.parts, scheduled, counts, step, units)
        return terms

    def _measured(
        self,
        parts: Mapping[str, Tensor],
        scheduled: ScheduledValues,
        counts: Counts,
        step: int,
        units: Tensor | None,
    ) -> None:
        zero = torch.zeros((), device=self.device)
        clean = scheduled.clean * parts.get("clean_loss", zero)
        loss = clean + scheduled.adversarial * parts.get("adversarial_loss", zero)
        of_all = counts.processes
        gamma = None if self.config.penalty.gamma is None else scheduled.gamma
        self.multiplier.add(
            *(step, of_all * loss, of_all * parts.get("penalty", zero)),
            zero.expand(0) if units is None else units,
            gamma,
        )

    def _check_autocast(self) -> None:
        """accelerate puts autocast into the forward of the whole model, which is not what is called."""
        if hasattr(self.module, "_original_forward") and not autocasting(self.device.type):
            raise RuntimeError(
                "the model was prepared for mixed precision and the objective is called outside of it: call it inside "
                "`with accelerator.autocast():`."
            )

    def _diagnose(
        self,
        diagnostics: Diagnostics,
        step: int,
        on_report: OnReport,
        trajectory: Trajectory,
        attacked: Work,
        gamma: float | None,
    ) -> None:
        more: dict[str, Any] = {}
        if diagnostics.smoothness:
            more = self._policy_options(attacked)
            penalty, metric = self.config.penalty, more["metric"]
            # γ is one of √q along u in the metric of the report, where logits are formed for a head
            is_threshold = penalty.method in ("aligned", "finite_difference") and (
                metric == penalty.metric and (attacked.policy.head is None or metric != "l2")
            )
            more |= dict(gamma=gamma if is_threshold else None, power_iterations=diagnostics.power_iterations)
        with frozen_parameters((self.module,), self.config.attack.eval_mode):
            report = stability_report(
                attacked.adversary,
                trajectory.x,
                trajectory,
                curvature=diagnostics.curvature,
                samples=diagnostics.samples,
                nearby=diagnostics.nearby * trajectory.radius or None,
                generator=randomness.generator_for(self.config.seed or 0, step + 1, -1, self.device),
                module=self.module,
                **more,
            )
        on_report(report)

    def _policy_options(self, attacked: Work) -> dict[str, Any]:
        """Of a stability report on the policy's output, with the bounds of the mean loss of every row."""
        policy, batch, penalty = attacked.policy, attacked.batch, self.config.penalty
        metric = penalty.metric if penalty.metric != "probs" else "fisher"
        curvature, slope = OUTPUT_BOUNDS[metric]
        return dict(
            func=attacked.enter(functools.partial(policy.logits, **batch.inputs)),
            metric=metric,
            output_bounds=(curvature * attacked.token_weights, slope * attacked.token_weights),
            output_mask=batch.tokens("loss"),
            unit=self.config.unit,
        )

    def _follow_smoothness(
        self, step: int, trajectory: Trajectory, attacked: Work, gamma: float | None
    ) -> None:
        """The smoothness along the steps of an ascent, in the unit of perturbations, to λ."""
        more = self._policy_options(attacked)
        with frozen_parameters((self.module,), self.config.attack.eval_mode):
            report = stability_report(
                *(attacked.adversary, trajectory.x, trajectory),
                curvature="none",
                samples=2,
                module=self.module,
                **more,
            )
        assert report.smoothness is not None and report.second_order is not None
        # γ² bounds q of a direction with a norm of 1 in every group, in every token for the unit "token"
        square = trajectory.directions.flatten(2).double().square().sum(-1)
        count = more["output_mask"].sum(-1) if self.config.unit == "token" else 1
        moved = report.moved & (square > 0)
        bound = more["output_bounds"][0] * count / square
        scale = attacked.unit_value**2
        smoothness = torch.where(moved, scale * report.smoothness, torch.nan)
        self.multiplier.follow_smoothness(step, smoothness, scale * report.second_order, bound)
