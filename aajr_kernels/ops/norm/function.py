"""The autograd Function of RMS norm and layer norm."""

from __future__ import annotations

from typing import Any

import torch

from ...autocast import no_autocast
from ...backends import choice
from ...backends.errors import first_order
from ...recompute import make_recomputable, release, saved_tensors
from . import reference  # noqa: F401  loaded here because compiled code cannot import it on first use


class NormFunction(torch.autograd.Function):
    """``[1 + K, *batch, C]`` in, the same shape out; with `recompute` consumers do not keep it."""

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
        recompute: bool = False,
    ) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.offset, ctx.centred, ctx.backend = eps, offset, centred, backend
        ctx.bias_dtype = None if bias is None else bias.dtype
        with no_autocast(x.device.type):
            y, stats = choice.implementation("norm", backend).norm_fwd(x, weight, bias, eps, offset, centred)
        need_x, need_weight = ctx.needs_input_grad[:2]
        needed = need_x or need_weight
        recompute = recompute and needed
        kept = (bias,) if recompute else (None,)
        ctx.save_for_backward(*((x, weight, stats) if needed else (None, None, None)), *kept)
        if recompute:
            make_recomputable(ctx, y, _again)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, y_bar: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if y_bar is None:
            return (None,) * 8
        x, weight, stats, _ = saved_tensors(ctx)
        release(ctx)
        return *_gradients(ctx, y_bar, x, weight, stats, ctx.needs_input_grad[:3]), *(None,) * 5


class AddNormFunction(torch.autograd.Function):
    """The norm of ``x + residual`` and the sum, both ``[1 + K, *batch, C]``; either input may be ``[1, *batch, C]``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        offset: float,
        centred: bool,
        backend: str,
        recompute: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.offset, ctx.centred, ctx.backend = eps, offset, centred, backend
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.stacks = x.shape[0], residual.shape[0]
        with no_autocast(x.device.type):
            y, summed, stats = choice.implementation("norm", backend).add_norm_fwd(
                x, residual, weight, bias, eps, offset, centred
            )
        needed = any(ctx.needs_input_grad[:3])
        recompute = recompute and needed
        kept = (bias,) if recompute else (None,)
        ctx.save_for_backward(*((summed, weight, stats) if needed else (None, None, None)), *kept)
        if recompute:
            make_recomputable(ctx, y, _again)
        return y, summed

    @staticmethod
    @first_order
    def backward(
        ctx: Any, y_bar: torch.Tensor | None, sum_bar: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        both, weight_bar, bias_bar = sum_bar, None, None
        if y_bar is not None:
            summed, weight, stats, _ = saved_tensors(ctx)
            release(ctx)
            needs = need_x or need_residual, need_weight, need_bias
            both, weight_bar, bias_bar = _gradients(ctx, y_bar, summed, weight, stats, needs, sum_bar)
        bars = [
            both[:count]
            if need and both is not None
            else None  # an input without tangents takes the primal's part
            for need, count in zip((need_x, need_residual), ctx.stacks)
        ]
        return *bars, weight_bar, bias_bar, *(None,) * 5


def _again(ctx: Any) -> torch.Tensor:
    """The normalised rows, from what was normalised."""
    x, weight, _, bias = saved_tensors(ctx)
    with no_autocast(x.device.type):
        y, _ = choice.implementation("norm", ctx.backend).norm_fwd(
            x, weight, bias, ctx.eps, ctx.offset, ctx.centred
        )
    result: torch.Tensor = y
    return result


def _gradients(
    ctx: Any,
    y_bar: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    stats: torch.Tensor | None,
    needs: tuple[bool, bool, bool],
    sum_bar: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Cotangents of what was normalised, the weight and the bias, the latter two in their dtypes."""
    x_bar = weight_bar = bias_bar = None
    with no_autocast(y_bar.device.type):
        if x is None:  # only the bias is trained
            wide = torch.float64 if y_bar.dtype == torch.float64 else torch.float32
            bias_bar = y_bar[0].reshape(-1, y_bar.shape[-1]).sum(0, dtype=wide)
        else:
            x_bar, weight_bar, bias_bar = choice.implementation("norm", ctx.backend).norm_bwd(
                y_bar, x, weight, stats, ctx.offset, ctx.centred, *needs, sum_bar
            )
    if weight_bar is not None and weight is not None:
        weight_bar = weight_bar.to(weight.dtype)
    if bias_bar is not None:
        bias_bar = bias_bar.to(ctx.bias_dtype)
    return x_bar, weight_bar, bias_bar
