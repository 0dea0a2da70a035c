"""Where TRL's GRPO has its tokens and advantages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...method.losses import IGNORED

__all__ = ["grpo_batch"]

NAMES = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")


def grpo_batch(inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """Tokens, mask and labels of prompts with their completions, and the advantage of every row.

    Labels are the completions' tokens: there the policy acted, and there the penalty is measured. The adversary may
    change everything that is attended to.

    Raises:
        ValueError: `inputs` are not those of GRPO, or have an advantage per token.
    """
    missing = [name for name in NAMES if not isinstance(inputs.get(name), Tensor)]
    if missing:
        raise ValueError(
            f"inputs must hold {', '.join(NAMES)} as tensors, as those of TRL's GRPO do, got no {', '.join(missing)}: "
            "define aajr_batch(inputs) for another trainer."
        )
    prompts, prompt_mask, completions, mask, advantages = (inputs[name] for name in NAMES)
    if advantages.dim() == 2 and advantages.shape[1] == 1:
        advantages = advantages.squeeze(1)
    if advantages.dim() != 1:
        raise ValueError(
            f"advantages must be one per row, [B], got shape {tuple(advantages.shape)}: define aajr_batch(inputs), "
            "which gives weights of rows."
        )
    tool_mask = inputs.get("tool_mask")
    learnt = mask if tool_mask is None else mask * tool_mask
    batch = {
        "input_ids": torch.cat([prompts, completions], 1),
        "attention_mask": torch.cat([prompt_mask, mask], 1),
        "labels": torch.cat(
            [torch.full_like(prompts, IGNORED), completions.masked_fill(learnt == 0, IGNORED)], 1
        ),
    }
    return batch, advantages
