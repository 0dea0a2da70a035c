"""The linear layer on stacked rows, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

LOW = (torch.bfloat16, torch.float16)


def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Stacked output of a linear layer.

    Args:
        x: ``[1 + K, *batch, in]``.
        weight: ``[out, in]``.
        bias: ``[out]`` or None.

    Returns:
        ``[1 + K, *batch, out]``.
    """
    if bias is not None and x.dtype in LOW:
        # a product that is rounded before the bias is added loses all that cancels
        primal = torch.nn.functional.linear(x[:1], weight, bias)
        return torch.cat([primal, torch.nn.functional.linear(x[1:], weight)])
    y = torch.nn.functional.linear(x, weight)
    if bias is not None:
        y[0] += bias
    return y


def affine_(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """:func:`linear_fwd` of low dtypes into contiguous memory `y`, outside autograd and torch.compile."""
    rows, out = x.flatten(0, -2), y.flatten(0, -2)
    primal = rows.shape[0] // x.shape[0]
    torch.addmm(bias, rows[:primal], weight.t(), out=out[:primal])
    torch.mm(rows[primal:], weight.t(), out=out[primal:])
    return y


def linear_bwd(
    y_bar: Tensor, x: Tensor | None, weight: Tensor | None, need_bias: bool, x_bar: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Cotangents of the stacked input, the weight and the bias.

    Args:
        y_bar: ``[1 + K, *batch, out]``, cotangents of primal and tangents.
        x: the stacked input, or None where the weight needs no gradient.
        weight: ``[out, in]``, or None where the input needs no gradient.
        need_bias: whether the bias needs a gradient.
        x_bar: cotangent of the same input by other layers, to be added to; may be written to.

    Returns:
        ``(x_bar, weight_bar, bias_bar)``, None where not needed.
    """
    weight_bar = bias_bar = None
    if weight is not None:
        product = y_bar.matmul(weight)
        x_bar = product if x_bar is None else x_bar + product
    if x is not None:
        weight_bar = _rows(y_bar).t().mm(_rows(x))
    if need_bias:
        bias_bar = _rows(y_bar[0]).sum(0)
    return x_bar, weight_bar, bias_bar


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
