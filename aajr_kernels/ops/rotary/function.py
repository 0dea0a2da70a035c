"""The autograd Function of the rotary embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends import choice
from ...backends.errors import first_order
from ...backends.selfcheck import Draw, Trial
from ..autograd import Function
from . import reference  # noqa: F401  loaded here because compiled code cannot import it on first use


class RotaryFunction(Function):
    """``[1 + K, *shape] -> [1 + K, *shape]``; cos and sin broadcast to ``[*shape[:-1], R]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backend: str) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.interleaved, ctx.backend = interleaved, backend
        need_tables = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(x if need_tables else None, cos, sin)
        return choice.implementation("rotary", backend).rotate(x, cos, sin, interleaved, False)

    @staticmethod
    @first_order
    def backward(ctx: Any, y_bar: Tensor | None) -> tuple[Tensor | None, ...]:
        if y_bar is None:
            return (None,) * 5
        x, cos, sin = ctx.saved_tensors
        ops = choice.implementation("rotary", ctx.backend)
        x_bar = cos_bar = sin_bar = None
        if ctx.needs_input_grad[0]:
            x_bar = ops.rotate(y_bar, cos, sin, ctx.interleaved, True)
        if x is not None:
            cos_bar, sin_bar = ops.rotary_tables_bwd(y_bar, x, cos, sin, ctx.interleaved)
        return x_bar, cos_bar, sin_bar, None, None


def trial(
    draw: Draw,
    name: str,
    dtypes: tuple[torch.dtype | None, ...],
    sizes: tuple[int, ...],
    interleaved: bool,
    length: int = 37,
) -> Trial:
    """A small problem for the first-use check; sizes: stacks, features, those that are rotated."""
    stacks, size, rotated = sizes or (2, 64, 64)
    tables = {name: draw(dtype, 2, 1, length, rotated) for name, dtype in zip(("cos", "sin"), dtypes[1:])}
    operands = {"x": draw(dtypes[0], stacks, 2, 3, length, size)} | tables
    return operands, lambda backend, *tensors: (RotaryFunction.apply(*tensors, interleaved, backend),)
