"""Gated products: the nonlinearity of a gated MLP between its projections."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..ops.activation import geglu, swiglu

__all__ = ["GeGLU", "SwiGLU"]


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
