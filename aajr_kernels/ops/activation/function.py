"""The autograd Functions of pointwise activations and gated products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends import choice
from ...backends.errors import first_order
from ...backends.selfcheck import Draw, Trial
from ...recompute import make_recomputable, released, saved_tensors, snapshot
from ..autograd import Function
from . import reference  # noqa: F401  loaded here because compiled code cannot import it on first use

_TORCH_SAVES_RESULT = ("relu", "tanh", "sigmoid")


class PointwiseFunction(Function):
    """``[1 + K, *shape] -> [1 + K, *shape]``; with `recompute` consumers do not keep the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str, backend: str, recompute: bool = False) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.kind, ctx.backend = kind, backend
        y: Tensor = choice.implementation("activation", backend).pointwise_fwd(x, kind)
        ctx.save_for_backward(snapshot(x, ctx.needs_input_grad[0]) if kind in _TORCH_SAVES_RESULT else x)
        if recompute:
            make_recomputable(ctx, y, _pointwise_again)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, y_bar: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if y_bar is None:
            return None, None, None, None
        (x,) = released(ctx)
        x_bar = choice.implementation("activation", ctx.backend).pointwise_bwd(y_bar, x, ctx.kind)
        return x_bar, None, None, None


class GatedFunction(Function):
    """gate and up ``[1 + K, *shape]`` or ``[1, *shape]`` to ``[1 + K, *shape]``; `recompute` as above."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, kind: str, backend: str, recompute: bool = False
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.kind, ctx.backend = kind, backend
        ctx.save_for_backward(gate, up)
        h: Tensor = choice.implementation("activation", backend).gated_fwd(gate, up, kind)
        if recompute:
            make_recomputable(ctx, h, _gated_again)
        return h

    @staticmethod
    @first_order
    def backward(ctx: Any, h_bar: Tensor | None) -> tuple[Tensor | None, ...]:
        if h_bar is None:
            return (None,) * 5
        gate, up = released(ctx)
        grads = choice.implementation("activation", ctx.backend).gated_bwd(
            h_bar, gate, up, ctx.kind, *ctx.needs_input_grad[:2]
        )
        return *grads, None, None, None


def _pointwise_again(ctx: Any) -> Tensor:
    (x,) = saved_tensors(ctx)
    y: Tensor = choice.implementation("activation", ctx.backend).pointwise_fwd(x, ctx.kind)
    return y


def _gated_again(ctx: Any) -> Tensor:
    gate, up = saved_tensors(ctx)
    h: Tensor = choice.implementation("activation", ctx.backend).gated_fwd(gate, up, ctx.kind)
    return h


def trial(
    draw: Draw,
    name: str,
    dtypes: tuple[torch.dtype | None, ...],
    sizes: tuple[int, ...],
    kind: str,
    length: int = 37,
) -> Trial:
    """A small problem for the first-use check; sizes: stacks of the operands."""
    stacks = sizes or (2,) * len(dtypes)
    function = PointwiseFunction if len(dtypes) == 1 else GatedFunction
    operands = {n: draw(d, count, length, 130) for n, d, count in zip(("gate", "up"), dtypes, stacks)}
    return operands, lambda backend, *tensors: (function.apply(*tensors, kind, backend),)
