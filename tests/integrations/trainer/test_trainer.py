"""The objective in ``transformers.Trainer``: its gradient, accumulation, precision, checkpointing, resumption, logs."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from functools import partial

import pytest
import torch
from assertions import assert_exact_gradients
from integrations.trainer.trainers import (
    ATTACK,
    CONFIG,
    Rows,
    arguments,
    collate,
    exact_objective,
    gpt2,
    llama,
    quiet,
    rows_of,
    trained,
)

import aajr_kernels as aajr
from aajr_kernels.method.batch import Prepared
from aajr_kernels.training import (
    Attack,
    Constraint,
    Diagnostics,
    Linear,
    Objective,
    ObjectiveConfig,
    Penalty,
    Policy,
    Share,
)

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from aajr_kernels.integrations.trainer import AAJRTrainer, AAJRTrainerMixin  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # read by peft

ours = partial(trained, AAJRTrainer, objective=CONFIG)
whole = dict(per_device_train_batch_size=4)


# -- the gradient -----------------------------------------------------------------------------------------------------


@pytest.mark.integration("Trainer", "one process, float64", "float64 oracle, written-out layers")
def test_the_gradient_is_that_of_the_oracle(tmp_path, record_property):
    model = gpt2().double()
    batch = collate(list(Rows()))
    _, (actual,) = ours(copy.deepcopy(model), tmp_path, **whole)
    seen = []
    objective = Objective(model, CONFIG)
    objective._diagnose = lambda diagnostics, step, on_report, trajectory, *more: seen.append(trajectory)
    with_look = dataclasses.replace(CONFIG, diagnostics=Diagnostics(1))
    objective.config = with_look
    objective(batch, on_report=seen.append)
    (trajectory,) = seen
    worst = trajectory.worst_steps
    direction = trajectory.directions[worst, torch.arange(len(worst))]
    _, exact = exact_objective(model, batch, trajectory.worst, direction, CONFIG)
    record_property("error", assert_exact_gradients(actual, exact))


@pytest.mark.integration("Trainer", "accumulation of unequal micro-batches", "the step in one batch")
@pytest.mark.slow
@pytest.mark.parametrize(("build", "tolerance"), [(lambda: gpt2().double(), 1e-11), (llama, 1e-6)])
def test_micro_batches_of_unequal_lengths_add_up_to_one_batch(build, tolerance, tmp_path, record_property):
    data = Rows()
    one, (expected,) = ours(build(), tmp_path, data=data, **whole)
    for options in (
        dict(gradient_accumulation_steps=4),
        dict(gradient_accumulation_steps=2, per_device_train_batch_size=2),
    ):
        many, (actual,) = ours(build(), tmp_path, data=data, **options)
        record_property("error", assert_exact_gradients(actual, expected, tolerance=tolerance))
        (a,), (b,) = rows_of(one), rows_of(many)
        for name in ("penalty", "adversarial_loss", "clean_loss", "attack_start", "attack_worst", "q_max"):
            assert b[name] == pytest.approx(a[name], rel=10 * tolerance), name
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)  # Trainer adds it up in float32
        assert b["active"] == pytest.approx(1.0) and a["active"] == 1.0


@pytest.mark.slow
def test_the_last_step_of_an_epoch_may_have_fewer_micro_batches(tmp_path):
    """Three rows, two at a time: the second step has one."""
    data = Rows(3)
    options = dict(data=data, max_steps=2, learning_rate=0.0)
    _, actual = ours(gpt2().double(), tmp_path, gradient_accumulation_steps=2, **options)
    _, expected = ours(gpt2().double(), tmp_path, per_device_train_batch_size=2, **options)
    for a, b in zip(actual, expected):
        assert_exact_gradients(a, b, tolerance=1e-11)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_without_a_radius_it_is_the_trainer(accumulate, tmp_path):
    config = ObjectiveConfig(attack=Attack(radius=0.0))
    options = dict(gradient_accumulation_steps=accumulate, per_device_train_batch_size=2, data=Rows(6))
    plain, (expected,) = trained(transformers.Trainer, llama().double(), tmp_path, **options)
    same, (actual,) = trained(AAJRTrainer, llama().double(), tmp_path, objective=config, **options)
    # transformers computes norms and the cross-entropy in float32
    assert_exact_gradients(actual, expected, tolerance=1e-6)
    assert rows_of(same)[0]["loss"] == pytest.approx(rows_of(plain)[0]["loss"], rel=1e-6)
    assert rows_of(same)[0]["grad_norm"] == pytest.approx(rows_of(plain)[0]["grad_norm"], rel=1e-6)


def test_a_micro_batch_that_was_counted_is_not_prepared_again(tmp_path, monkeypatch):
    prepare, seen = Objective.prepared, []

    def counting(self, batch):
        seen.append(isinstance(batch, Prepared))
        return prepare(self, batch)

    monkeypatch.setattr(Objective, "prepared", counting)
    ours(gpt2(), tmp_path, gradient_accumulation_steps=2, max_steps=2)
    assert seen.count(False) == 4


def test_labels_that_are_targets_already(tmp_path):
    """A collator without padding: one row, ``shift_labels``, positions that begin again."""
    model, data = gpt2().double(), [list(row["input_ids"]) for row in Rows(2)]
    joined = lambda lists: torch.tensor([[i for values in lists for i in values]])
    targets = joined([[*ids[1:], -100] for ids in data])
    flat = {
        "input_ids": joined(data),
        "position_ids": joined([range(len(ids)) for ids in data]),
        "labels": targets,
        "shift_labels": targets,
    }
    # one step: the worst point of a row is then the same for both, whose rows are not
    config = dataclasses.replace(CONFIG, attack=dataclasses.replace(ATTACK, steps=1))
    trainer = quiet(AAJRTrainer, model, arguments(tmp_path), objective=config)
    actual = trainer.compute_loss(model.train(), flat)
    expected = Objective(model, config)(collate(list(Rows(2)))).total
    assert actual.item() == pytest.approx(expected.item(), rel=1e-10)


# -- precision and memory ---------------------------------------------------------------------------------------------


def test_mixed_precision_of_accelerate(tmp_path):
    model, dtypes = llama(), []
    layer = model.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    trainer, (actual,) = ours(model, tmp_path, bf16=True, data=Rows(1))
    assert set(dtypes) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    twin = llama().train()
    with torch.autocast("cpu", torch.bfloat16):
        total = Objective(twin, CONFIG)(collate(list(Rows(1)))).total
    total.backward()
    for name, p in twin.named_parameters():
        assert torch.equal(actual[name], p.grad), name
    _, (wide,) = ours(llama(), tmp_path, data=Rows(1))
    # eight bits of mantissa through a dozen products
    assert_exact_gradients(actual, wide, tolerance=0.1)
    assert dtypes and not torch.equal(actual["lm_head.weight"], wide["lm_head.weight"])
    assert rows_of(trainer)[0]["penalty"] > 0


@pytest.mark.integration(
    "Trainer, activation checkpointing", "`gradient_checkpointing_enable`", "the step without"
)
@pytest.mark.slow
@pytest.mark.parametrize("by_hand", [True, False])
def test_activation_checkpointing(by_hand, tmp_path, record_property):
    calls = {}

    def run(checkpointed):
        model = gpt2(dropout=0.1).double()
        seen = calls.setdefault(checkpointed, [])
        model.transformer.h[0].ln_1.register_forward_hook(lambda *_: seen.append(1))
        if checkpointed and by_hand:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # newer versions have another name
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return ours(model, tmp_path, **whole, gradient_checkpointing=checkpointed and not by_hand)[1]

    (expected,), (actual,) = run(False), run(True)
    record_property("error", assert_exact_gradients(actual, expected, tolerance=1e-12))
    assert len(calls[True]) > len(calls[False])  # layers ran again in the backward


# -- going on from a checkpoint ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("followed", [None, "training", "validation"])
def test_a_resumed_training_goes_on_bit_by_bit(followed, tmp_path):
    """With dropout, random starts, shuffling, momentum and accumulation, in the middle of an epoch."""
    attack = dataclasses.replace(ATTACK, init="uniform", restarts=2, radius=Linear(0.2, 0.5, 4))
    penalty = CONFIG.penalty
    if followed is not None:
        penalty = Constraint(gamma=Share(0.5), window=8, rate=0.5, follow=followed)
    options = dict(
        objective=dataclasses.replace(CONFIG, attack=attack, penalty=penalty),
        data=Rows(8),
        gradient_accumulation_steps=2,
        max_steps=6,
        optim="adamw_torch",
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=3,
        eval_dataset=Rows(24),
        per_device_eval_batch_size=5,
    )
    model = gpt2(dropout=0.2)
    trainer, _ = trained(AAJRTrainer, model, tmp_path / "one", **options)
    again = gpt2(dropout=0.2, seed=4)
    resumed, _ = trained(
        AAJRTrainer, again, tmp_path / "two", resume=str(tmp_path / "one" / "checkpoint-3"), **options
    )
    rows = rows_of(trainer)
    assert rows_of(resumed) == rows and [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    if isinstance(penalty, Constraint):  # logged with the next step: λ moved on both sides of the checkpoint
        assert len({row["penalty_weight"] for row in rows}) >= 4 and "violation" in rows[-1]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    other = dataclasses.replace(options["objective"], seed=1)
    different, _ = trained(AAJRTrainer, gpt2(dropout=0.2), tmp_path, **(options | dict(objective=other)))
    assert rows_of(different)[0]["attack_worst"] != rows[0]["attack_worst"]


@pytest.mark.parametrize(("data", "message"), [(None, "got NoneType"), ({"one": Rows(4)}, "got dict")])
def test_held_out_rows_are_one_dataset(data, message, tmp_path):
    config = dataclasses.replace(CONFIG, penalty=Constraint(gamma=0.1, follow="validation"))
    with pytest.raises(ValueError, match=f"eval_dataset must be one dataset with a length .* {message}"):
        ours(gpt2(), tmp_path, objective=config, eval_dataset=data)


# -- what is logged ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_logs_hold_means_of_the_steps_between_them(tmp_path):
    config = dataclasses.replace(
        CONFIG,
        penalty=Penalty(weight=Linear(0.1, 0.4, 4), gamma=0.1),
        diagnostics=Diagnostics(2, smoothness=True),
    )
    options = dict(objective=config, max_steps=4, data=Rows(8), gradient_accumulation_steps=2)
    each, _ = trained(AAJRTrainer, gpt2(), tmp_path, **options)
    pairs, _ = trained(AAJRTrainer, gpt2(), tmp_path, logging_steps=2, **options)
    single, double = rows_of(each), rows_of(pairs)
    names = {"penalty", "adversarial_loss", "clean_loss", "attack_start", "attack_worst", "active", "q_max"}
    settings = {"radius", "penalty_weight", "gamma", "loss", "grad_norm", "learning_rate"}
    for row in single:
        assert names | settings <= row.keys() and 0 < row["active"] < 1.000001
        assert row["attack_worst"] > row["attack_start"] and row["penalty"] <= row["q_max"]
    assert [row["penalty_weight"] for row in single] == pytest.approx([0.1, 0.175, 0.25, 0.325])
    for row, two in zip(double, (single[:2], single[2:])):
        for name in names - {"q_max"}:
            assert row[name] == pytest.approx((two[0][name] + two[1][name]) / 2, rel=1e-6), name
        assert row["q_max"] == max(two[0]["q_max"], two[1]["q_max"])
        assert row["penalty_weight"] == two[1]["penalty_weight"]
    assert all(("stability/kappa" in row) == (row["step"] % 2 == 0) for row in single)
    reported = {"stability/smoothness", "stability/hinge_active", "stability/violated_fraction"}
    assert reported <= double[0].keys()


@pytest.mark.slow
def test_diagnostics_do_not_change_the_training(tmp_path):
    ends = []
    for diagnostics in (None, Diagnostics(1)):
        model = gpt2(dropout=0.3)
        ours(model, tmp_path, objective=dataclasses.replace(CONFIG, diagnostics=diagnostics), max_steps=3)
        ends.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*ends))


# -- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_only", [True, False])
def test_evaluation_is_the_trainers(loss_only, tmp_path):
    model, data = gpt2(dropout=0.2), Rows(3, attack_mask=lambda ids: [1] * len(ids))
    actual = []
    for cls, more in ((transformers.Trainer, {}), (AAJRTrainer, dict(objective=CONFIG))):
        args = arguments(tmp_path, prediction_loss_only=loss_only, per_device_eval_batch_size=2)
        trainer = quiet(cls, model, args, eval_dataset=data, data_collator=collate, **more)
        metrics, predicted = trainer.evaluate(), trainer.predict(data)
        actual.append((metrics["eval_loss"], predicted.predictions, predicted.metrics["test_loss"]))
    (loss, logits, test_loss), (our_loss, our_logits, our_test_loss) = actual
    assert our_loss == loss and our_test_loss == test_loss
    assert logits is None if loss_only else (our_logits == logits).all()
    assert (our_logits is None) == loss_only


@pytest.mark.slow
def test_evaluation_meanwhile_does_not_change_the_training(tmp_path):
    ends = []
    for options in ({}, dict(eval_strategy="steps", eval_steps=1, eval_dataset=Rows(3))):
        model = gpt2()
        trainer, _ = ours(model, tmp_path, max_steps=3, **options)
        ends.append(list(model.parameters()))
    assert len([row for row in trainer.state.log_history if "eval_loss" in row]) == 3
    assert all(torch.equal(a, b) for a, b in zip(*ends))


# -- data -------------------------------------------------------------------------------------------------------------


def test_what_may_be_attacked_reaches_the_attack(tmp_path):
    """Trainer drops columns that the model's forward does not name."""
    closed = Rows(4, attack_mask=lambda ids: [0] * (len(ids) - 1) + [1])
    _, (actual,) = ours(gpt2(), tmp_path, data=closed, **whole)
    _, (open_,) = ours(gpt2(), tmp_path, data=Rows(4), **whole)
    name = "transformer.wte.weight"
    assert not torch.equal(actual[name], open_[name])
    options = dict(objective=CONFIG, train_dataset=closed, data_collator=collate)
    trainer = quiet(AAJRTrainer, gpt2(), arguments(tmp_path), **options)
    batch = next(iter(trainer.get_train_dataloader()))
    assert {"attack_mask", "input_ids", "labels", "attention_mask"} <= batch.keys()


