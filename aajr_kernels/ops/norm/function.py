"""The autograd Function of RMS norm and layer norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...autocast import no_autocast, outside_autocast
from ...backends import choice
from ...backends.errors import first_order
from ...backends.selfcheck import Draw, Trial
from ...recompute import make_recomputable, released, saved_tensors
from ..autograd import Function
from . import reference  # noqa: F401  loaded here because compiled code cannot import it on first use


class NormFunction(Function):
    """The norm of x or, with `residual`, of their sum, and the sum: ``[1 + K, *batch, C]``.

    One of x and `residual` may be ``[1, *batch, C]``. With `recompute` consumers do not keep the norm. Where x `passes`
    it is the second result: its other gradients are added in the backward of the norm.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        offset: float,
        centred: bool,
        backend: str,
        recompute: bool = False,
        passes: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.offset, ctx.centred, ctx.backend = eps, offset, centred, backend
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.stacks = x.shape[0], 0 if residual is None else residual.shape[0]
        y, stats, summed = _norm(ctx, x, weight, bias, residual)
        needed = any(ctx.needs_input_grad[:3])
        recompute = recompute and needed
        saved = (x if summed is None else summed, weight, stats) if needed else (None, None, None)
        ctx.save_for_backward(*saved, bias if recompute else None)
        if recompute:
            make_recomputable(ctx, y, _again)
        return y, x if passes else summed

    @staticmethod
    @first_order
    def backward(ctx: Any, y_bar: Tensor | None, sum_bar: Tensor | None) -> tuple[Tensor | None, ...]:
        need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        both, weight_bar, bias_bar = sum_bar, None, None
        if y_bar is not None:
            x, weight, stats, _ = released(ctx)
            needs = need_x or need_residual, need_weight, need_bias
            both, weight_bar, bias_bar = _gradients(ctx, y_bar, x, weight, stats, needs, sum_bar)
        # an input without tangents takes the primal's part
        x_bar, residual_bar = (
            None if both is None or not need else both if both.shape[0] == count else both[:count]
            for need, count in zip((need_x, need_residual), ctx.stacks)
        )
        return x_bar, residual_bar, weight_bar, bias_bar, *(None,) * 6


def _norm(
    ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    norm_fwd = choice.implementation("norm", ctx.backend).norm_fwd
    args = x, weight, bias, ctx.eps, ctx.offset, ctx.centred, residual
    results: tuple[Tensor, Tensor, Tensor | None] = outside_autocast(x.device.type, norm_fwd, *args)
    return results


def _again(ctx: Any) -> Tensor:
    """The normalised rows, from what was normalised."""
    x, weight, _, bias = saved_tensors(ctx)
    return _norm(ctx, x, weight, bias)[0]


def _gradients(
    ctx: Any,
    y_bar: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    stats: Tensor | None,
    needs: tuple[bool, bool, bool],
    sum_bar: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Cotangents of what was normalised, the weight and the bias, the latter two in their dtypes."""
    x_bar = weight_bar = bias_bar = None
    if x is None:  # only the bias is trained
        wide = torch.float64 if y_bar.dtype == torch.float64 else torch.float32
        with no_autocast(y_bar.device.type):
            bias_bar = y_bar[0].reshape(-1, y_bar.shape[-1]).sum(0, dtype=wide)
    else:
        norm_bwd = choice.implementation("norm", ctx.backend).norm_bwd
        args = y_bar, x, weight, stats, ctx.offset, ctx.centred, *needs, sum_bar
        x_bar, weight_bar, bias_bar = outside_autocast(y_bar.device.type, norm_bwd, *args)
    if weight_bar is not None and weight is not None and weight_bar.dtype != weight.dtype:
        weight_bar = weight_bar.to(weight.dtype)
    if bias_bar is not None:
        bias_bar = bias_bar.to(ctx.bias_dtype)
    return x_bar, weight_bar, bias_bar


def trial(
    draw: Draw,
    name: str,
    dtypes: tuple[torch.dtype | None, ...],
    sizes: tuple[int, ...],
    centred: bool,
    shifted: bool,
    passes: bool,
    length: int = 37,
) -> Trial:
    """A small problem for the first-use check; sizes: stacks of x and, for the sum, of the residual; features."""
    *stacks, size = sizes or (2, 2, 64)
    operands = {
        n: draw(d, count, length, size) for n, d, count in zip(("x", "residual"), dtypes, (*stacks, 1))
    }
    operands |= {n: draw(d, size) for n, d in zip(("weight", "bias"), dtypes[2:])}
    return operands, lambda backend, *tensors: NormFunction.apply(
        *tensors, 1e-5, float(shifted), centred, backend, False, passes
    )
