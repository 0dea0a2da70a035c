"""The autograd Function of the linear layer."""

from __future__ import annotations

from typing import Any

import torch

from ... import memory, runtime
from . import reference  # noqa: F401  loaded here because compiled code cannot import it on first use


class LinearFunction(torch.autograd.Function):
    """``[1 + K, *batch, in] -> [1 + K, *batch, out]``."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, backend: str
    ) -> torch.Tensor:
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        need_x, need_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(memory.keep(ctx, x) if need_weight else None, weight if need_x else None)
        with runtime.no_autocast(x.device.type):
            return runtime.implementation("linear", backend).linear_fwd(x, weight, bias)

    @staticmethod
    @runtime.first_order
    def backward(ctx: Any, y_bar: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if y_bar is None:
            return None, None, None, None
        x, weight = ctx.saved_tensors
        x = memory.value_of(ctx, x)
        with runtime.no_autocast(y_bar.device.type):
            grads = runtime.implementation("linear", ctx.backend).linear_bwd(
                y_bar, x, weight, ctx.needs_input_grad[2]
            )
        return *grads, None
