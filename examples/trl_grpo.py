"""TRL's GRPOTrainer with the penalty along the adversary's ascent added to its own loss.

    python examples/trl_grpo.py

The reward is the share of vowels in what a small byte-level model writes. The adversary moves embeddings so that
−A log π of the completions rises; the policy is penalised for how fast its distribution changes on that way.
"""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset
from text import passages
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

from aajr_kernels.integrations.trainer import AAJRPenaltyMixin
from aajr_kernels.training import Attack, ObjectiveConfig, Penalty


class RobustGRPOTrainer(AAJRPenaltyMixin, GRPOTrainer):
    """Policy gradients with a penalty on the policy's sensitivity."""


def vowels(completions: list[str], **unused: object) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]


def main(steps: int = 8) -> list[dict[str, float]]:
    torch.manual_seed(0)
    tokenizer = ByT5Tokenizer(extra_ids=0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    ends = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ends))
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            num_generations=8,
            max_completion_length=12,
            learning_rate=3e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=False,
            disable_tqdm=True,
        )
        trainer = RobustGRPOTrainer(
            model,
            vowels,
            args,
            train_dataset=Dataset.from_list([{"prompt": text[:12]} for text in passages(64)]),
            processing_class=tokenizer,
            objective=ObjectiveConfig(attack=Attack(radius=0.2, steps=2), penalty=Penalty(weight=0.01)),
        )
        trainer.train()
    return [row for row in trainer.state.log_history if "penalty" in row]


if __name__ == "__main__":
    logged = main()
    assert any(row["penalty"] > 0 for row in logged)
