"""The language-model head as a description: its logits are streamed over the vocabulary, never materialised."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..dual import Dual

__all__ = ["LMHead"]


@dataclass(frozen=True)
class LMHead:
    """Logits z = cap(scale · (W h + b)) with cap(z) = softcap · tanh(z / softcap), or the identity.

    Args:
        weight: ``[V, C]``, vocabulary by hidden size; may require grad.
        bias: ``[V]`` or None.
        scale: factor on the logits (some models divide by a constant).
        softcap: bound of the final soft cap (Gemma 2), or None.

    Raises:
        TypeError: weight or bias is not a plain tensor.
        ValueError: their shapes do not agree, or softcap is not positive.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("weight", self.weight), ("bias", self.bias)):
            if isinstance(value, Dual) or not (
                (value is None and name == "bias") or isinstance(value, torch.Tensor)
            ):
                raise TypeError(f"{name} of LMHead must be a plain tensor, got {type(value).__name__}.")
        if self.weight.dim() != 2:
            raise ValueError(f"weight of LMHead must be [V, C], got shape {tuple(self.weight.shape)}.")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(
                f"bias of LMHead must be [{self.weight.shape[0]}] like the rows of weight, "
                f"got {tuple(self.bias.shape)}."
            )
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap of LMHead must be positive or None, got {self.softcap}.")

    def logits(self, hidden: Any) -> Any:
        """The logits ``[..., V]`` of hidden states, a tensor or a Dual, formed."""
        z = nn.functional.linear(hidden, self.weight, self.bias) * self.scale
        return z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap

    def detached(self) -> LMHead:
        """The same as constants."""
        if not any(t is not None and t.requires_grad for t in (self.weight, self.bias)):
            return self
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, weight=self.weight.detach(), bias=bias)


def as_head(head: LMHead | nn.Linear) -> LMHead:
    """`head` itself, or the description of a linear layer (``model.lm_head``), or the one that a function returns.

    Raises:
        TypeError: `head` is neither.
    """
    if isinstance(head, LMHead):
        return head
    # fully_shard makes a subclass of a layer; one with a forward of its own is another function
    if isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward:
        return LMHead(head.weight, head.bias)
    if callable(head) and not isinstance(head, (nn.Module, type)):
        return as_head(head())
    raise TypeError(
        f"head must be an LMHead or an nn.Linear, got {type(head).__name__}: describe it with "
        "LMHead(weight, bias, scale, softcap)."
    )
