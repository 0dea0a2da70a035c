"""transformers.Trainer with the method's objective; the same arguments, one more.

    python examples/hf_trainer.py
    torchrun --nproc-per-node 2 examples/hf_trainer.py     # DistributedDataParallel

A byte-level Llama of two layers learns this documentation, with an adversary that moves embeddings by 0.3 of a token's
norm. Under an attack that is stronger than the one it was trained with, its loss is lower than that of the same
training without the objective.
"""

from __future__ import annotations

import tempfile

import torch
from text import VOCABULARY, passages
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import aajr_kernels as aajr
from aajr_kernels.integrations.trainer import AAJRTrainer
from aajr_kernels.training import Attack, Diagnostics, Linear, Objective, ObjectiveConfig, Penalty

STEPS = 60
OBJECTIVE = ObjectiveConfig(
    attack=Attack(radius=Linear(0.0, 0.3, STEPS // 3), steps=2),
    penalty=Penalty(),  # λ · penalty begins at a tenth of the loss
    diagnostics=Diagnostics(every=STEPS // 3),
)


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes))


def collate(rows: list[bytes]) -> dict[str, torch.Tensor]:
    """Padded on the right; −100 is not learnt."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def attacked(trained: LlamaForCausalLM, rows: list[bytes]) -> tuple[float, float]:
    """Loss without an attack, and at the worst point of ten steps with restarts."""
    objective = Objective(trained.eval(), OBJECTIVE)
    batch = objective.prepared(collate(rows))
    with torch.no_grad():
        x = batch.embedded(objective.policy)
    size = float(x.norm(dim=-1).square().mean().sqrt())
    loss = objective.policy.loss_fn(batch.inputs, batch.labels, "mean")
    options = dict(radius=0.3 * size, steps=10, step_size=0.1 * size, scope="token", restarts=2)
    trajectory = aajr.ascend(loss, x, mask=batch.attackable, module=trained, **options)
    return float(trajectory.losses[0].mean()), float(trajectory.worst_loss.mean())


def main() -> None:
    train = [text.encode() for text in passages(512)]
    held_out = [text.encode() for text in passages(16, seed=1)]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            logging_steps=STEPS // 3,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        losses = {}
        for name, cls, more in (("plain", Trainer, {}), ("AAJR", AAJRTrainer, {"objective": OBJECTIVE})):
            trainer = cls(model(), args, train_dataset=train, data_collator=collate, **more)
            trainer.train()
            losses[name] = attacked(trainer.model, held_out)
    for name, (clean, robust) in losses.items():
        print(f"{name:6} held-out loss {clean:.3f}, under attack {robust:.3f}")
    assert losses["AAJR"][1] < losses["plain"][1]


if __name__ == "__main__":
    main()
