"""The autograd Functions of the sensitivities and of softmax."""

from __future__ import annotations

from typing import Any

import torch

from ... import memory, runtime
from . import reference  # noqa: F401  loaded here because compiled code cannot import it on first use


class SensitivityFunction(torch.autograd.Function):
    """Stacked output ``[1 + K, *batch, V]`` to q ``[K, *batch]``."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, metric: str, backend: str) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.metric, ctx.backend = metric, backend
        ctx.save_for_backward(y)
        with runtime.no_autocast(y.device.type):
            return runtime.implementation("sensitivity", backend).sensitivity_fwd(y, metric)

    @staticmethod
    @runtime.first_order
    def backward(ctx: Any, q_bar: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None]:
        if q_bar is None:
            return None, None, None
        (y,) = ctx.saved_tensors
        with runtime.no_autocast(y.device.type):
            y_bar = runtime.implementation("sensitivity", ctx.backend).sensitivity_bwd(q_bar, y, ctx.metric)
        return y_bar, None, None


class SoftmaxFunction(torch.autograd.Function):
    """``[1 + K, ..., V] -> [1 + K, ..., V]``, along the last axis."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, backend: str) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.backend = backend
        with runtime.no_autocast(x.device.type):
            y: torch.Tensor = runtime.implementation("sensitivity", backend).softmax_fwd(x)
        ctx.save_for_backward(memory.as_now(x, ctx.needs_input_grad[0]))
        return y

    @staticmethod
    @runtime.first_order
    def backward(ctx: Any, y_bar: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        if y_bar is None:
            return None, None
        (x,) = ctx.saved_tensors
        with runtime.no_autocast(x.device.type):
            return runtime.implementation("sensitivity", ctx.backend).softmax_bwd(y_bar, x), None
