"""The autograd Function of RMS norm and layer norm."""

from __future__ import annotations

from typing import Any

import torch

from ... import runtime
from . import reference  # noqa: F401  loaded here because compiled code cannot import it on first use


class NormFunction(torch.autograd.Function):
    """``[1 + K, *batch, C]`` in, the same shape out."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        offset: float,
        centred: bool,
        backend: str,
    ) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.offset, ctx.centred, ctx.backend = offset, centred, backend
        ctx.bias_dtype = None if bias is None else bias.dtype
        with runtime.no_autocast(x.device.type):
            y, stats = runtime.implementation("norm", backend).norm_fwd(x, weight, bias, eps, offset, centred)
        need_x, need_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(*((x, weight, stats) if need_x or need_weight else (None, None, None)))
        return y

    @staticmethod
    @runtime.first_order
    def backward(ctx: Any, y_bar: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if y_bar is None:
            return (None,) * 7
        x, weight, stats = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        weight_bar = bias_bar = x_bar = None
        with runtime.no_autocast(y_bar.device.type):
            if x is None:  # only the bias is trained
                wide = torch.float64 if y_bar.dtype == torch.float64 else torch.float32
                bias_bar = (
                    y_bar[0].flatten(0, -2).sum(0, dtype=wide) if y_bar.dim() > 2 else y_bar[0].to(wide)
                )
            else:
                x_bar, weight_bar, bias_bar = runtime.implementation("norm", ctx.backend).norm_bwd(
                    y_bar, x, weight, stats, ctx.offset, ctx.centred, need_x, need_weight, need_bias
                )
        if weight_bar is not None:
            weight_bar = weight_bar.to(weight.dtype)
        if bias_bar is not None:
            bias_bar = bias_bar.to(ctx.bias_dtype)
        return x_bar, weight_bar, bias_bar, None, None, None, None
