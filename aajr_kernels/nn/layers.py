"""The layers; those that torch has keep its constructor (``inplace=True`` is accepted and not used)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..ops import activation
from ..ops.activation import geglu, swiglu
from ..ops.linear import linear
from ..ops.norm import layer_norm, rms_norm


def _pointwise(function: Callable[[Any], Any]) -> Any:
    def forward(self: nn.Module, input: Any) -> Any:
        """`input` of any shape, Tensor or Dual."""
        return function(input)

    return forward


class GELU(nn.GELU):
    """``torch.nn.GELU`` over :func:`aajr_kernels.gelu`."""

    def forward(self, input: Any) -> Any:
        """`input` of any shape, Tensor or Dual."""
        return activation.gelu(input, self.approximate)


class SiLU(nn.SiLU):
    """``torch.nn.SiLU`` over :func:`aajr_kernels.silu`."""

    forward = _pointwise(activation.silu)


class ReLU(nn.ReLU):
    """``torch.nn.ReLU`` over :func:`aajr_kernels.relu`."""

    forward = _pointwise(activation.relu)


class Tanh(nn.Tanh):
    """``torch.nn.Tanh`` over :func:`aajr_kernels.tanh`."""

    forward = _pointwise(activation.tanh)


class Sigmoid(nn.Sigmoid):
    """``torch.nn.Sigmoid`` over :func:`aajr_kernels.sigmoid`."""

    forward = _pointwise(activation.sigmoid)


class ReLU2(nn.Module):
    """``max(x, 0)²`` over :func:`aajr_kernels.relu2`."""

    forward = _pointwise(activation.relu2)


class QuickGELU(nn.Module):
    """``xσ(1.702x)`` over :func:`aajr_kernels.quick_gelu` (CLIP's activation)."""

    forward = _pointwise(activation.quick_gelu)


def _halves(gate: Any, up: Any) -> tuple[Any, Any]:
    if up is not None:
        return gate, up
    if gate.shape[-1] % 2:
        raise ValueError(
            f"gate must have an even last axis when up is None (it holds both halves), got {tuple(gate.shape)}."
        )
    return gate.chunk(2, dim=-1)


class SwiGLU(nn.Module):
    """``silu(gate) ∘ up`` over :func:`aajr_kernels.swiglu`."""

    def forward(self, gate: Any, up: Any = None) -> Any:
        """The gated product.

        Args:
            gate: ``[..., F]``, Tensor or Dual; ``[..., 2F]`` with the gate first when `up` is None.
            up: ``[..., F]``, Tensor or Dual, or None.

        Returns:
            ``[..., F]``, a Dual if an argument is one.

        Raises:
            ValueError: shapes differ, or `up` is None and the last axis is odd.
        """
        return swiglu(*_halves(gate, up))


class GeGLU(nn.Module):
    """``gelu(gate) ∘ up`` over :func:`aajr_kernels.geglu`.

    Args:
        approximate: ``"none"`` or ``"tanh"``, as in ``torch.nn.GELU``.

    Raises:
        ValueError: `approximate` is neither.
    """

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        if approximate not in ("none", "tanh"):
            raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}.")
        self.approximate = approximate

    def forward(self, gate: Any, up: Any = None) -> Any:
        """As :meth:`SwiGLU.forward`."""
        return geglu(*_halves(gate, up), approximate=self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class Linear(nn.Linear):
    """``y = Wx + b``: ``torch.nn.Linear`` over :func:`aajr_kernels.linear`."""

    def forward(self, input: Any) -> Any:
        """`input` ``[..., in_features]``, Tensor or Dual."""
        return linear(input, self.weight, self.bias)


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
