"""The autograd Functions of pointwise activations and gated products."""

from __future__ import annotations

from typing import Any

import torch

from ... import runtime
from . import reference  # noqa: F401  loaded here because compiled code cannot import it on first use


class PointwiseFunction(torch.autograd.Function):
    """``[1 + K, *shape] -> [1 + K, *shape]``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kind: str, backend: str) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.kind, ctx.backend = kind, backend
        ctx.save_for_backward(x)
        return runtime.implementation("activation", backend).pointwise_fwd(x, kind)

    @staticmethod
    @runtime.first_order
    def backward(ctx: Any, y_bar: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None]:
        if y_bar is None:
            return None, None, None
        (x,) = ctx.saved_tensors
        return runtime.implementation("activation", ctx.backend).pointwise_bwd(y_bar, x, ctx.kind), None, None


class GatedFunction(torch.autograd.Function):
    """gate and up ``[1 + K, *shape]`` or ``[1, *shape]`` to ``[1 + K, *shape]``."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, kind: str, backend: str) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.kind, ctx.backend = kind, backend
        ctx.save_for_backward(gate, up)
        return runtime.implementation("activation", backend).gated_fwd(gate, up, kind)

    @staticmethod
    @runtime.first_order
    def backward(ctx: Any, h_bar: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if h_bar is None:
            return None, None, None, None
        gate, up = ctx.saved_tensors
        grads = runtime.implementation("activation", ctx.backend).gated_bwd(
            h_bar, gate, up, ctx.kind, *ctx.needs_input_grad[:2]
        )
        return *grads, None, None
