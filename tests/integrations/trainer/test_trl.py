"""The mixins before trainers of TRL: supervised fine-tuning, and the penalty beside a policy gradient."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from assertions import assert_exact_gradients
from integrations.trainer.trainers import (
    CONFIG,
    Rows,
    arguments,
    collate,
    gpt2,
    quiet,
    recorder,
    rows_of,
    trained,
)
from torch import nn

from aajr_kernels.integrations.trainer import AAJRPenaltyMixin, AAJRTrainerMixin
from aajr_kernels.training import Constraint, Objective, ObjectiveConfig, Penalty

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*_checkpointing.* is deprecated:FutureWarning"),  # asked for by TRL
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what datasets and trl import
]


# -- a loss of another kind -------------------------------------------------------------------------------------------


class Extra(AAJRPenaltyMixin, transformers.Trainer):
    """The loss of a model, label smoothing included, and the penalty."""

    def aajr_batch(self, inputs: Any) -> Any:
        return inputs, None


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_penalty_is_added_to_the_loss_of_the_trainer(accumulate, tmp_path, record_property):
    options = dict(
        gradient_accumulation_steps=accumulate,
        per_device_train_batch_size=4 // accumulate,
        label_smoothing_factor=0.1,
        train_sampling_strategy="sequential",
    )
    plain, (without,) = trained(transformers.Trainer, gpt2().double(), tmp_path, **options)
    both, (actual,) = trained(Extra, gpt2().double(), tmp_path, objective=CONFIG, **options)
    model, rows, size = gpt2().double(), list(Rows()), 4 // accumulate
    objective = Objective(model, CONFIG)
    micro = [collate(rows[i : i + size]) for i in range(0, 4, size)]
    penalties = [objective.penalty(batch, part=n) for n, batch in enumerate(micro)]
    sum(terms.total / accumulate for terms in penalties).backward()
    expected = {name: without[name] + p.grad for name, p in model.named_parameters()}
    record_property("error", assert_exact_gradients(actual, expected, tolerance=1e-11))
    (row,), (before,) = rows_of(both), rows_of(plain)
    penalty = sum(float(terms.parts["penalty"]) for terms in penalties) / accumulate
    assert row["penalty"] == pytest.approx(penalty, rel=1e-10)
    assert row["loss"] == pytest.approx(before["loss"] + CONFIG.penalty.weight * penalty, rel=1e-6)
    assert "adversarial_loss" not in row and row["attack_worst"] > row["attack_start"]


def test_weights_of_rows_turn_the_attack_around():
    model, batch = gpt2().double(), collate(list(Rows(2)))
    objective = Objective(model, CONFIG)
    up, down = (
        objective.penalty(batch, row_weights=torch.tensor(w).double()).parts for w in ([1.0, 1.0], [-1.0] * 2)
    )
    assert up["attack_start"] == -down["attack_start"]
    assert up["attack_worst"] > up["attack_start"] and down["attack_worst"] > down["attack_start"]
    nothing = objective.penalty({**batch, "labels": torch.full_like(batch["labels"], -100)})
    assert nothing.total == 0 and not nothing.total.requires_grad and nothing.parts == {}


def test_a_trainer_whose_batches_are_not_known_is_refused(tmp_path):
    class Unknown(AAJRPenaltyMixin, transformers.Trainer):
        pass

    with pytest.raises(TypeError, match=r"Unknown must define aajr_batch\(inputs\)"):
        Unknown(gpt2(), arguments(tmp_path), objective=CONFIG)


def test_a_constraint_on_evaluation_data_is_refused_where_they_have_no_labels(tmp_path):
    config = dataclasses.replace(CONFIG, penalty=Constraint(gamma=0.1, weight=1.0, follow="validation"))
    with pytest.raises(ValueError, match="follow must be 'training' with AAJRPenaltyMixin, got 'validation'"):
        Extra(gpt2(), arguments(tmp_path), objective=config)


# -- TRL --------------------------------------------------------------------------------------------------------------


def options_of(folder: Any, **more: Any) -> dict[str, Any]:
    base = dict(
        output_dir=str(folder),
        max_steps=1,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        dataloader_pin_memory=False,
    )
    return base | more


def llama() -> nn.Module:
    torch.manual_seed(4)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    ends = dict(pad_token_id=0, eos_token_id=1, bos_token_id=None)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=259, **sizes, **ends))


def supervised(folder: Any, mixed: bool, accumulate: int = 1, **more: Any) -> Any:
    """A trainer of TRL on rows of which the end is learnt, and the gradients of its steps."""
    import datasets
    import trl

    rows = [{**row, "completion_mask": [0, 0] + [1] * (len(row["input_ids"]) - 2)} for row in Rows(4)]
    args = trl.SFTConfig(
        **options_of(
            folder,
            per_device_train_batch_size=4 // accumulate,
            gradient_accumulation_steps=accumulate,
            max_length=None,
            completion_only_loss=True,
            **more,
        )
    )
    bases = (AAJRTrainerMixin, trl.SFTTrainer) if mixed else (trl.SFTTrainer,)
    seen = recorder()
    trainer = quiet(
        type("Robust", bases, {}),
        llama(),
        args,
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.ByT5Tokenizer(extra_ids=0),
        callbacks=[seen],
        **(dict(objective=CONFIG) if mixed else {}),
    )
    return trainer, seen.gradients


@pytest.mark.integration("TRL: SFTTrainer", "AAJR as its loss", "the step by hand, float32")
@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 4])
def test_sft_is_trained_on_the_objective(accumulate, tmp_path, record_property):
    pytest.importorskip("trl")
    trainer, gradients = supervised(tmp_path, True, accumulate)
    model = llama().train()  # TRL patches its own
    assert trainer.args.gradient_checkpointing  # TRL's default
    trainer.train()
    ids = [row["input_ids"] for row in Rows(4)]
    batch = collate([{"input_ids": row} for row in ids])
    batch["labels"][:, :2] = -100  # the loss is on completions
    Objective(model, CONFIG)(batch).total.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    record_property("error", assert_exact_gradients(gradients[0], expected, tolerance=1e-6))
    metrics = trainer.evaluate()
    plain, _ = supervised(tmp_path, False)
    plain.model.load_state_dict(trainer.model.state_dict())
    same = plain.evaluate()
    names = ("eval_loss", "eval_mean_token_accuracy", "eval_entropy")
    assert {n: metrics[n] for n in names} == pytest.approx({n: same[n] for n in names}, rel=1e-6)


@pytest.mark.slow
def test_losses_of_trl_that_would_be_lost(tmp_path):
    trl = pytest.importorskip("trl")
    with pytest.raises(ValueError, match=r"(loss_type must be 'nll'|compute_loss_func must be None)"):
        supervised(tmp_path, True, loss_type="dft")
    with pytest.raises(TypeError, match="got that of GRPOTrainer.*use AAJRPenaltyMixin"):
        grpo(tmp_path, (AAJRTrainerMixin, trl.GRPOTrainer))


def grpo(folder: Any, bases: tuple[type, ...], config: ObjectiveConfig | None = CONFIG) -> Any:
    import datasets
    import trl

    args = trl.GRPOConfig(
        **options_of(
            folder,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            num_generations=4,
            max_completion_length=6,
        )
    )
    vowels = lambda completions, **rest: [
        float(sum(letter in "aeiou" for letter in t)) + len(t) for t in completions
    ]
    seen = recorder()
    trainer = quiet(
        type("Robust", bases, {"seen": []}),
        llama().double(),
        vowels,
        args,
        train_dataset=datasets.Dataset.from_list([{"prompt": "abcdef"[i:] + "xyz"} for i in range(4)]),
        processing_class=transformers.ByT5Tokenizer(extra_ids=0),
        callbacks=[seen],
        **({} if config is None else dict(objective=config)),
    )
    return trainer, seen.gradients


@pytest.mark.integration("TRL: GRPOTrainer", "the penalty beside its loss", "the sum by hand, float64")
@pytest.mark.slow
def test_grpo_keeps_its_loss_and_gets_the_penalty(tmp_path, record_property):
    """The gradient is that of GRPO alone, on the same completions, plus that of the penalty by itself."""
    trl = pytest.importorskip("trl")

    class Looking(AAJRPenaltyMixin):
        def aajr_batch(self, inputs):
            actual = super().aajr_batch(inputs)
            self.seen.append(actual)
            return actual

    config = ObjectiveConfig(attack=CONFIG.attack, penalty=Penalty(weight=0.5))
    trainer, gradients = grpo(tmp_path, (Looking, trl.GRPOTrainer), config)
    trainer.train()
    plain, without = grpo(tmp_path, (trl.GRPOTrainer,), None)
    plain.train()
    model = llama().double().train()
    objective = Objective(model, config)
    assert len(trainer.seen) == 2 and all(weights.abs().max() > 0 for _, weights in trainer.seen)
    for part, (batch, weights) in enumerate(trainer.seen):
        (objective.penalty(batch, row_weights=weights, part=part).total / 2).backward()
    assert any(p.grad.abs().max() > 1e-6 for p in model.parameters())
    expected = {name: without[0][name] + p.grad for name, p in model.named_parameters()}
    record_property("error", assert_exact_gradients(gradients[0], expected, tolerance=1e-6))
    (row,) = rows_of(trainer)
    (alone,) = rows_of(plain)
    assert row["reward"] == alone["reward"] and row["entropy"] == pytest.approx(alone["entropy"])
    assert row["loss"] == pytest.approx(alone["loss"] + 0.5 * row["penalty"], rel=1e-5)
