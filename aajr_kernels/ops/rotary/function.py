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
    """cos, sin, two options, any number of ``[1 + K, *shape]`` to as many; tables broadcast to ``[*shape[:-1], R]``."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        cos, sin, interleaved, backend, *xs = args  # not by name: as for `LinearFunction`
        ctx.set_materialize_grads(False)
        ctx.interleaved, ctx.backend = interleaved, backend
        need_tables = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        ctx.save_for_backward(cos, sin, *(xs if need_tables else ()))
        rotate = choice.implementation("rotary", backend).rotate
        results = tuple([rotate(x, cos, sin, interleaved, False) for x in xs])
        return results if len(results) > 1 else results[0]

    @staticmethod
    @first_order
    def backward(ctx: Any, *y_bars: Tensor | None) -> tuple[Tensor | None, ...]:
        cos, sin, *xs = ctx.saved_tensors
        ops = choice.implementation("rotary", ctx.backend)
        x_bars = [
            ops.rotate(y_bar, cos, sin, ctx.interleaved, True) if need and y_bar is not None else None
            for y_bar, need in zip(y_bars, ctx.needs_input_grad[4:])
        ]
        cos_bar = sin_bar = None
        for y_bar, x in zip(y_bars, xs):
            if y_bar is not None:
                bars = ops.rotary_tables_bwd(y_bar, x, cos, sin, ctx.interleaved)
                cos_bar, sin_bar = bars if cos_bar is None else (cos_bar + bars[0], sin_bar + bars[1])
        return cos_bar, sin_bar, None, None, *x_bars


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
    return operands, lambda backend, x, *tables: (RotaryFunction.apply(*tables, interleaved, backend, x),)
