"""The training loop of the method: attack, loss at the worst point, penalty along the way there, step.

A step takes ``accumulate`` micro-batches. For each it embeds the tokens, ascends the loss in embedding space, and adds
the gradients of the objective (:mod:`.objective`); then it clips them and steps. Random draws of an attack depend only
on seed, step and micro-batch. Together with the states of the global generators and the place in the data, which
checkpoints hold, a training that was interrupted ends, on a CPU, with the bits it would have ended with.

Under ``fully_shard`` all processes call :func:`fit`, each with its own batches, and take the same steps. The first one
writes; checkpoints hold whole tensors, and the random states and the place in the data of every process.
"""

from __future__ import annotations

import functools
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from .. import files
from ..coverage import Coverage, recorded_in
from ..method.ascent import NonFiniteLoss
from ..method.attack_state import frozen_parameters
from ..method.policy import Policy
from . import randomness
from .checkpoints import Checkpoints, put_weights, weights_of
from .config import FitConfig, describe
from .gradients import Gradients, over_processes
from .optimizer import adamw
from .progress import Progress
from .record import Recorder, Row
from .report import write_report
from .schedules import value_at
from .shards import gathered, gathered_state, spread_state
from .step import Objective
from .stream import Batches, Stream
from .wrappers import reshard, smallest, unwrapped

__all__ = ["FitResult", "NonFiniteLossError", "fit"]

Evaluate = Callable[[nn.Module], Mapping[str, float]]
#: fields that a resumed training may change without a warning
FREE = "steps keep log_every checkpoint_every evaluate_every tensorboard diagnostics objective".split()


class NonFiniteLossError(FloatingPointError):
    """A loss or gradient was NaN or infinite; the parameters are those from before the step."""


@dataclass(frozen=True)
class FitResult:
    """A finished training.

    Attributes:
        steps: optimizer steps, of this call and of those it continued.
        resumed_from: the step this call started at, 0 without a checkpoint.
        rows: of ``metrics.jsonl``, from the first step on.
        skipped: steps that were skipped because something was not finite.
        folder: with checkpoints and report, or None.
    """

    steps: int
    resumed_from: int
    rows: list[Row]
    skipped: int
    folder: Path | None


