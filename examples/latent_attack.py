"""An attack on the residual stream in AAJRTrainer: latent adversarial training, with the penalty along its ascent.

    python examples/latent_attack.py

latent_plain.py is the script that it was: the same attack in plain PyTorch, written out in latent_pgd.py. Layers below
the attacked one run once per step here.
"""

from __future__ import annotations

import tempfile

from latent_pgd import Trainer, collate, losses, model, rows
from transformers import TrainingArguments

from aajr_kernels.integrations.trainer import AAJRTrainer
from aajr_kernels.training import Attack, ObjectiveConfig, Penalty

STEPS = 40
ATTACK = Attack(at=0, radius=1.0, relative=False, steps=3, step_size=0.5)


def trainer(folder: str) -> Trainer:
    args = TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    options = dict(train_dataset=rows(512), data_collator=collate)
    return AAJRTrainer(model(), args, objective=ObjectiveConfig(attack=ATTACK, penalty=Penalty()), **options)


def main() -> None:
    before = losses(model())
    with tempfile.TemporaryDirectory() as folder:
        trained = trainer(folder)
        trained.train()
    after = losses(trained.model)
    print(f"held-out loss {before[0]:.3f} -> {after[0]:.3f}, under attack {before[1]:.3f} -> {after[1]:.3f}")
    assert after[1] < before[1]


if __name__ == "__main__":
    main()
