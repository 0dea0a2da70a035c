"""The two mixins; they stand before the trainer in the bases of a class.

    class Mine(AAJRTrainerMixin, SFTTrainer): ...

What happens outside of ``compute_loss`` (data, accelerate, optimizer, checkpoints, evaluation) is the trainer's.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import files
from ...method.batch import Prepared
from ...method.wrapped import inside
from ...sharding import is_fully_sharded
from ...training import Constraint, Counts, Objective, ObjectiveConfig, Policy, Terms, policy_of, prepared
from ...training.wrappers import unwrapped
from . import checks
from .dialogue import DialogueRollout, dialogue_batch
from .grpo import grpo_batch
from .meter import Meter

_Base: Any = object  # a trainer of transformers stands behind the mixin

__all__ = ["AAJRPenaltyMixin", "AAJRTrainerMixin"]

#: entries of a batch that say what may be attacked, and that models do not take
ATTACK_COLUMNS = ("attack_mask", "agents", "attack_labels")
#: state of the objective, in the folder of a checkpoint
STATE = "objective.json"


class _Mixin(_Base):
    """Shared by both mixins: calls of the objective, counts of tokens, and logs."""

    _signature_columns: Any

    def __init__(
        self, *arguments: Any, objective: ObjectiveConfig, policy: Policy | None = None, **options: Any
    ) -> None:
        if not isinstance(objective, ObjectiveConfig):
            raise TypeError(f"objective must be an ObjectiveConfig, got {type(objective).__name__}.")
        self.aajr_config = objective
        self._aajr_policy: Policy | None = policy
        self._aajr_has_policy = policy is not None
        self._aajr_objective: Objective | None = None
        self._aajr_is_sharded = False
        self._aajr_counts: Counts | None = None
        self._aajr_counted: list[tuple[Mapping[str, Any], Prepared]] = []
        self._aajr_parts = self._aajr_part = 0
        self._aajr_meter = Meter()
        self._aajr_held_out: Iterator[Any] | None = None
        super().__init__(*arguments, **options)
        if objective.seed is None:
            self.aajr_config = dataclasses.replace(objective, seed=self.args.seed)
        checks.arguments(self)
        self._aajr_check_loss()
        self._aajr_of(self.model)  # says now what cannot be trained

    def _aajr_check_loss(self) -> None:
        """Raise where the trainer's loss does not go with the mixin."""

    def _aajr_check_model(self, model: nn.Module) -> None:
        """Raise where the model does not."""

    def _aajr_of(self, model: nn.Module) -> Objective:
        """The objective of a model, wrapped or not; the policy is looked for once per module."""
        known = self._aajr_objective
        is_sharded = is_fully_sharded(model)  # in place, by accelerate
        if known is not None and known.model is model and self._aajr_is_sharded == is_sharded:
            return known
        self._aajr_is_sharded = is_sharded
        inside = unwrapped(model)
        if (known is None or known.module is not inside) and not self._aajr_has_policy:
            self._aajr_check_model(inside)
            with self.accelerator.autocast():  # in which the whole is computed too, once it is prepared
                self._aajr_policy = policy_of(inside)
        self._aajr_objective = Objective(model, self.aajr_config, policy=self._aajr_policy)
        if known is not None and known.module is inside:
            self._aajr_objective.multiplier = known.multiplier
        return self._aajr_objective

    def _aajr_place(self) -> tuple[int, int, bool]:
        """The step, the index of the micro-batch in it, and whether it is one of those that were counted."""
        known = self._aajr_part < self._aajr_parts
        part = self._aajr_part if known else 0
        self._aajr_part += known
        return int(self.state.global_step), part, known

    def _aajr_across(self) -> bool:
        """Whether the means of a step are over all processes."""
        return False

    def _aajr_training(self, model: nn.Module) -> bool:
        """Whether a loss is wanted that is trained on, not one of an evaluation."""
        return model.training and torch.is_grad_enabled()

    # -- what Trainer calls -------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of a step; what the means of the objective are over is counted here."""
        batches, number = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._aajr_parts, self._aajr_part = len(batches), 0
        self._aajr_counts = self._aajr_count(batches)
        if batches and self._aajr_follows_validation():
            self._aajr_measure()
        return batches, number

    def _aajr_follows_validation(self) -> bool:
        penalty = self.aajr_config.penalty
        return isinstance(penalty, Constraint) and penalty.follow == "validation"

    def _aajr_measure(self) -> None:
        """A batch of the evaluation data for λ; which one follows from the step, also after a checkpoint."""
        objective, step = self._aajr_of(self.model_wrapped), int(self.state.global_step)
        if not objective.scheduled(step).measures:
            return
        with torch.random.fork_rng(
            devices=[]
        ):  # a loader draws when it begins, which a checkpoint may change
            if self._aajr_held_out is None:
                loader = self.get_eval_dataloader()
                endless = itertools.chain.from_iterable(itertools.repeat(loader))
                self._aajr_held_out = itertools.islice(endless, step % len(loader), None)
            inputs = next(self._aajr_held_out)
        with self.accelerator.autocast():
            objective.measure(_entries(objective, self._prepare_inputs(inputs)), step=step)

    def _aajr_count(self, batches: Sequence[Any]) -> Counts | None:
        return None

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **options: Any
    ) -> tuple[Any, Any, Any]:
        """As without the mixin."""
        return super().prediction_step(model, _without_attack_columns(inputs), *arguments, **options)

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Adds the means since the last log of a training loss."""
        if "loss" in logs:
            across = self._aajr_across()
            logs = {**logs, **self._aajr_meter.taken(self.accelerator, across)}
        super().log(logs, *arguments, **options)

    def _set_signature_columns_if_needed(self) -> None:
        """Keeps the columns that the attack needs in the data."""
        super()._set_signature_columns_if_needed()
        kept = self._signature_columns
        self._signature_columns = [*kept, *(name for name in ATTACK_COLUMNS if name not in kept)]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Beside them λ and γ where they are found or moved; all processes call this."""
        super()._save_optimizer_and_scheduler(output_dir)
        state = self._aajr_of(self.model_wrapped).state_dict()
        if self.args.should_save:
            files.write_text(Path(output_dir) / STATE, files.sealed(state, allow_nan=True))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """And λ and γ."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        objective, path = self._aajr_of(self.model_wrapped), Path(checkpoint) / STATE
        if path.exists():
            objective.load_state_dict(files.read_object(path))
        elif objective.multiplier.is_kept:  # of another trainer, or one with save_only_model
            warnings.warn(
                f"There is no {path}: the weight of the penalty and gamma begin anew.", stacklevel=2
            )

    def _aajr_logged(self, objective: Objective, terms: Terms, step: int) -> None:
        scheduled = objective.scheduled(step)
        settings = {"radius": scheduled.radius, **objective.multiplier.facts}
        if scheduled.weight or self.aajr_config.penalty.every == 1:  # 0 between the steps of a penalty
            settings["penalty_weight"] = scheduled.weight
        if scheduled.gamma is not None:
            settings["gamma"] = scheduled.gamma
        self._aajr_meter.add(step, terms.parts, settings)


class AAJRTrainerMixin(_Mixin):
    """Before a trainer of a causal language model: its loss becomes the objective of the method.

    Args:
        objective: attack, penalty and their weights; schedules count optimizer steps.
        policy: how to call the model, where :func:`~aajr_kernels.training.policy_of` does not know.
        arguments, options: of the trainer.

    Means are over the tokens of the whole optimizer step: all its micro-batches, and with
    ``average_tokens_across_devices`` (the default) all its processes. Evaluation has the trainer's own loss. λ of a
    ``Constraint(follow="validation")`` follows a batch of ``eval_dataset`` in every step with a penalty.

    Raises:
        TypeError, ValueError: a model, a wrapper or a training argument that does not go with it.
    """

    # Trainer then does not divide by the number of micro-batches
    loss_is_scaled_for_ga: bool | None = True

    def _aajr_check_loss(self) -> None:
        checks.replaceable_loss(self, AAJRTrainerMixin)
        if self._aajr_follows_validation():
            checks.one_evaluation_dataset(self)

    def _aajr_check_model(self, model: nn.Module) -> None:
        checks.language_model(model, self.aajr_config)

    def _aajr_across(self) -> bool:
        return bool(self.args.average_tokens_across_devices)

    def _aajr_count(self, batches: Sequence[Any]) -> Counts | None:
        if not batches:
            return None
        objective = self._aajr_of(self.model_wrapped)
        ours = [_entries(objective, batch) for batch in batches]
        self._aajr_counted = list(zip(batches, ours))
        return objective.counts(ours, across=self._aajr_across())

    def _aajr_prepared(self, objective: Objective, inputs: Mapping[str, Any], part: int) -> Prepared:
        """A micro-batch, as it was counted if its tensors are still the same: what was read of it is known."""
        for batch, ready in self._aajr_counted[part : part + 1]:
            if batch.keys() == inputs.keys() and all(inputs[name] is value for name, value in batch.items()):
                return ready
        return _entries(objective, inputs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The objective of a micro-batch in training, the trainer's loss in evaluation.

        Raises:
            ValueError: `return_outputs` in training: the objective is made of several outputs.
        """
        if not self._aajr_training(model):
            more = dict(return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
            return super().compute_loss(model, _without_attack_columns(inputs), **more)
        if return_outputs:
            raise ValueError(
                "return_outputs must be False in training: the objective is made of several outputs of the model. "
                "Call compute_loss in eval mode or under torch.no_grad() for the trainer's loss and output."
            )
        objective = self._aajr_of(model)
        step, part, known = self._aajr_place()
        with self.accelerator.autocast():
            terms = objective(
                self._aajr_prepared(objective, inputs, part),
                counts=self._aajr_counts if known else None,
                step=step,
                part=part,
                on_report=self._aajr_meter.report,
            )
        self._aajr_logged(objective, terms, step)
        return terms.total * checks.loss_divisor(self, num_items_in_batch)


class AAJRPenaltyMixin(_Mixin):
    """Before a trainer with a loss of its own: the penalty along the ascent is added to it.

    The trainer's ``compute_loss`` is called as it is; nothing of it is replaced. A subclass says in
    :meth:`aajr_batch` which tokens of the trainer's inputs the policy chose, and may give weights to the rows: with
    advantages the adversary maximises the surrogate loss −A log π.

    Means are over the tokens of a micro-batch; micro-batches and processes have equal weights, as in the trainer's
    ``loss / gradient_accumulation_steps``. The weights of the losses in `objective` are not read.
    """

    def _aajr_check_loss(self) -> None:
        self.aajr_config.penalty.check_alone()
        if self._aajr_follows_validation():
            raise ValueError(
                "follow must be 'training' with AAJRPenaltyMixin, got 'validation': evaluation data do not say where "
                "the policy acted."
            )
        if type(self).aajr_batch is AAJRPenaltyMixin.aajr_batch and not _is_grpo(self):
            raise TypeError(
                f"{type(self).__name__} must define aajr_batch(inputs), which says where in the trainer's inputs the "
                "tokens and labels are: only those of GRPO are known."
            )

    def aajr_batch(self, inputs: Mapping[str, Any]) -> tuple[Mapping[str, Any], Tensor | None]:
        """Tokens, mask and labels of a micro-batch, and weights ``[B]`` of its rows or None; here of TRL's GRPO.

        In dialogues of a :class:`~.dialogue.DialogueRollout` the turns of others may be attacked.
        """
        if isinstance(getattr(self, "rollout_func", None), DialogueRollout):
            return dialogue_batch(inputs)
        return grpo_batch(inputs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The trainer's loss, in training with the penalty on top."""
        more = dict(return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        if not self._aajr_training(model):
            return super().compute_loss(model, inputs, **more)
        objective = self._aajr_of(model)
        batch, weights = self.aajr_batch(inputs)
        ours = objective.prepared(batch)
        step, part, _ = self._aajr_place()
        objective.scheduled(step)  # over the processes, outside of the forward
        plain = objective
        if (
            objective.module is not model
        ):  # one forward of the wrapper for both; inside it the module is plain
            part = part * objective.group.size() + objective.group.rank()  # other draws on every process
            plain = copy.copy(objective)
            plain.model = objective.module
        original = super().compute_loss

        def work() -> tuple[Any, Tensor, dict[str, Tensor]]:
            loss = original(objective.module, inputs, **more)
            with self.accelerator.autocast():
                options: dict[str, Any] = dict(row_weights=weights, on_report=self._aajr_meter.report)
                terms = plain.penalty(ours, step=step, part=part, **options)
            return loss, terms.total, terms.parts

        loss, total, parts = work() if objective.module is model else inside(model, work)()
        # a mean over micro-batches: Trainer divides by their number, unless the trainer says that it did so itself
        number = max(self._aajr_parts, 1)
        shares = {name: value if name.endswith("_max") else value / number for name, value in parts.items()}
        self._aajr_logged(objective, Terms(total, shares), step)
        share = total * checks.loss_divisor(self, num_items_in_batch) / number
        if return_outputs:
            return loss[0] + share, loss[1]
        return loss + share


def _is_grpo(trainer: Any) -> bool:
    return any(cls.__name__ == "GRPOTrainer" for cls in type(trainer).__mro__)


def _without_attack_columns(inputs: Any) -> Any:
    if not isinstance(inputs, Mapping):  # trainers that generate have lists
        return inputs
    return {name: value for name, value in inputs.items() if name not in ATTACK_COLUMNS}


def _entries(objective: Objective, inputs: Mapping[str, Any]) -> Prepared:
    """A micro-batch with aligned labels, whichever way a collator gives them.

    Raises:
        ValueError: it has no labels.
    """
    if inputs.get("shift_labels") is not None:  # of collators without padding: targets already
        entries = {name: value for name, value in inputs.items() if name != "shift_labels"}
        return prepared({**entries, "labels": inputs["shift_labels"]}, objective.device, False)
    if inputs.get("labels") is None:
        raise ValueError(
            f"inputs must hold labels, got {', '.join(map(str, inputs)) or 'nothing'}: use a data collator that makes "
            "them, such as DataCollatorForLanguageModeling(tokenizer, mlm=False)."
        )
    return objective.prepared(inputs)