@pytest.mark.slow
def test_adapters_and_a_policy_of_ones_own(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted():
        torch.manual_seed(2)
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        return peft.get_peft_model(llama(), lora)

    _, (actual,) = ours(adapted(), tmp_path, **whole)
    assert actual and all("lora_" in name for name in actual)
    model = adapted()
    wrapped = Policy(lambda x, **inputs: model(inputs_embeds=x, **inputs), model.get_input_embeddings())
    _, (other,) = ours(model, tmp_path, policy=wrapped, **whole)
    assert_exact_gradients(other, actual, tolerance=1e-5)


# -- what does not go with it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(label_smoothing_factor=0.1), "label_smoothing_factor must be 0, got 0.1"),
        (
            dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
            "use_reentrant must be False",
        ),
    ],
)
def test_arguments_that_do_not_go_with_it(options, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        AAJRTrainer(gpt2(), arguments(tmp_path, **options), objective=CONFIG)
    assert str(caught.value).count(". ") <= 1


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("_n_gpu", 2, "one device per process, got 2"),
        ("torch_compile", True, "torch_compile must be False"),
        ("use_liger_kernel", True, "use_liger_kernel must be False"),
        ("parallelism_config", object(), "parallelism_config must be None"),
    ],
)
def test_arguments_that_need_what_is_not_here(attribute, value, message, tmp_path):
    from aajr_kernels.integrations.trainer import checks

    trainer = quiet(AAJRTrainer, gpt2(), arguments(tmp_path), objective=CONFIG)
    setattr(trainer.args, attribute, value)
    with pytest.raises(ValueError, match=message):
        checks.arguments(trainer)


