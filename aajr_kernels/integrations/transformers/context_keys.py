"""Keys and values in two parts, between the cache of a context and attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import sharding
from ...dual import Dual

__all__ = ["Joined", "joined"]


class Joined(Dual):
    """Keys or values of a suffix after those of its context, which attention takes apart.

    Any other operation reads the one Dual that they are together, with tangents of zero for the context, which is
    concatenated then.

    Attributes:
        context: ``[B, HK, C, D]``.
        suffix: ``[B, HK, M, D]``.
    """

    def __init__(self, context: Tensor, suffix: Dual) -> None:
        self.context, self.suffix = context, suffix
        self._whole: Tensor | None = None

    @property
    def stacked(self) -> Tensor:
        if self._whole is None:
            whole: Any = torch.cat([self.context, self.suffix], dim=-2)  # type: ignore[list-item]
            self._whole = whole.stacked
        return self._whole

    @stacked.setter
    def stacked(self, value: Tensor) -> None:
        self._whole = value

    dtype = property(lambda self: self.suffix.dtype)
    device = property(lambda self: self.suffix.device)

    @property
    def shape(self) -> torch.Size:
        *batch, length, size = self.suffix.shape
        return torch.Size((*batch, self.context.shape[-2] + length, size))


def joined(context: Tensor, suffix: Any) -> Any:
    """Keys or values of context and suffix, in two parts where the suffix is a Dual."""
    if isinstance(suffix, Dual) and not torch.compiler.is_compiling() and not sharding.is_dtensor(context):
        return Joined(context, suffix)
    return torch.cat([context, suffix], dim=-2)