def fit(
    model: nn.Module,
    batches: Batches,
    config: FitConfig,
    *,
    policy: Policy | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: LRScheduler | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = True,
    evaluate: Evaluate | None = None,
    validation: Batches | None = None,
    on_step: Callable[[Row], None] | None = None,
    progress: bool = True,
) -> FitResult:
    """Train a language model against the inner maximiser, with the penalty along its ascent.

    Args:
        model: a Hugging Face causal language model, with adapters or not, or any module that takes ``inputs_embeds``
            and returns logits; on its device, in its dtype; plain, or after ``fully_shard`` in several processes. It is
            in training mode meanwhile.
        batches: an iterable of micro-batches (see :func:`~aajr_kernels.training.prepared`), begun again at its end if
            that is possible, or a function from the number of micro-batches before to such an iterable. Those of this
            process.
        config: everything else, as data.
        policy: how to call the model, where :func:`.policy.policy_of` does not know.
        optimizer: of the parameters that are trained; by default AdamW of all that require
            a gradient, as `config` says.
        scheduler: of the rates of a given `optimizer`, stepped after every step.
        out: folder for checkpoints, ``metrics.jsonl``, ``config.json`` and the report; None keeps nothing. All
            processes read it.
        resume: continue from the newest whole checkpoint in `out`; False refuses a folder that has any.
        evaluate: from the model, in eval mode and without gradients, to numbers by name; called every
            ``evaluate_every`` steps and at the end, on all processes, of which the first one's numbers are kept. Random
            states are put back after it.
        validation: held-out micro-batches, as `batches`, of which λ of a ``Constraint(follow="validation")`` follows
            one in every step with a penalty.
        on_step: called with every logged row.
        progress: on standard error: a bar on a terminal, else a line every few seconds.

    Returns:
        FitResult. In several processes all but the first have the rows of this call only.

    Raises:
        NonFiniteLossError: see ``FitConfig.non_finite``. A new call continues from the newest checkpoint.
        TypeError, ValueError: an argument or a batch has a wrong type, shape or value, or `out` has no checkpoint that
            is whole.
        OSError: a file in `out` could not be written. A new call continues, too.
        ImportError: `out` without the package safetensors.
    """
    run = _Run(model, config, policy, optimizer, scheduler, batches, validation)
    folder = None if out is None else Path(out)
    checkpoints = None if folder is None else Checkpoints(folder / "checkpoints", config.keep)
    begin = run.resume(checkpoints, resume)
    if not run.is_first:
        folder = None
    if folder is not None:
        files.write_text(folder / "config.json", json.dumps(describe(config), indent=1))
    recorder = Recorder(folder, begin, config.tensorboard)
    modes = {m: m.training for m in model.modules()}
    model.train()
    try:
        with Progress(shown=progress and run.is_first) as display:
            display.stage("training", config.steps, begin)
            for step in range(begin, config.steps):
                row, last = run.step(step, recorder), step + 1 == config.steps
                if (step + 1) % config.log_every == 0 or last:
                    recorder.add(row)
                    if on_step is not None:
                        on_step(row)
                if evaluate is not None and (last or _due(step, config.evaluate_every)):
                    recorder.add(run.evaluated(evaluate, step))
                if checkpoints is not None and (last or _due(step, config.checkpoint_every)):
                    recorder.flush()
                    run.save(checkpoints, step + 1)
                display.reach(step + 1, f"loss {row['loss']:.4g}")
    except NonFiniteLossError as error:
        newest = checkpoints.newest() if checkpoints is not None else None
        if newest is not None:
            raise NonFiniteLossError(f"{error} The newest checkpoint is {newest.path}.") from error
        raise
    finally:
        recorder.close()
        for module, mode in modes.items():
            module.training = mode
    if folder is not None:
        write_report(folder, recorder.rows, describe(config), run.objective.sharing.reason)
    return FitResult(
        max(begin, config.steps), begin, recorder.rows, run.skipped, None if out is None else Path(out)
    )


