"""Training of several agents, each by its own loss or payoff, in turns or together, against what the others say.

    for every step:  play (a dialogue, or episodes of an environment)
                     for every learner of the step:  its objective on its own view  ->  its own optimizer

An agent with ``loss="cross_entropy"`` has the objective of :class:`~.step.Objective`, clean_weight · L(x) +
adversarial_weight · L(x + δ*) + λ · P, on what it said. One with a payoff has the same with the policy gradient
−A log π of the tokens that it said in the place of L, with the advantage A of its row. Random draws depend on seed and
step; with the states of the global generators, which checkpoints hold, an interrupted training ends, on a CPU, with the
bits it would have ended with.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import files
from ..method.agents import Agent, Agents
from ..method.ascent import NonFiniteLoss
from ..method.batch import Prepared, prepared
from ..method.checks import check_choices, check_integers, check_number
from ..method.dialogue import Dialogue
from . import randomness
from .checkpoints import Checkpoints
from .config import ObjectiveConfig, check_limit, describe
from .gradients import Gradients
from .loop import NonFiniteLossError
from .objective import Terms
from .optimizer import adamw
from .progress import Progress
from .record import Recorder, Row
from .schedules import Schedule, checked_schedule, value_at
from .step import Objective

__all__ = ["AgentsConfig", "AgentsResult", "Experience", "fit_agents"]


@dataclass(frozen=True, eq=False)
class Experience:
    """One agent's part of what was played.

    Attributes:
        batch: for :class:`~.step.Objective`; labels are the tokens that the agent said.
        payoff: ``[B]``, which an agent with a payoff learns in the place of its own; None for that of the agent.
        shift_labels: as of :class:`~.config.ObjectiveConfig`; None for that of the learner's objective.
    """

    batch: Mapping[str, Any]
    payoff: Tensor | None = None
    shift_labels: bool | None = None


#: from the agents and a generator to a dialogue of all, or to every learner's experience
Play = Callable[[Agents, torch.Generator], "Dialogue | Mapping[str, Experience]"]


@dataclass(frozen=True)
class AgentsConfig:
    """A training of agents; see :func:`fit_agents`.

    Attributes:
        steps: plays in all.
        objective: of every learner, or one by name; its schedules count a learner's own updates. Beside a payoff or a
            function λ is a number (``Penalty(weight=0.01)``); beside a function, whose loss it is, the weights of the
            losses are not read.
        learners: names of those who learn; all by default, the others stay as they are.
        order: ``"alternate"``: one learner a step, in turn, for `updates` steps each; ``"together"``: all at every
            step, from the same play.
        updates: steps in a row of one learner under ``"alternate"``.
        observed: names of the agents whose turns the adversary of any learner may move; all others by default.
        advantage: ``"mean"``: payoff minus its mean over the rows; ``"standardised"``: divided by their standard
            deviation, too; ``"payoff"``: itself.
        learning_rate, betas, weight_decay: of the AdamW that every agent gets; the rate is a schedule of its own
            updates, and matrices decay only.
        clip_norm: largest norm of a learner's gradient, or None.
        seed: of plays, attacks and global generators.
        checkpoint_every, keep, log_every: as for :class:`~.config.FitConfig`.
    """

    steps: int
    objective: ObjectiveConfig | Mapping[str, ObjectiveConfig] = field(default_factory=ObjectiveConfig)
    learners: Sequence[str] | None = None
    order: str = "alternate"
    updates: int = 1
    observed: Sequence[str] | None = None
    advantage: str = "mean"
    learning_rate: Schedule = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    seed: int = 0
    checkpoint_every: int = 100
    keep: int | None = 2
    log_every: int = 1

    def __post_init__(self) -> None:
        check_integers(1, steps=self.steps, updates=self.updates, log_every=self.log_every)
        check_integers(1, checkpoint_every=self.checkpoint_every)
        check_integers(0, seed=self.seed)
        if self.keep is not None:
            check_integers(1, keep=self.keep)
        check_choices(("alternate", "together"), order=self.order)
        check_choices(("mean", "standardised", "payoff"), advantage=self.advantage)
        checked_schedule(self.learning_rate, "learning_rate")
        check_number("weight_decay", self.weight_decay)
        check_limit("clip_norm", self.clip_norm)
        several = self.objective.values() if isinstance(self.objective, Mapping) else [self.objective]
        for config in several:
            if not isinstance(config, ObjectiveConfig):
                raise TypeError(f"objective must be an ObjectiveConfig, got {type(config).__name__}.")
            if config.diagnostics is not None or getattr(config.penalty, "follow", "") == "validation":
                raise ValueError(
                    "objective of agents must have no diagnostics and no Constraint(follow='validation'), which fit "
                    "has the data for: leave them out."
                )

    def objective_of(self, name: str) -> ObjectiveConfig:
        """Of a learner.

        Raises:
            ValueError: it has none.
        """
        if not isinstance(self.objective, Mapping):
            return self.objective
        if name not in self.objective:
            raise ValueError(
                f"objective must have an entry for every learner, got none for {name!r}: add one, or leave it out of "
                "learners."
            )
        return self.objective[name]


@dataclass(frozen=True)
class AgentsResult:
    """A finished training of agents.

    Attributes:
        steps: plays, of this call and of those it continued.
        resumed_from: the step this call started at, 0 without a checkpoint.
        rows: of ``metrics.jsonl``: one per step and learner.
        folder: with checkpoints, or None.
    """

    steps: int
    resumed_from: int
    rows: list[Row]
    folder: Path | None


def fit_agents(
    agents: Agents,
    play: Play,
    config: AgentsConfig,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = True,
    on_step: Callable[[Row], None] | None = None,
) -> AgentsResult:
    """Train agents against each other.

    Args:
        agents: who take part. Models in one process.
        play: called at every step with the agents and a generator that depends on seed and step; returns a
            :class:`~aajr_kernels.method.dialogue.Dialogue` of all (:func:`~aajr_kernels.method.dialogue.play`), or the
            experience of every learner (an environment's).
        config: see :class:`AgentsConfig`.
        out: folder for ``metrics.jsonl``, ``config.json`` and checkpoints of the trained parameters; None for none.
        resume: go on from the newest checkpoint in `out`; False refuses a folder that has one.
        progress: show it.
        on_step: called with every row.

    Returns:
        AgentsResult.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value; a learner has neither loss nor payoff, no
            parameters, or nothing that it said; a payoff has a wrong shape.
        NonFiniteLossError: a loss or gradient is not finite; parameters are those from before the step.
        OSError: a file in `out` could not be written. A new call continues.
    """
    run = _Run(agents, play, config)
    folder = None if out is None else Path(out)
    checkpoints = None if folder is None else Checkpoints(folder / "checkpoints", config.keep)
    begin = run.resume(checkpoints, resume)
    if folder is not None:
        files.write_text(folder / "config.json", json.dumps(describe(config), indent=1))
    recorder = Recorder(folder, begin, False)
    modes = {m: m.training for agent in agents for m in agent.module.modules()}
    try:
        with Progress(shown=progress) as display:
            display.stage("training agents", config.steps, begin)
            for step in range(begin, config.steps):
                rows, is_last = run.step(step), step + 1 == config.steps
                for row in rows if (step + 1) % config.log_every == 0 or is_last else []:
                    recorder.add(row)
                    if on_step is not None:
                        on_step(row)
                if checkpoints is not None and (is_last or (step + 1) % config.checkpoint_every == 0):
                    recorder.flush()
                    run.save(checkpoints, step + 1)
                display.reach(step + 1, ", ".join(f"{row['agent']} {row['loss']:.4g}" for row in rows))
    finally:
        recorder.close()
        for module, mode in modes.items():
            module.training = mode
    return AgentsResult(max(begin, config.steps), begin, recorder.rows, folder)


class _Run:
    """The objects of a training and what changes in it."""

    def __init__(self, agents: Agents, play: Play, config: AgentsConfig) -> None:
        if not isinstance(agents, Agents):
            raise TypeError(f"agents must be Agents, got {type(agents).__name__}: Agents([...]).")
        if not isinstance(config, AgentsConfig):
            raise TypeError(f"config must be an AgentsConfig, got {type(config).__name__}.")
        self.agents, self.play, self.config = agents, play, config
        self.learners = list(agents.names if config.learners is None else config.learners)
        if not self.learners or len(set(self.learners)) < len(self.learners):
            raise ValueError(
                f"learners must be names of agents, each once, at least one, got {self.learners}."
            )
        self.objectives: dict[str, Objective] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.names: dict[str, dict[str, nn.Parameter]] = {}
        for name in self.learners:
            agent = agents[name]
            agent.check_learns()
            own = config.objective_of(name)
            if agent.loss != "cross_entropy":  # of a payoff or a function no λ is a share
                own.penalty.check_alone()
            seed = config.seed if own.seed is None else own.seed
            # agents draw apart
            own = replace(own, seed=seed + agents.names.index(name))
            self.objectives[name] = Objective(agent.module, own, policy=agent.policy)
            parameters = agent.parameters()
            self.optimizers[name] = adamw(parameters, config.learning_rate, config.betas, config.weight_decay)
            numbers = {id(p): name for name, p in agent.module.named_parameters()}
            self.names[name] = {f"{name}/{numbers[id(p)]}": p for p in parameters}
        self.device = next(iter(self.names[self.learners[0]].values())).device

    def due(self, step: int) -> list[str]:
        """Names of the learners of a step."""
        if self.config.order == "together":
            return self.learners
        return [self.learners[step // self.config.updates % len(self.learners)]]

    def updates_before(self, step: int) -> int:
        """Updates that the learners of a step have had, which schedules and ``Penalty(every=)`` count."""
        if self.config.order == "together":
            return step
        turn, updates = self.config.updates * len(self.learners), self.config.updates
        return step // turn * updates + step % updates

    # -- one step -----------------------------------------------------------------------------------------------------

    def step(self, step: int) -> list[Row]:
        """A play, and the updates of its learners, from the parameters that played it."""
        started, due = time.perf_counter(), self.due(step)
        played = self.play(self.agents, randomness.generator_for(self.config.seed, step, -1, self.device))
        experiences = {name: self.experience(name, played) for name in due}
        updates = [self.update(step, name, experiences[name]) for name in due]
        for gradients, _ in updates:  # all are computed before any parameter moves
            gradients()
        seconds = time.perf_counter() - started
        return [{**row, "seconds": seconds} for _, row in updates]

    def experience(self, name: str, played: Any) -> Experience:
        """Of one learner, with the payoff that its agent gives."""
        agent = self.agents[name]
        if isinstance(played, Dialogue):
            observed = self.config.observed
            observed = None if observed is None else [other for other in observed if other != name]
            payoff = None if agent.payoff is None else agent.paid(played, played.rows)
            return Experience(played.batch(name, observed=observed), payoff)
        if not isinstance(played, Mapping) or not isinstance(played.get(name), Experience):
            raise TypeError(
                f"play must return a Dialogue or an Experience for every learner, got {type(played).__name__} without "
                f"one of {name!r}."
            )
        experience: Experience = played[name]
        if agent.payoff is None:
            return experience
        entries = experience.batch.get("input_ids"), experience.batch.get("inputs_embeds")
        rows = next((len(entry) for entry in entries if entry is not None), 0)
        if experience.payoff is None:
            return replace(experience, payoff=agent.paid(experience, rows))
        return replace(experience, payoff=agent.checked(experience.payoff, rows))

    def update(self, step: int, name: str, experience: Experience) -> tuple[Callable[[], None], Row]:
        """Gradients of one learner; a function that takes its step, and the row."""
        agent, objective, config = self.agents[name], self.objectives[name], self.config
        optimizer, parameters = self.optimizers[name], list(self.names[name].values())
        own = self.updates_before(step)
        for group in optimizer.param_groups:
            group["lr"] = value_at(config.learning_rate, own, "learning_rate")
        scheduled = objective.scheduled(own)
        agent.module.train()
        gradients = Gradients(parameters, config.clip_norm, None)
        for p in parameters:
            p.grad = None
        with agent.acting():
            shift = objective.config.shift_labels
            if experience.shift_labels is not None:
                shift = experience.shift_labels
            batch = prepared(experience.batch, objective.device, shift)
            is_attacked = scheduled.measures if callable(agent.loss) else scheduled.attacks
            if is_attacked and not bool(batch.masks[2].any()):
                raise ValueError(
                    f"what agent {name!r} learns must depend on something that an adversary may move, got no token of "
                    "the observed agents before its own last one: let it speak after one of them, name others in "
                    "observed, or give it an objective with Attack(radius=0)."
                )
            try:
                terms, more = self.terms(own, agent, objective, batch, experience.payoff)
            except NonFiniteLoss as error:
                raise NonFiniteLossError(f"step {step + 1} of {name!r} is not finite: {error}") from error
            gradients.add(terms)
        norms = gradients.clip()
        loss = float(terms.total.detach())
        if not (math.isfinite(loss) and math.isfinite(sum(norms.values()))):
            raise NonFiniteLossError(
                f"step {step + 1} of {name!r} is not finite (loss {loss}, {norms}) and was not taken: lower the "
                "learning rate, the radius or the penalty's weight."
            )
        kept = [p.grad for p in parameters]

        def take() -> None:
            for p, gradient in zip(parameters, kept):
                p.grad = gradient
            optimizer.step()
            for p in parameters:
                p.grad = None

        objective.multiplier.settle(None)
        numbers = {key: float(value) for key, value in terms.parts.items()}
        used = {"radius": scheduled.radius, "weight": scheduled.weight, "gamma": scheduled.gamma}
        used |= objective.multiplier.facts
        return take, {"step": step + 1, "agent": name, "loss": loss, **numbers, **more, **norms, **used}

    def terms(
        self, step: int, agent: Agent, objective: Objective, batch: Prepared, payoff: Tensor | None
    ) -> tuple[Terms, dict[str, float]]:
        """The objective of one learner, attached, and numbers of its own loss or payoff."""
        if not callable(agent.loss):
            if agent.payoff is None:
                return objective(batch, step=step), {}
            assert payoff is not None
            weights = self.advantages(agent.name, payoff).to(batch.labels.device)
            return objective(batch, row_weights=weights, step=step), {"payoff": float(payoff.mean())}
        own = agent.loss(agent, batch)
        if not isinstance(own, Tensor) or own.dim() or not own.requires_grad:
            got = f"shape {tuple(own.shape)}" if isinstance(own, Tensor) else type(own).__name__
            raise ValueError(
                f"loss of agent {agent.name!r} must return a number that depends on its parameters, a tensor without "
                f"axes, got {got}{'' if getattr(own, 'requires_grad', True) else ' without a gradient'}."
            )
        added = objective.penalty(batch, step=step)
        return Terms(own + added.total, added.parts), {"own_loss": float(own.detach())}

    def advantages(self, name: str, payoff: Tensor) -> Tensor:
        """``[B]``."""
        if self.config.advantage == "payoff":
            return payoff
        if len(payoff) < 2:
            raise ValueError(
                f"advantage={self.config.advantage!r} compares rows of what is played, of which agent {name!r} must "
                f"have at least 2, got {len(payoff)}: play more at a time, or take advantage='payoff'."
            )
        centred = payoff - payoff.mean()
        if self.config.advantage == "mean":
            return centred
        return centred / (centred.square().mean().sqrt() + 1e-8)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save(self, checkpoints: Checkpoints, step: int) -> None:
        weights = {key: p.detach() for named in self.names.values() for key, p in named.items()}
        state = {
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "objectives": {name: objective.state_dict() for name, objective in self.objectives.items()},
            "random": randomness.capture(self.device),
        }
        checkpoints.save(step, weights, state, describe(self.config))

    def resume(self, checkpoints: Checkpoints | None, wanted: bool) -> int:
        """Go to the newest checkpoint, or to the start; the steps that are done."""
        newest = None if checkpoints is None else checkpoints.to_resume(wanted)
        if newest is None:
            randomness.seed(self.config.seed)
            return 0
        own = {key: p for named in self.names.values() for key, p in named.items()}
        weights, state = newest.weights(), newest.state()
        if different := sorted(set(own) ^ set(weights)):
            raise ValueError(
                f"agents must be those that {newest.path} was written for, which differ in {different[0]} "
                f"({len(different)} in all): give the same names, adapters and learners."
            )
        with torch.no_grad():
            for key, value in weights.items():
                own[key].copy_(value)
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
            self.objectives[name].load_state_dict(state["objectives"][name])
        randomness.restore(state["random"], self.device)
        return newest.step
