"""The public activations: checks, backend choice, coverage."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import sharding
from ...dual import Dual, num_tangents, stack_of
from ...recompute import is_recomputed
from ..prepare import SHARDS, prepare
from .function import GatedFunction, PointwiseFunction

_T = TypeVar("_T", Tensor, Dual)


def _pointwise(kind: str, x: Dual) -> Dual:
    backend, operands = prepare(
        "activation",
        (x.stacked,),
        flops=lambda x: 8.0 * x.numel(),
        shards=lambda: sharding.OPS["rowwise"](kind, lambda local: _pointwise(kind, local), x, 0),
        name=kind,
        kind=lambda x: ((x.shape[0],), (kind,)),
    )
    if backend == SHARDS:
        return operands
    return Dual(PointwiseFunction.apply(*operands, kind, backend, is_recomputed("activations")))


def _gelu_kind(op: str, approximate: str) -> str:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{op}: approximate must be 'none' or 'tanh', got {approximate!r}.")
    return "gelu_tanh" if approximate == "tanh" else "gelu"


def gelu(x: _T, approximate: str = "none") -> _T:
    """GELU: ``xΦ(x)``, or ``x(1 + tanh(√(2/π)(x + 0.044715x³)))/2`` with ``approximate="tanh"``.

    Args:
        x: any shape, Tensor or Dual; low dtypes are computed in float32.
        approximate: ``"none"`` or ``"tanh"``, as in ``torch.nn.functional.gelu``.

    Returns:
        Shape and dtype of `x`; for a Dual the tangents are ``f'(x)∘ẋ``.

    Raises:
        ValueError: `approximate` is neither.
    """
    kind = _gelu_kind("gelu", approximate)
    return _pointwise(kind, x) if isinstance(x, Dual) else F.gelu(x, approximate=approximate)


def silu(x: _T) -> _T:
    """SiLU ``xσ(x)`` of a Tensor or Dual of any shape; for a Dual the tangents are ``f'(x)∘ẋ``."""
    return _pointwise("silu", x) if isinstance(x, Dual) else F.silu(x)


def relu(x: _T) -> _T:
    """``max(x, 0)`` of a Tensor or Dual of any shape; the derivative at 0 is 0, as in torch."""
    return _pointwise("relu", x) if isinstance(x, Dual) else F.relu(x)


def relu2(x: _T) -> _T:
    """``max(x, 0)²`` of a Tensor or Dual of any shape."""
    return _pointwise("relu2", x) if isinstance(x, Dual) else F.relu(x).square()


def quick_gelu(x: _T) -> _T:
    """``xσ(1.702x)`` of a Tensor or Dual of any shape (CLIP's activation)."""
    return _pointwise("quick_gelu", x) if isinstance(x, Dual) else x * torch.sigmoid(1.702 * x)


def tanh(x: _T) -> _T:
    """Hyperbolic tangent of a Tensor or Dual of any shape."""
    return _pointwise("tanh", x) if isinstance(x, Dual) else torch.tanh(x)


def sigmoid(x: _T) -> _T:
    """Logistic function of a Tensor or Dual of any shape."""
    return _pointwise("sigmoid", x) if isinstance(x, Dual) else torch.sigmoid(x)


def _gated(op: str, kind: str, gate: Tensor | Dual, up: Tensor | Dual) -> Dual:
    if gate.shape != up.shape:
        raise ValueError(f"{op}: up must have the shape of gate {tuple(gate.shape)}, got {tuple(up.shape)}.")
    num_tangents(gate, up)
    gate_stack, up_stack = stack_of(gate), stack_of(up)
    if gate_stack.dtype != up_stack.dtype:
        dtype = torch.promote_types(gate_stack.dtype, up_stack.dtype)
        gate_stack, up_stack = gate_stack.to(dtype), up_stack.to(dtype)
    backend, operands = prepare(
        "activation",
        (gate_stack, up_stack),
        flops=lambda gate, up: 10.0 * max(gate.numel(), up.numel()),
        shards=lambda: sharding.OPS["gated"](
            op, lambda a, b: _gated(op, kind, a, b), Dual(gate_stack), Dual(up_stack)
        ),
        name=op,
        kind=lambda gate, up: ((gate.shape[0], up.shape[0]), (kind,)),
    )
    if backend == SHARDS:
        return operands
    return Dual(GatedFunction.apply(*operands, kind, backend, is_recomputed("activations")))


def swiglu(gate: Tensor | Dual, up: Tensor | Dual) -> Tensor | Dual:
    """Gated product ``silu(gate) ∘ up``.

    Args:
        gate: any shape, Tensor or Dual.
        up: shape of `gate`, Tensor or Dual; a plain tensor beside a Dual has no tangent.

    Returns:
        Same shape, promoted dtype; a Dual if either is one, with tangents ``s'(g)∘ġ∘u + s(g)∘u̇``.

    Raises:
        ValueError: shapes differ, or the Duals carry different numbers of tangents.
    """
    if not isinstance(gate, Dual) and not isinstance(up, Dual):
        return F.silu(gate) * up
    return _gated("swiglu", "silu", gate, up)


def geglu(gate: Tensor | Dual, up: Tensor | Dual, approximate: str = "none") -> Tensor | Dual:
    """Gated product ``gelu(gate) ∘ up``; arguments and errors as in :func:`swiglu` and :func:`gelu`."""
    kind = _gelu_kind("geglu", approximate)
    if not isinstance(gate, Dual) and not isinstance(up, Dual):
        return F.gelu(gate, approximate=approximate) * up
    return _gated("geglu", kind, gate, up)
