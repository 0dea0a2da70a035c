"""Configuration of a training, as frozen data that is stored next to its results."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..method.ascent import INITS
from ..method.ascent import STEPS as KINDS
from ..method.baselines import METHODS, NEEDS_LOSS, PER_SEQUENCE
from ..method.checks import check_choices, check_integers, check_iterations, check_number
from ..method.objectives import KL, AdversaryLoss, CrossEntropy
from ..method.options import FORMS, METRICS
from ..method.places import At, entries_of
from ..method.projection import NORMS
from ..method.scopes import SCOPES, UNITS, unit_of
from ..method.trajectory import DIRECTIONS
from .losses import check_attack, check_objective
from .schedules import Schedule, Share, checked_schedule

__all__ = ["Attack", "Diagnostics", "FitConfig", "ObjectiveConfig", "Penalty", "describe"]

STEPS = ("worst", "all", "last", "random")


@dataclass(frozen=True)
class Attack:
    """The inner maximisation; the arguments of :func:`~aajr_kernels.ascend`, with these differences.

    Attributes:
        at: where it adds its perturbation, as in :func:`.policy.policy_of`: ``"embedding"``, modules inside the model,
            numbers of layers, several of these, with one trajectory. None: at the places of the policy, in the
            embedding where it has none. Where a batch has no agents, every place is one, for ``scope="agent"`` and
            ``per_agent``.
        radius: of the ball; a schedule. Where it is 0 the step trains on the clean loss, without attack and penalty.
        relative: `radius` (and a `step_size` that is a number) count in norms of a token: the root mean square of the
            norms of the batch's embedded tokens (for ``norm="linf"``: of their entries). Penalties then are those of a
            direction of that length. A model gains nothing by inflating its embeddings, and the same numbers serve
            models whose embeddings differ in scale. Inside the model the norms are those of the place's clean output,
            of every place its own, at the tokens open to attack. False: in the own units of the embedding or place.
        steps: T.
        scope: ``"token"`` by default.
        step_size: ``"auto"`` or a number.
        eval_mode: without dropout; by default with the dropout mask of the training forward.
        loss: that is maximised: :class:`~aajr_kernels.method.objectives.CrossEntropy`, ``Targeted``, ``KL``, ``Payoff``
            or an object of your own. What is minimised is ``ObjectiveConfig(adversarial_loss=)``.
    """

    radius: Schedule = 0.1
    relative: bool = True
    steps: int = 3
    step_size: float | str = "auto"
    step: str = "normalized"
    norm: str = "l2"
    scope: str | None = None
    init: str = "zero"
    restarts: int = 1
    eval_mode: bool = False
    loss: AdversaryLoss = field(default_factory=CrossEntropy)
    at: At | None = None

    def __post_init__(self) -> None:
        if self.at is not None:
            object.__setattr__(self, "at", entries_of(self.at))
        checked_schedule(self.radius, "radius")
        check_integers(1, steps=self.steps, restarts=self.restarts)
        check_choices(KINDS, step=self.step)
        check_choices(NORMS, norm=self.norm)
        if self.scope is not None:
            check_choices(SCOPES, scope=self.scope)
        check_choices(INITS, init=self.init)
        if not isinstance(self.step_size, str):
            check_number("step_size", self.step_size)
        if self.step_size != "auto" and (
            isinstance(self.step_size, str) or not 0 < self.step_size < math.inf
        ):
            raise ValueError(f"step_size must be 'auto' or a positive number, got {self.step_size!r}.")
        check_attack(self)


@dataclass(frozen=True)
class Penalty:
    """The penalty along the trajectory, in the units of :func:`~aajr_kernels.aligned_penalty`.

    Attributes:
        method: ``"none"``, ``"aligned"``, or a baseline measured at the same points: ``"random"``, ``"frobenius"``,
            ``"spectral"``, ``"input_gradient"``, ``"cure"``, ``"finite_difference"``.
        weight: λ: a share of the task loss, or a schedule. Where it is 0 nothing is computed.
        gamma: threshold γ on √q, a schedule, or None.
        steps: ``"random"``: every row at one step of its ascent, drawn anew, at the step's start and along its
            gradient: an unbiased estimate of ``"all"``; ``"last"``: all as in
            :func:`~aajr_kernels.trajectory_penalty`. ``"worst"``: at every row's point of largest loss, with the
            direction that led there; ``"aligned"`` then shares one forward with the adversarial loss, which has one of
            its own otherwise.
        tokens: ``"loss"``: the penalty is a mean over the tokens whose label is learnt; ``"attention"``: over all that
            are attended to.
        direction, at, per_agent, batch_steps, weights: of ``trajectory_penalty``, for ``"aligned"``; `weights` of the
            baselines too.
        metric, form: of ``aligned_penalty``; ``input_gradient`` and ``cure`` have no metric.
        unit: follows the scope of the attack: ``"token"``, or ``"sequence"`` for the scopes ``"sequence"`` and
            ``"agent"``; another one needs ``Attack(scope=)`` too. ``"sequence"`` for ``frobenius`` and ``spectral``.
        samples, iterations, h: of :func:`~aajr_kernels.method.baseline_penalty`; ``iterations="exact"``, for small
            inputs, with ``"spectral"``.
        every: k: the penalty is computed on every k-th step (k, 2k, ... of those counted from 1), with weight k·λ, the
            schedules read there. The other steps have only their losses, and without an adversarial loss no attack.
        rows: share of a batch's rows, in (0, 1], that the penalty is computed on, drawn anew on every such step; their
            penalty is divided by it, so that its expectation is that of all rows. Of B rows of a micro-batch
            ``rows · B`` are drawn, rounded up or down at random (at least one, weighted accordingly, where no loss has
            a weight). Draws depend on seed, step and micro-batch only. Dropout masks are those of a batch of the rows
            drawn. Not with `per_agent`, whose mean is over the agents of the whole batch.
    """

    method: str = "aligned"
    weight: Schedule | Share = field(default_factory=Share)
    gamma: Schedule | Share | str | None = None
    steps: str = "random"
    tokens: str = "loss"
    direction: str = "ascent"
    at: str | None = None
    per_agent: bool = False
    batch_steps: int = 1
    weights: tuple[float, ...] | None = None
    metric: str = "fisher"
    form: str = "squared"
    unit: str | None = None
    samples: int = 1
    iterations: int | str = 4
    h: float = 1e-2
    every: int = 1
    rows: float = 1.0

    def __post_init__(self) -> None:
        check_choices(("none", *METHODS), method=self.method)
        check_choices(STEPS, steps=self.steps)
        check_choices(("loss", "attention"), tokens=self.tokens)
        check_choices(METRICS, metric=self.metric)
        check_choices(FORMS, form=self.form)
        if self.unit is not None:
            check_choices(UNITS, unit=self.unit)
        check_choices(DIRECTIONS, direction=self.direction)
        check_integers(1, batch_steps=self.batch_steps, samples=self.samples, every=self.every)
        check_iterations(iterations=self.iterations)
        check_number("h", self.h)
        check_number("rows", self.rows)
        if not 0 < self.rows <= 1:
            raise ValueError(
                f"rows must be in (0, 1], got {self.rows}: the share of a batch's rows, 1 for all."
            )
        if self.rows < 1 and self.per_agent:
            raise ValueError(
                f"rows must be 1 with per_agent=True, whose mean is over all agents, got {self.rows}."
            )
        if not isinstance(self.weight, Share):
            checked_schedule(self.weight, "weight")
        self._check_gamma()
        if self.method in NEEDS_LOSS and self.metric != type(self).metric:
            raise ValueError(
                f"metric is one of the policy's output, which method={self.method!r} does not measure, got "
                f"{self.metric!r}: leave it out."
            )
        if self.iterations == "exact" and self.method != "spectral":
            raise ValueError(f"iterations='exact' goes with method='spectral', got method={self.method!r}.")
        if self.method not in ("none", "aligned"):
            for name in ("direction", "at", "per_agent", "batch_steps"):
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(f"{name} goes with method='aligned', got method={self.method!r}.")

    def check_alone(self) -> None:
        """Raise where λ is a share of the task loss, for an objective without one.

        Raises:
            ValueError: it is.
        """
        if self.method != "none" and isinstance(self.weight, Share):
            raise ValueError(
                f"weight must be a number where no loss has a weight to be a share of, got {self.weight}: "
                "Penalty(weight=0.01)."
            )

    def _check_gamma(self) -> None:
        if self.gamma is not None:
            checked_schedule(self.gamma, "gamma")
        elif self.form != "squared":
            raise ValueError(f"gamma must be given with form={self.form!r}: the threshold on the root of q.")


@dataclass(frozen=True)
class Diagnostics:
    """:func:`~aajr_kernels.stability_report` on the first micro-batch of every `every`-th step.

    Attributes:
        every: steps between two reports.
        curvature, samples, power_iterations: of ``stability_report``.
        smoothness: also the effective smoothness along the trajectory, one dual forward more per sample; and where γ is
            a threshold on √q along the ascent, in the metric of the report, the smoothness at γ and the hinge-active
            fraction.
        nearby: distance of a second start in radii; adds the expansion. 0 leaves it out.
    """

    every: int
    curvature: str = "exact"
    samples: int = 3
    smoothness: bool = False
    power_iterations: int = 0
    nearby: float = 0.0

    def __post_init__(self) -> None:
        check_integers(1, every=self.every)
        check_number("nearby", self.nearby, 0)
        check_integers(2, samples=self.samples)
        check_integers(0, power_iterations=self.power_iterations)
        if self.power_iterations and not self.smoothness:
            raise ValueError("power_iterations needs smoothness=True: both look at the policy's output.")


@dataclass(frozen=True)
class ObjectiveConfig:
    """The objective, without the loop around it.

    Attributes:
        attack, penalty: as they say; :attr:`scope` and :attr:`unit` are what their None stands for. A
            :class:`.constraint.Constraint` takes the place of a :class:`Penalty`.
        adversarial_weight, clean_weight: of the losses at the worst point and at the clean input; schedules.
        adversarial_loss: that is minimised at the worst point: ``CrossEntropy()``; ``KL()``: the divergence from the
            output at the clean input, with gradients of both sides (TRADES with ``clean_weight=1``); or
            ``KL("reference")``: that from the output of :attr:`Policy.reference`, a constant. Only the cross-entropy
            shares its forward with ``Penalty(steps="worst")``.
        anchor, anchor_weight: ``KL("reference")``, whose divergence at the clean input is added with this weight, a
            schedule: the policy stays near its reference. A mean over the step's tokens, as `anchor.tokens` says.
        share_context: whether the tokens before the first attackable one are computed once per micro-batch, shared by
            attack, losses and penalty: ``"auto"``: where they are at least an eighth of the sequence and the model
            allows it; True: wherever there are any, and an error where the model does not; False. Values and gradients
            are the same; random starts of an attack are drawn for the other tokens only, and with dropout the context
            has one mask per micro-batch. For ``method="aligned"`` or ``"none"`` and all rows.
        shift_labels: labels come as for Hugging Face, ``labels[:, t]`` being the token at t; False: the target at t.
        seed: of the attack's draws, which depend on it, on the step and on the micro-batch only; None: that of
            :class:`FitConfig` or of the trainer, and 0 in a loop of your own.
        diagnostics: of the inner maximisation, or None.

    Raises:
        TypeError, ValueError: a type or a value is wrong; the penalty's unit does not go with a scope that the attack
            does not name.
    """

    attack: Attack = field(default_factory=Attack)
    penalty: Penalty = field(default_factory=Penalty)
    adversarial_weight: Schedule = 1.0
    clean_weight: Schedule = 0.0
    adversarial_loss: CrossEntropy | KL = field(default_factory=CrossEntropy)
    anchor: KL = field(default_factory=lambda: KL("reference"))
    anchor_weight: Schedule = 0.0
    share_context: bool | str = "auto"
    shift_labels: bool = True
    seed: int | None = None
    diagnostics: Diagnostics | None = None

    def __post_init__(self) -> None:
        _check_types(self, attack=Attack, penalty=Penalty)
        if self.diagnostics is not None:
            _check_types(self, diagnostics=Diagnostics)
        if self.seed is not None:
            check_integers(0, seed=self.seed)
        for name in ("adversarial_weight", "clean_weight", "anchor_weight"):
            checked_schedule(getattr(self, name), name)
        if not isinstance(self.share_context, bool):
            check_choices(("auto",), share_context=self.share_context)
        penalty = self.penalty
        if self.share_context is True and (penalty.method not in ("none", "aligned") or penalty.rows < 1):
            raise ValueError(
                "share_context=True goes with method='aligned' or 'none' and rows=1, got "
                f"method={penalty.method!r} and rows={penalty.rows}: set share_context='auto' or False."
            )
        check_objective(self)
        if self.adversarial_weight == 0 and self.clean_weight == 0:
            penalty.check_alone()
        _ = self.unit

    @property
    def scope(self) -> str:
        """Scope of the attack."""
        return self.attack.scope or "token"

    @property
    def unit(self) -> str:
        """Unit of the penalty: as named, else that of the attack's scope; of a sequence for ‖J‖²_F and ‖J‖₂²."""
        if self.penalty.method in PER_SEQUENCE:
            return unit_of("sequence", self.penalty.unit)
        return unit_of(self.scope, self.penalty.unit, self.attack.scope is None, "Attack")