def test_float16_deepspeed_and_fsdp(tmp_path, monkeypatch):
    from aajr_kernels.integrations.trainer import checks

    trainer = quiet(AAJRTrainer, gpt2(), arguments(tmp_path), objective=CONFIG)
    for name in ("deepspeed", "fsdp"):
        monkeypatch.setattr(trainer, f"is_{name}_enabled", True)
        with pytest.raises(ValueError, match=f"{name} must be off"):
            checks.arguments(trainer)
        monkeypatch.setattr(trainer, f"is_{name}_enabled", False)
    monkeypatch.setattr(type(trainer.accelerator), "mixed_precision", "fp16")
    with pytest.raises(ValueError, match="got 'fp16'.*set bf16=True"):
        checks.arguments(trainer)


class Elsewhere(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        raise AssertionError


class Mixed(AAJRTrainerMixin, Elsewhere):
    pass


def test_a_loss_that_would_be_lost(tmp_path):
    with pytest.raises(
        TypeError, match="that of Elsewhere, which the objective would replace: use AAJRPenalty"
    ):
        Mixed(gpt2(), arguments(tmp_path), objective=CONFIG)
    with pytest.raises(ValueError, match="compute_loss_func must be None"):
        AAJRTrainer(gpt2(), arguments(tmp_path), objective=CONFIG, compute_loss_func=lambda *a, **k: None)
    with pytest.raises(TypeError, match="objective must be an ObjectiveConfig, got Penalty"):
        AAJRTrainer(gpt2(), arguments(tmp_path), objective=Penalty())
    with pytest.raises(TypeError, match="attack must be an Attack, got dict"):
        ObjectiveConfig(attack={"radius": 1.0})
    trainer = quiet(AAJRTrainer, gpt2(), arguments(tmp_path), objective=CONFIG)
    with pytest.raises(ValueError, match="return_outputs must be False in training"):
        trainer.compute_loss(trainer.model.train(), collate(list(Rows())), return_outputs=True)
    with pytest.raises(ValueError, match="inputs must hold labels, got input_ids"):
        trainer.compute_loss(trainer.model, {"input_ids": torch.ones(1, 4).long()})


def test_models_that_do_not_go_with_it(tmp_path):
    small = dict(
        vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    args = arguments(tmp_path)
    bert = transformers.BertConfig(**small, max_position_embeddings=32)
    sequence = transformers.BertForSequenceClassification(bert)
    with pytest.raises(TypeError, match="must be a causal or masked language model, got BertForSequence"):
        AAJRTrainer(sequence, args, objective=CONFIG)
    with pytest.raises(ValueError, match="shift_labels must be False for BertForMaskedLM"):
        AAJRTrainer(transformers.BertForMaskedLM(bert), args, objective=CONFIG)
    t5 = transformers.T5Config(vocab_size=31, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(TypeError, match="got T5ForConditionalGeneration: give policy="):
        AAJRTrainer(transformers.T5ForConditionalGeneration(t5), args, objective=CONFIG)
    mixtral = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            **small, num_key_value_heads=1, num_local_experts=2, output_router_logits=True
        )
    )
    with pytest.raises(ValueError, match="output_router_logits must be False"):
        AAJRTrainer(mixtral, args, objective=CONFIG)


def test_the_trainer_is_made_when_it_is_asked_for():
    from aajr_kernels.integrations import trainer

    assert trainer.AAJRTrainer is AAJRTrainer and issubclass(AAJRTrainer, transformers.Trainer)
    assert AAJRTrainer.__module__ == trainer.__name__ and aajr.integrations.trainer is trainer
    with pytest.raises(AttributeError, match="has no attribute 'Other'"):
        trainer.Other
