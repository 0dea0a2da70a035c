"""Pointwise activations. Those that torch has keep its constructor; ``inplace=True`` is accepted and not used."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..ops import activation

__all__ = ["GELU", "QuickGELU", "ReLU", "ReLU2", "SiLU", "Sigmoid", "Tanh"]


class GELU(nn.GELU):
    """``torch.nn.GELU`` over :func:`aajr_kernels.gelu`."""

    def forward(self, input: Any) -> Any:
        """`input` of any shape, Tensor or Dual."""
        return activation.gelu(input, self.approximate)


class SiLU(nn.SiLU):
    """``torch.nn.SiLU`` over :func:`aajr_kernels.silu`."""

    def forward(self, input: Any) -> Any:
        """`input` of any shape, Tensor or Dual."""
        return activation.silu(input)


class ReLU(nn.ReLU):
    """``torch.nn.ReLU`` over :func:`aajr_kernels.relu`."""

    def forward(self, input: Any) -> Any:
        """`input` of any shape, Tensor or Dual."""
        return activation.relu(input)


class Tanh(nn.Tanh):
    """``torch.nn.Tanh`` over :func:`aajr_kernels.tanh`."""

    def forward(self, input: Any) -> Any:
        """`input` of any shape, Tensor or Dual."""
        return activation.tanh(input)


class Sigmoid(nn.Sigmoid):
    """``torch.nn.Sigmoid`` over :func:`aajr_kernels.sigmoid`."""

    def forward(self, input: Any) -> Any:
        """`input` of any shape, Tensor or Dual."""
        return activation.sigmoid(input)


class ReLU2(nn.Module):
    """``max(x, 0)²`` over :func:`aajr_kernels.relu2`."""

    def forward(self, input: Any) -> Any:
        """`input` of any shape, Tensor or Dual."""
        return activation.relu2(input)


class QuickGELU(nn.Module):
    """``xσ(1.702x)`` over :func:`aajr_kernels.quick_gelu` (CLIP's activation)."""

    def forward(self, input: Any) -> Any:
        """`input` of any shape, Tensor or Dual."""
        return activation.quick_gelu(input)
