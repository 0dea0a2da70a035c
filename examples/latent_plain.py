"""Latent adversarial training in plain PyTorch, which latent_attack.py does with the package.

python examples/latent_plain.py
"""

from __future__ import annotations

import tempfile

from latent_pgd import LatentTrainer, Trainer, collate, losses, model, rows
from transformers import TrainingArguments

STEPS = 40


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
    return LatentTrainer(model(), args, layer=0, radius=1.0, steps=3, step_size=0.5, **options)


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
