"""The adversary's loss by the same kernels as the penalty: a forward of the number without tangents.

A Dual whose stack holds only the primal goes through the dual-aware operations and the fused modules of a model, where
a plain tensor would take PyTorch's own, and the head streams its logits. An ascent step then costs less, in time and
in memory, and sees the function that the penalty sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..dual import Dual
from ..ops.head import lm_head_sensitivity
from ..ops.head.counted import counted
from ..rules import registry
from .checks import check_choices, kind_of
from .head import LMHead, as_head

__all__ = ["lm_loss"]

IGNORED = -100


def lm_loss(
    func: Callable[[Any], Any], *, head: LMHead | nn.Linear, labels: Tensor, reduction: str = "mean"
) -> Callable[[Tensor], Tensor]:
    """The cross-entropy of a language model per batch row, as the loss of :func:`ascend`.

    Args:
        func: as in :func:`aligned_penalty` with a head: from a Dual to hidden states ``[B, ..., C]``. Here its argument
            carries no tangents.
        head: the language-model head, streamed over the vocabulary without a ``[tokens, V]`` tensor.
        labels: ``[B, ...]`` class indices aligned with the hidden states, −100 = ignored, at no cost in the head.
        reduction: over the tokens of a row: ``"mean"`` over those that are not ignored, 0 when there are none, or
            ``"sum"``.

    Returns:
        A function from ``[B, ...]`` to losses ``[B]``, float32 (float64 for float64). Name the model with ``module=``
        in :func:`ascend`, or every step computes weight gradients too. Called with a Dual, as by
        :func:`stability_report`, it returns a Dual; the logits are then formed, on the CPU those of labelled tokens.

    Raises:
        TypeError: `head` or `labels` has a wrong type; when called: func did not return hidden states.
        ValueError: unknown reduction; when called: shapes do not agree.
    """
    as_head(head)
    check_choices(("mean", "sum"), reduction=reduction)
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() < 1:
        kind = kind_of(labels) + (f" of {labels.dim()} axes" if isinstance(labels, Tensor) else "")
        raise TypeError(f"labels must be a tensor of class indices [B, ...], got {kind}.")
    count = labels.new_ones(labels.shape[0])
    if reduction == "mean":
        count = (labels != IGNORED).reshape(labels.shape[0], -1).sum(-1).clamp(min=1)
    # gradient of the sum over rows, which the ascent differentiates, per token
    cotangent = (1.0 / count).reshape(-1, *(1,) * (labels.dim() - 1)).expand(labels.shape).reshape(-1)

    def expected(q: Tensor, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        return q, cotangent.to(q.device)[rows]

    def loss(x: Any) -> Any:
        registry.install_guards()
        hidden = func(x if isinstance(x, Dual) else Dual(x.unsqueeze(0)))
        if not isinstance(hidden, Dual):
            raise TypeError(
                f"func must return hidden states that depend on its argument, got {type(hidden).__name__}: return for "
                "example model.model(inputs_embeds=d).last_hidden_state."
            )
        description = as_head(head)  # a layer's weight is another one while fully_shard has gathered it
        if hidden.num_tangents:  # diagnostics differentiate the loss: by the plain formula
            nll = _formed_losses(description, hidden, labels)
            return nll.reshape(nll.shape[0], -1).sum(-1) / count.to(nll.dtype)
        _, nll = lm_head_sensitivity(
            hidden,
            description.weight,
            description.bias,
            scale=description.scale,
            softcap=description.softcap,
            labels=labels,
            expected=expected,
        )
        return nll.reshape(nll.shape[0], -1).sum(-1) / count.to(nll)

    return loss


def _formed_losses(head: LMHead, hidden: Dual, labels: Tensor) -> Any:
    """Cross-entropy of every token, a Dual, from logits in memory: on the CPU those of the tokens with a label."""
    tokens = counted(None, labels.reshape(-1), IGNORED, 0)
    batch = tuple(hidden.shape[:-1])
    if tokens is None or tokens.count is not None or batch != tuple(labels.shape):
        return token_losses(head.logits(hidden), labels)
    stacked = hidden.stacked.reshape(-1, labels.numel(), hidden.shape[-1])
    nll = token_losses(head.logits(Dual(tokens.gather(stacked))), labels.reshape(-1)[tokens.index])
    return Dual(tokens.spread(nll.stacked, labels.numel())).reshape(batch)


def token_losses(logits: Any, labels: Tensor) -> Any:
    """Cross-entropy of every token like `labels`, in float32 or float64, 0 where it is ignored; a Dual for a Dual."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    flat = wide.reshape(-1, wide.shape[-1])
    target = labels.reshape(-1).to(logits.device)
    return nn.functional.cross_entropy(flat, target, ignore_index=IGNORED, reduction="none").reshape(
        labels.shape
    )
