"""The linear layer."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..ops.linear import linear

__all__ = ["Linear"]


class Linear(nn.Linear):
    """``y = Wx + b``: ``torch.nn.Linear`` over :func:`aajr_kernels.linear`."""

    def forward(self, input: Any) -> Any:
        """`input` ``[..., in_features]``, Tensor or Dual."""
        return linear(input, self.weight, self.bias)