class _Run:
    """The objects of a training and what changes in it."""

    def __init__(
        self,
        model: nn.Module,
        config: FitConfig,
        policy: Policy | None,
        optimizer: torch.optim.Optimizer | None,
        scheduler: LRScheduler | None,
        batches: Batches,
        validation: Batches | None,
    ) -> None:
        if not isinstance(config, FitConfig):
            raise TypeError(f"config must be a FitConfig, got {type(config).__name__}.")
        if unwrapped(model) is not model:
            raise TypeError(
                "model must be a plain module or one after fully_shard, got one in DistributedDataParallel: call "
                "fully_shard, or use AAJRTrainer, or Objective in a loop of your own."
            )
        seed = config.seed if config.objective.seed is None else config.objective.seed
        self.objective = Objective(model, replace(config.objective, seed=seed), policy=policy)
        self.model, self.config = model, config
        self.group = self.objective.group
        self.is_first = self.group is None or self.group.rank() == 0
        reshard(model)
        own = [p for p in model.parameters() if p.requires_grad]
        if not own:
            raise ValueError("model must have a parameter that requires a gradient, got none: unfreeze some.")
        if scheduler is not None and optimizer is None:
            raise ValueError("scheduler goes with the optimizer it was made for: give optimizer= too.")
        self.has_own_optimizer = optimizer is None
        if optimizer is None:
            optimizer = adamw(own, config.learning_rate, config.betas, config.weight_decay)
        self.optimizer = optimizer
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not {id(p) for p in self.parameters} <= {id(p) for p in model.parameters()}:
            raise ValueError(
                "optimizer must hold only parameters of model, got others: make it after the model is loaded, "
                "moved and given adapters."
            )
        self.scheduler = scheduler
        self.device = self.parameters[0].device
        self.stream = Stream(batches, self.device)
        constraint = self.objective.multiplier.constraint
        if (constraint is not None and constraint.follow == "validation") != (validation is not None):
            raise ValueError(
                "validation must be given with Constraint(follow='validation') and only with it, got "
                f"{type(validation).__name__} with {type(config.objective.penalty).__name__}: the held-out batches "
                "that λ follows."
            )
        self.validation = None if validation is None else Stream(validation, self.device)
        self.skipped = self.in_a_row = 0

    # -- one step -----------------------------------------------------------------------------------------------------

    def step(self, step: int, recorder: Recorder) -> Row:
        """Everything from batches to parameters; the row to be logged."""
        config, started = self.config, time.perf_counter()
        objective = self.objective
        scheduled = objective.scheduled(step)
        batches = [objective.prepared(b) for b in self.stream.take(config.accumulate)]
        held_out = self.validation.take(1) if self.validation is not None and scheduled.measures else []
        counts = objective.counts(batches)
        if self.has_own_optimizer:
            for group in self.optimizer.param_groups:
                group["lr"] = value_at(config.learning_rate, step, "learning_rate")
        self.model.zero_grad()
        gradients = Gradients(self.parameters, config.clip_norm, config.penalty_clip_norm)
        parts: dict[str, list[Tensor]] = {}
        totals: list[Tensor] = []
        problem: str | None = None
        on_report = lambda report: recorder.stability(report, step + 1)
        ran = Coverage()
        autocast = functools.partial(
            torch.autocast, self.device.type, config.autocast, enabled=config.autocast is not None
        )
        for n, batch in enumerate(batches):
            try:
                with autocast(), recorded_in(ran):
                    terms = objective(batch, counts=counts, step=step, part=n, on_report=on_report)
            except NonFiniteLoss as error:
                problem = f"the attack stopped: {error}"
                break
            gradients.add(terms)
            totals.append(terms.total.detach())
            for name, value in terms.parts.items():
                parts.setdefault(name, []).append(value)
        try:
            with autocast():
                for n, batch in enumerate(held_out):
                    objective.measure(batch, step=step, part=n)
        except NonFiniteLoss as error:
            problem = problem or f"the attack on held-out rows stopped: {error}"
        numbers = over_processes(parts, self.group, self.device)
        loss = math.nan
        if totals:
            loss = over_processes({"loss": totals}, self.group, self.device)["loss"] / counts.processes
        norms = gradients.clip()
        norm = sum(norms.values())
        rates = {"learning_rate": self.optimizer.param_groups[0]["lr"], **norms}
        if problem is None and not math.isfinite(loss):
            problem = ", ".join(f"{k} = {v:.4g}" for k, v in {"loss": loss, **numbers}.items())
        elif problem is None and not math.isfinite(norm):
            problem = f"the norm of the gradient is {norm}"
        self._update(step, problem)
        if problem is not None:
            objective.multiplier.discard()
        objective.multiplier.settle(self.group)
        used = {"radius": scheduled.radius, "weight": scheduled.weight, "gamma": scheduled.gamma}
        used |= objective.multiplier.facts
        spent = {"tokens": counts.tokens, "skipped": self.skipped, "seconds": time.perf_counter() - started}
        computed = {f"computed_{part}": share for part, share in ran.shares().items()}
        return {"step": step + 1, "loss": loss, **numbers, **rates, **used, **computed, **spent}

    def _update(self, step: int, problem: str | None) -> None:
        if problem is None:
            self.optimizer.step()
            self.in_a_row = 0
        else:
            self.model.zero_grad()
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            if self.config.non_finite == "raise" or self.in_a_row >= self.config.max_skips:
                raise NonFiniteLossError(
                    f"step {step + 1} is not finite ({problem}) and was not taken: lower the learning rate, the radius "
                    "or the penalty's weight, clip the gradient, or pass over such steps with non_finite='skip'."
                )
        if self.scheduler is not None:
            with warnings.catch_warnings():
                # a first step that is skipped looks to torch like a wrong order of calls
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
                self.scheduler.step()

    def evaluated(self, evaluate: Evaluate, step: int) -> Row:
        """A row of what `evaluate` says."""
        state = randomness.capture(self.device)
        try:
            with torch.no_grad(), frozen_parameters((self.model,), True):
                values = evaluate(self.model)
        finally:
            randomness.restore(state, self.device)
        if not isinstance(values, Mapping):
            raise TypeError(f"evaluate must return numbers by name, got {type(values).__name__}.")
        return {"step": step + 1, **{f"eval/{name}": float(value) for name, value in values.items()}}

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save(self, checkpoints: Checkpoints, step: int) -> None:
        """Write a checkpoint."""
        own = {
            "random": randomness.capture(self.device),
            "data": self.stream.state(),
            "validation": None if self.validation is None else self.validation.state(),
        }
        state = {
            "optimizer": gathered_state(self.optimizer, self.is_first),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "skipped": [self.skipped, self.in_a_row],
            "objective": self.objective.state_dict(),
        }
        if self.group is None:
            state |= own
        else:
            of_all: list[Any] = [None] * self.group.size()
            torch.distributed.all_gather_object(of_all, own, group=self.group)
            state["processes"] = of_all
        weights = gathered(weights_of(self.model, self.config.trainable_only), self.is_first)
        if self.is_first:
            checkpoints.save(step, weights, state, describe(self.config))
        smallest([step], self.group, self.device)  # the others wait until it is there

    def resume(self, checkpoints: Checkpoints | None, wanted: bool) -> int:
        """Go to the newest checkpoint, or to the start; the steps that are done."""
        newest = None if checkpoints is None else checkpoints.to_resume(wanted)
        step = 0 if newest is None else newest.step
        least, most = smallest([step, -step], self.group, self.device)
        if least != -most:
            raise ValueError(
                f"out must be one folder for all processes, got checkpoints of steps {least} to {-most} in it: give a "
                "folder that all of them can read."
            )
        if newest is None:
            randomness.seed(self.config.seed)
            return 0
        self._compare(newest.config)
        with torch.no_grad():
            put_weights(self.model, newest.weights(), newest.path, self.config.trainable_only)
        state = newest.state()
        own, of_all = state, state.get("processes", [state])
        count = 1 if self.group is None else self.group.size()
        if len(of_all) != count:
            raise ValueError(
                f"processes must be {len(of_all)} as those that wrote {newest.path}, got {count}: start as many, or "
                "put its weights into the model with load_checkpoint and give a new folder."
            )
        if "processes" in state:
            own = of_all[self.group.rank() if self.group is not None else 0]
        self.optimizer.load_state_dict(spread_state(self.optimizer, state["optimizer"]))
        if self.scheduler is not None:
            if state["scheduler"] is None:
                raise ValueError(
                    f"scheduler must be None to continue {newest.path}, which was written without."
                )
            self.scheduler.load_state_dict(state["scheduler"])
        self.stream.resume(own["data"])
        if self.validation is not None and own.get("validation") is not None:
            self.validation.resume(own["validation"])
        randomness.restore(own["random"], self.device)
        self.skipped, self.in_a_row = state["skipped"]
        if "objective" in state:  # not in checkpoints of earlier versions
            self.objective.load_state_dict(state["objective"])
        return newest.step

    def _compare(self, before: Mapping[str, Any]) -> None:
        """Say what changed since the checkpoint."""

        def flat(config: Mapping[str, Any]) -> dict[str, Any]:
            inner = dict(config.get("objective", {}))
            return {**config, "objective.seed": inner.pop("seed", None), **inner}

        now, then = flat(describe(self.config)), flat(before)
        changed = [name for name in now if name not in FREE and now[name] != then.get(name, now[name])]
        if changed:
            warnings.warn(
                f"the configuration changed since the checkpoint: {', '.join(changed)}. The training goes on with the "
                "new one.",
                RuntimeWarning,
                stacklevel=4,
            )


def _due(step: int, every: int) -> bool:
    return every > 0 and (step + 1) % every == 0