@dataclass(frozen=True)
class FitConfig:
    """A training; see :func:`fit`.

    Attributes:
        steps: optimizer steps in all.
        objective: the minimised objective.
        accumulate: micro-batches per step. Losses and penalties are means over all tokens of the step, however they
            are spread over its micro-batches.
        learning_rate, betas, weight_decay: of the AdamW that is made if no optimizer is given; the rate is a schedule,
            and matrices decay, vectors do not.
        clip_norm: largest norm of the gradient, or None.
        penalty_clip_norm: largest norm of the gradient of λ · penalty, which is then clipped apart from that of the
            losses, at the price of a second backward; None: both together.
        autocast: ``torch.bfloat16``, or None.
        seed: of the global generators at the start, and of the attack's draws where the objective has none.
        non_finite: ``"raise"`` :class:`NonFiniteLossError` before the parameters are touched, or ``"skip"`` the step.
        max_skips: consecutive skipped steps after which it is raised all the same.
        checkpoint_every: steps between checkpoints; the last step has one too. A crash loses at most as many.
        keep: newest checkpoints that are kept, or None for all.
        trainable_only: checkpoints hold the parameters that require a gradient (adapters) and no frozen ones.
        log_every, evaluate_every: steps between rows of ``metrics.jsonl`` and calls of ``evaluate``; 0: no evaluation
            but the last.
        tensorboard: also write to TensorBoard.
    """

    steps: int
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    accumulate: int = 1
    learning_rate: Schedule = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    penalty_clip_norm: float | None = None
    autocast: torch.dtype | None = None
    seed: int = 0
    non_finite: str = "raise"
    max_skips: int = 10
    checkpoint_every: int = 100
    keep: int | None = 2
    trainable_only: bool = False
    log_every: int = 1
    evaluate_every: int = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        check_integers(1, steps=self.steps, accumulate=self.accumulate, max_skips=self.max_skips)
        check_integers(1, checkpoint_every=self.checkpoint_every, log_every=self.log_every)
        check_integers(0, evaluate_every=self.evaluate_every, seed=self.seed)
        if self.keep is not None:
            check_integers(1, keep=self.keep)
        check_choices(("raise", "skip"), non_finite=self.non_finite)
        checked_schedule(self.learning_rate, "learning_rate")
        _check_types(self, objective=ObjectiveConfig)
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise TypeError(f"betas must be two numbers, got {self.betas!r}.")
        for index, beta in enumerate(self.betas):
            check_number(f"betas[{index}]", beta)
        check_number("weight_decay", self.weight_decay)
        for name in ("clip_norm", "penalty_clip_norm"):
            check_limit(name, getattr(self, name))
        if self.autocast not in (None, torch.bfloat16):
            raise ValueError(
                f"autocast must be torch.bfloat16 or None, got {self.autocast}: float16 would need a scaled loss."
            )


def check_limit(name: str, limit: Any) -> None:
    """Raise unless it is a positive number or None."""
    if limit is None:
        return
    check_number(name, limit)
    if not limit > 0:
        raise ValueError(f"{name} must be positive or None, got {limit}.")


def describe(value: Any) -> Any:
    """A configuration as what JSON can hold; functions by name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        entries = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, ObjectiveConfig):
            entries |= {"scope": value.scope, "unit": value.unit}
        kind = "schedule" if callable(value) else "loss" if hasattr(value, "of") else None
        return entries if kind is None else {kind: type(value).__name__, **entries}
    if isinstance(value, Mapping):
        return {str(key): describe(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(entry) for entry in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, "__qualname__", None) or (
        str(value) if isinstance(value, torch.dtype) else type(value).__qualname__
    )


def _check_types(config: Any, **kinds: type) -> None:
    for name, kind in kinds.items():
        if not isinstance(getattr(config, name), kind):
            article = "an" if kind.__name__[0] in "AO" else "a"
            raise TypeError(
                f"{name} must be {article} {kind.__name__}, got {type(getattr(config, name)).__name__}: from "
                "aajr_kernels.training."
            )
