"""The autograd Function of linear layers of one input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...autocast import outside_autocast
from ...backends import choice
from ...backends.errors import first_order
from ...backends.selfcheck import Draw, Trial
from ...recompute import recomputed, save_or_recompute
from ..autograd import Function
from . import reference  # noqa: F401  loaded here because compiled code cannot import it on first use


class LinearFunction(Function):
    """``[1 + K, *batch, in]`` and weight, bias, weight, bias... to one ``[1 + K, *batch, out]`` for each pair."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        # not (ctx, x, backend, *parameters): as many names as arguments without ctx, and Dynamo passes no ctx
        x, backend, *parameters = args
        ctx.backend, ctx.device_type = backend, x.device.type
        ctx.set_materialize_grads(False)
        weights, biases = parameters[::2], parameters[1::2]
        kept = save_or_recompute(ctx, x) if any(ctx.needs_input_grad[2::2]) else None
        ctx.save_for_backward(kept, *(weights if ctx.needs_input_grad[0] else [None] * len(weights)))
        linear_fwd = choice.implementation("linear", backend).linear_fwd
        results = outside_autocast(ctx.device_type, _each, linear_fwd, x, weights, biases)
        return results if len(results) > 1 else results[0]

    @staticmethod
    @first_order
    def backward(ctx: Any, *y_bars: Tensor | None) -> tuple[Tensor | None, ...]:
        x_bar, bars = None, []
        x, *weights = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        present = [y_bar for y_bar in y_bars if y_bar is not None]
        if present:
            x = recomputed(ctx, x)
        linear_bwd = choice.implementation("linear", ctx.backend).linear_bwd
        for y_bar, weight, need_weight, need_bias in zip(y_bars, weights, needs[::2], needs[1::2]):
            weight_bar = bias_bar = None
            if y_bar is not None:
                args = y_bar, x if need_weight else None, weight, need_bias, x_bar
                x_bar, weight_bar, bias_bar = outside_autocast(ctx.device_type, linear_bwd, *args)
            bars += [weight_bar, bias_bar]
        return x_bar, None, *bars


def _each(
    linear_fwd: Callable[..., Tensor], x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    return tuple([linear_fwd(x, weight, bias) for weight, bias in zip(weights, biases)])


def trial(
    draw: Draw,
    name: str,
    dtypes: tuple[torch.dtype | None, ...],
    sizes: tuple[int, ...],
    biased: bool,
    length: int = 37,
) -> Trial:
    """A small problem for the first-use check; sizes: stacks, features of the results. The dtypes are equal."""
    stacks, size = sizes or (2, 64)
    dtype = dtypes[0]
    operands = {"x": draw(dtype, stacks, length, 32)}
    for i in range(len(dtypes) // 2):
        operands |= {f"weight {i}": draw(dtype, size, 32), f"bias {i}": draw(dtype if biased else None, size)}

    def run(backend: str, x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        results = LinearFunction.apply(x, backend, *parameters)
        return results if isinstance(results, tuple) else (results,)

    return operands, run
