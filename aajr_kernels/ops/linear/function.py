"""The autograd Function of the linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...autocast import no_autocast
from ...backends import choice
from ...backends.errors import first_order
from ...backends.selfcheck import Draw, Trial
from ...recompute import recomputed, save_or_recompute
from . import reference  # noqa: F401  loaded here because compiled code cannot import it on first use


class LinearFunction(torch.autograd.Function):
    """``[1 + K, *batch, in] -> [1 + K, *batch, out]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        need_x, need_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(save_or_recompute(ctx, x) if need_weight else None, weight if need_x else None)
        with no_autocast(x.device.type):
            return choice.implementation("linear", backend).linear_fwd(x, weight, bias)

    @staticmethod
    @first_order
    def backward(ctx: Any, y_bar: Tensor | None) -> tuple[Tensor | None, ...]:
        if y_bar is None:
            return None, None, None, None
        x, weight = ctx.saved_tensors
        x = recomputed(ctx, x)
        with no_autocast(y_bar.device.type):
            grads = choice.implementation("linear", ctx.backend).linear_bwd(
                y_bar, x, weight, ctx.needs_input_grad[2]
            )
        return *grads, None


def trial(
    draw: Draw, name: str, dtypes: tuple[torch.dtype | None, ...], sizes: tuple[int, ...], biased: bool
) -> Trial:
    """A small problem for the first-use check; sizes: stacks, features of the result. The dtypes are equal."""
    stacks, size = sizes or (2, 64)
    dtype = dtypes[0]
    operands = {"x": draw(dtype, stacks, 37, 32), "weight": draw(dtype, size, 32)}
    operands["bias"] = draw(dtype if biased else None, size)
    return operands, lambda backend, *tensors: (LinearFunction.apply(*tensors, backend),)
