"""A causal language model as a function of its input embeddings: loss, ascent direction and penalty."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import aajr_kernels as aajr


def loss_of(model: Any, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the labels ``[B, S]`` that are not -100; `x` are input embeddings ``[B, S, D]``."""
    return F.cross_entropy(model(inputs_embeds=x, use_cache=False).logits.flatten(0, 1), labels.flatten())


def ascent_direction(
    model: Any, x: torch.Tensor, labels: torch.Tensor, scope: str, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The gradient of the loss for the embeddings in `mask`, of unit norm over each of `scope`, detached."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(model, x, labels), x)
    return aajr.normalize(gradient, scope=scope, mask=mask)


def streamed_penalty(
    model: Any, x: torch.Tensor, v: torch.Tensor, labels: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fisher penalty along `v` with streamed logits, and the loss from the same forward, both attached.

    Args:
        model: plain or under peft.
        x: input embeddings.
        v: like `x`.
        labels: ``[B, S]``, -100 = not scored.
        options: of :func:`aajr_kernels.aligned_penalty`.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return aajr.aligned_penalty(
        lambda embeds: causal.model(inputs_embeds=embeds, use_cache=False).last_hidden_state,
        x,
        v,
        metric="fisher",
        head=aajr.LMHead(model.get_output_embeddings().weight),
        labels=labels,
        return_primal=True,
        **options,
    )
