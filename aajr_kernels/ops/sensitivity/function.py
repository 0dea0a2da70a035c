"""The autograd Functions of the sensitivities and of softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...autocast import no_autocast
from ...backends import choice
from ...backends.errors import first_order
from ...backends.selfcheck import Draw, Trial
from ...recompute import snapshot
from ..autograd import Function
from . import reference  # noqa: F401  loaded here because compiled code cannot import it on first use


class SensitivityFunction(Function):
    """Stacked output ``[1 + K, *batch, V]`` to q ``[K, *batch]``."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, metric: str, backend: str) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.metric, ctx.backend = metric, backend
        ctx.save_for_backward(y)
        with no_autocast(y.device.type):
            return choice.implementation("sensitivity", backend).sensitivity_fwd(y, metric)

    @staticmethod
    @first_order
    def backward(ctx: Any, q_bar: Tensor | None) -> tuple[Tensor | None, None, None]:
        if q_bar is None:
            return None, None, None
        (y,) = ctx.saved_tensors
        with no_autocast(y.device.type):
            y_bar = choice.implementation("sensitivity", ctx.backend).sensitivity_bwd(q_bar, y, ctx.metric)
        return y_bar, None, None


class SoftmaxFunction(Function):
    """``[1 + K, ..., V] -> [1 + K, ..., V]``, along the last axis."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, backend: str) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.backend = backend
        with no_autocast(x.device.type):
            y: Tensor = choice.implementation("sensitivity", backend).softmax_fwd(x)
        ctx.save_for_backward(snapshot(x, ctx.needs_input_grad[0]))
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, y_bar: Tensor | None) -> tuple[Tensor | None, None]:
        if y_bar is None:
            return None, None
        (x,) = ctx.saved_tensors
        with no_autocast(x.device.type):
            return choice.implementation("sensitivity", ctx.backend).softmax_bwd(y_bar, x), None


def trial(
    draw: Draw,
    name: str,
    dtypes: tuple[torch.dtype | None, ...],
    sizes: tuple[int, ...],
    metric: str,
    length: int = 5,
) -> Trial:
    """A small problem for the first-use check; sizes: stacks, classes; the metric is empty for the softmax."""
    stacks, classes = sizes or (2, 300)

    def run(backend: str, y: Tensor) -> tuple[Tensor]:
        if metric:
            return (SensitivityFunction.apply(y, metric, backend),)
        return (SoftmaxFunction.apply(y, backend),)

    return {"y": draw(dtypes[0], stacks, length, classes)}, run
