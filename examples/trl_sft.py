"""TRL's SFTTrainer with the method's objective: LoRA, and a loss only on completions.

    python examples/trl_sft.py

The tokenizer is ByT5's, which is made of bytes and needs no files.
"""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from text import passages
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from aajr_kernels.integrations.trainer import AAJRTrainerMixin
from aajr_kernels.training import Attack, ObjectiveConfig, Penalty


class RobustSFTTrainer(AAJRTrainerMixin, SFTTrainer):
    """Supervised fine-tuning against the adversary."""


def main(steps: int = 20) -> list[dict[str, float]]:
    torch.manual_seed(0)
    tokenizer = ByT5Tokenizer(extra_ids=0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    ends = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ends))
    ids = [tokenizer(text).input_ids for text in passages(160)]
    rows = [{"input_ids": row, "completion_mask": [0] * 16 + [1] * (len(row) - 16)} for row in ids]
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            logging_steps=5,
            completion_only_loss=True,
            save_strategy="no",
            report_to="none",
            bf16=False,
            disable_tqdm=True,
        )
        trainer = RobustSFTTrainer(
            model,
            args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, target_modules="all-linear", modules_to_save=["embed_tokens"]),
            objective=ObjectiveConfig(attack=Attack(radius=0.2, steps=2), penalty=Penalty()),
        )
        trainer.train()
    return [row for row in trainer.state.log_history if "penalty" in row]


if __name__ == "__main__":
    logged = main()
    assert logged[-1]["adversarial_loss"] < logged[0]["adversarial_loss"]
