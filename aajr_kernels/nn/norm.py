"""Norm layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..ops.norm import layer_norm, rms_norm

__all__ = ["LayerNorm", "RMSNorm"]


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` over :func:`aajr_kernels.layer_norm`, whose gradient of a tangent is exact."""

    def forward(self, input: Any) -> Any:
        """`input` ``[*batch, *normalized_shape]``, Tensor or Dual."""
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` over :func:`aajr_kernels.rms_norm`, with an optional offset of the weight.

    Args:
        normalized_shape: the trailing axes that are normalised together.
        eps: added to the mean square; None means the epsilon of the dtype, as in torch.
        elementwise_affine: whether there is a weight.
        device: of the weight.
        dtype: likewise.
        offset: added to the weight in the forward (1 in Gemma, whose weights start at 0); the weight starts at
            ``1 - offset``.

    Raises:
        ValueError: an offset without a weight.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        offset: float = 0.0,
    ) -> None:
        if offset and not elementwise_affine:
            raise ValueError(
                f"offset is {offset} but elementwise_affine is False: an offset is added to a weight."
            )
        self.offset = offset
        shape = normalized_shape if isinstance(normalized_shape, int) else list(normalized_shape)
        super().__init__(shape, eps, elementwise_affine, device, dtype)

    def reset_parameters(self) -> None:
        if self.elementwise_affine:
            nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(self, x: Any) -> Any:
        """`x` ``[*batch, *normalized_shape]``, Tensor or Dual."""
        return rms_norm(x, self.normalized_shape, self.weight, self.eps, offset=self.offset)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", offset={self.offset}" if self.offset else "")
