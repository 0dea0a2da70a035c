"""Tiny language models, rows of unequal length and short calls, for tests of trainers."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import oracle_losses
import torch
from integrations.transformers.subjects import tiny
from torch import Tensor, nn

from aajr_kernels.testing import oracle
from aajr_kernels.training import Attack, ObjectiveConfig, Penalty

ATTACK = Attack(radius=0.5, relative=False, steps=2, step_size=0.3, scope="token")
CONFIG = ObjectiveConfig(
    attack=ATTACK, penalty=Penalty(weight=0.2, steps="worst"), adversarial_weight=0.7, clean_weight=0.3
)
LENGTHS = (9, 4, 7, 6, 5, 8, 3, 9)


def gpt2(dropout: float = 0.0, seed: int = 3) -> nn.Module:
    """Whose norms compute in the dtype they are given, so that float64 is float64."""
    import transformers

    torch.manual_seed(seed)
    still = dict(embd_pdrop=dropout, attn_pdrop=dropout, resid_pdrop=dropout)
    config = transformers.GPT2Config(
        vocab_size=31, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0, **still
    )
    return transformers.GPT2LMHeadModel(config)


def adapted_gpt2() -> nn.Module:
    """With LoRA."""
    import peft

    model = gpt2()
    torch.manual_seed(2)
    lora = dict(target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, **lora))


def llama() -> nn.Module:
    return tiny("llama")


class Rows(torch.utils.data.Dataset):
    """Token ids of different lengths, the same for every call."""

    def __init__(self, count: int = 4, vocabulary: int = 31, **columns: Any) -> None:
        generator = torch.Generator().manual_seed(5)
        draw = lambda n: torch.randint(1, vocabulary, (n,), generator=generator).tolist()
        self.rows = [{"input_ids": draw(LENGTHS[i % len(LENGTHS)])} for i in range(count)]
        for name, value in columns.items():
            for row in self.rows:
                row[name] = value(row["input_ids"])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Padded on the right to the longest; the first token of a row, which nothing predicts, has no label."""
    length = max(len(row["input_ids"]) for row in rows)
    pad = lambda values, filler: [*values, *[filler] * (length - len(values))]
    batch = {
        "input_ids": [pad(row["input_ids"], 0) for row in rows],
        "attention_mask": [pad([1] * len(row["input_ids"]), 0) for row in rows],
        "labels": [pad([-100, *row["input_ids"][1:]], -100) for row in rows],
    }
    for name in ("attack_mask", "agents"):
        if name in rows[0]:
            batch[name] = [pad(row[name], 0) for row in rows]
    return {name: torch.tensor(values) for name, values in batch.items()}


def arguments(folder: Any, **options: Any) -> Any:
    """Of a training without clipping, decay or schedule, by plain gradient descent."""
    import transformers

    base = dict(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        max_steps=1,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=11,
        dataloader_pin_memory=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # names that newer versions of transformers replace
        return transformers.TrainingArguments(**(base | options))


def recorder() -> Any:
    """A callback that keeps the gradients of every step before the optimizer sees them."""
    import transformers

    class Recorder(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.gradients: list[dict[str, Tensor | None]] = []

        def on_pre_optimizer_step(self, args, state, control, model=None, **options):
            self.gradients.append(
                {
                    name: None if p.grad is None else getattr(p.grad, "full_tensor", p.grad.clone)()
                    for name, p in model.named_parameters()
                    if p.requires_grad
                }
            )

    return Recorder()


def quiet(cls: type, *positional: Any, **options: Any) -> Any:
    """A trainer that prints nothing."""
    import transformers

    made = cls(*positional, **options)
    made.remove_callback(transformers.PrinterCallback)
    return made


def trained(
    cls: type, model: nn.Module, folder: Any, *, data: Any = None, resume: Any = None, **options: Any
):
    """Train; the trainer, and the gradients of every step."""
    names = ("objective", "policy", "callbacks", "eval_dataset", "compute_metrics", "optimizers")
    own = {name: options.pop(name) for name in names if name in options}
    seen = recorder()
    own["callbacks"] = [*own.get("callbacks", ()), seen]
    trainer = quiet(
        cls,
        model,
        arguments(folder, **options),
        train_dataset=Rows() if data is None else data,
        data_collator=collate,
        **own,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, seen.gradients


def rows_of(trainer: Any) -> list[dict[str, float]]:
    """The logged steps."""
    return [row for row in trainer.state.log_history if "loss" in row]


def exact_objective(
    model: nn.Module, batch: dict[str, Tensor], point: Tensor, direction: Tensor, config: Any
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The objective at a point of an attack and all gradients, by the oracle: nothing of ours but the point.

    Args:
        model: in float64; parameters that require a gradient have one here.
        point: where the loss is largest, ``[B, N, C]``; direction: the way that led there.
    """
    twin = copy.deepcopy(model).eval()
    parameters = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    mask = batch["attention_mask"]
    labels = torch.cat([batch["labels"][:, 1:], torch.full_like(batch["labels"][:, :1], -100)], 1)
    learnt = (labels != -100) & (mask != 0)
    labels = labels.masked_fill(~learnt, -100).flatten()

    def policy(x: Tensor) -> Tensor:
        return twin(inputs_embeds=x, attention_mask=mask, use_cache=False).logits

    with oracle.oracle_mode():
        x = twin.get_input_embeddings()(batch["input_ids"])
        z, z_tan = oracle.jvp(policy, point + (x - x.detach()), direction.unsqueeze(0))
        q = oracle.metric_values(z, z_tan, config.penalty.metric)
        penalty = oracle.mean_over_units(q, learnt)
        loss = lambda logits: nn.functional.cross_entropy(logits.flatten(0, 1), labels)
        total = config.penalty.weight * penalty + config.adversarial_weight * loss(z)
        if config.clean_weight:
            total = total + config.clean_weight * loss(policy(x))
    return total.detach(), oracle_losses.gradients_of(total, parameters)
