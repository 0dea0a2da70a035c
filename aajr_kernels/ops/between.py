"""What layers do between ops, as ops: views of heads, and sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.errors import first_order
from .autograd import Function

__all__ = ["Heads", "Joined", "Sum", "Turned"]


class Heads(Function):
    """``[..., N, H D]`` to ``[..., N, H, D]``, or where it is `turned` to ``[..., H, N, D]``: a view."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, turned: bool) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.turned = x.shape, turned
        y = x.view(*x.shape[:-1], -1, size)
        return y.transpose(-2, -3) if turned else y

    @staticmethod
    @first_order
    def backward(ctx: Any, y_bar: Tensor | None) -> tuple[Tensor | None, None, None]:
        if y_bar is not None:
            y_bar = (y_bar.transpose(-2, -3) if ctx.turned else y_bar).reshape(ctx.shape)
        return y_bar, None, None


class Turned(Function):
    """``[..., N, H, D]`` to ``[..., H, N, D]``: a view."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return x.transpose(-2, -3)

    @staticmethod
    @first_order
    def backward(ctx: Any, y_bar: Tensor | None) -> Tensor | None:
        return None if y_bar is None else y_bar.transpose(-2, -3)


class Joined(Function):
    """``[..., H, N, D]`` to ``[..., N, H D]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.size = x.shape[-1]
        return x.transpose(-2, -3).flatten(-2)

    @staticmethod
    @first_order
    def backward(ctx: Any, y_bar: Tensor | None) -> Tensor | None:
        return None if y_bar is None else y_bar.unflatten(-1, (-1, ctx.size)).transpose(-2, -3)


class Sum(Function):
    """Of two tensors of one shape and dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return torch.add(x, y)

    @staticmethod
    @first_order
    def backward(ctx: Any, bar: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return bar, bar
