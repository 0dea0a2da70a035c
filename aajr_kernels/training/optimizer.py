"""The optimizer that a training makes where none is given."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from .schedules import Schedule, value_at

__all__ = ["adamw"]


def adamw(
    parameters: Iterable[nn.Parameter],
    learning_rate: Schedule,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """AdamW that decays matrices only: scales of norms and biases keep their size.

    Args:
        parameters: that are trained, in any order.
        learning_rate: its value at step 0; later ones are set by the loop.
        betas: of AdamW.
        weight_decay: of parameters with two axes or more.
    """
    own = list(parameters)
    matrices, vectors = [p for p in own if p.dim() >= 2], [p for p in own if p.dim() < 2]
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((matrices, weight_decay), (vectors, 0.0))
        if group
    ]
    return torch.optim.AdamW(groups, lr=value_at(learning_rate, 0, "learning_rate"), betas=betas)
