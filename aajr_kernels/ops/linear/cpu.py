"""The linear layer on stacked rows: torch's matrix products, native bias; contracts as in :mod:`.reference`.

While torch.compile traces, it gets products and sums that it knows: they fuse with what is around them.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...backends.cpu import call, empty, few_axes, row_dense
from ...backends.operator import constant
from . import reference


def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.compiler.is_compiling():
        wide = _wide(x.dtype, x, weight, bias)
        return reference.linear_fwd(*wide).to(x.dtype)  # type: ignore[arg-type]
    bias = None if bias is None else row_dense(bias)
    if _widen(x.dtype):
        product = torch.nn.functional.linear(x.float(), weight.float())
        y = empty(product.shape, dtype=x.dtype)
        call("linear_bias", (few_axes(product.contiguous()), few_axes(y), bias))
        return y
    shape = (*x.shape[:-1], weight.shape[0])
    if bias is not None and x.dtype in reference.LOW:
        return reference.affine_(empty(shape, dtype=x.dtype), x, weight, bias)
    y = _product(x.flatten(0, -2), weight.t(), shape)
    if bias is not None:
        rows = few_axes(y)
        call("linear_bias", (rows, rows, bias))  # of the primal, the first of the stacked tensors
    return y


def linear_bwd(
    y_bar: Tensor, x: Tensor | None, weight: Tensor | None, need_bias: bool, x_bar: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if torch.compiler.is_compiling():
        g, wide_x, wide_weight = _wide(y_bar.dtype, y_bar, x, weight)
        assert g is not None
        bars = reference.linear_bwd(g, wide_x, wide_weight, need_bias, x_bar)
        return tuple(None if bar is None else bar.to(y_bar.dtype) for bar in bars)  # type: ignore[return-value]
    bias_bar = None
    if need_bias:
        bias_bar = torch.empty(y_bar.shape[-1], dtype=y_bar.dtype)
        call("column_sum", (row_dense(few_axes(y_bar)), bias_bar))
    if _widen(y_bar.dtype):
        wide_x, wide_weight = (None if t is None else t.float() for t in (x, weight))
        x_bar, weight_bar, _ = reference.linear_bwd(y_bar.float(), wide_x, wide_weight, False, x_bar)
        x_bar, weight_bar = (None if t is None else t.to(y_bar.dtype) for t in (x_bar, weight_bar))
        return x_bar, weight_bar, bias_bar
    rows = y_bar.flatten(0, -2)
    if weight is not None and x_bar is not None:
        x_bar.flatten(0, -2).addmm_(rows, weight)
    elif weight is not None:
        x_bar = _product(rows, weight, (*y_bar.shape[:-1], weight.shape[1]))
    weight_bar = None if x is None else rows.t().mm(x.flatten(0, -2))
    return x_bar, weight_bar, bias_bar


def _product(a: Tensor, b: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The product of two matrices, seen in that shape."""
    out = empty(shape, dtype=a.dtype)
    torch.mm(a, b, out=out.view(a.shape[0], b.shape[1]))
    return out


def _wide(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in float32 where products are faster there."""
    return tuple(None if t is None else t.float() for t in tensors) if _widen(dtype) else tensors


@constant
def _widen(dtype: torch.dtype) -> bool:
    """Whether products of a low dtype are faster in float32, conversions included.

    Without instructions for it torch multiplies low dtypes element by element, up to 70 times slower than float32.
    """
    return dtype != torch.float32 and _lacks_products(dtype)


@functools.cache
def _lacks_products(dtype: torch.dtype) -> bool:
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    supported = getattr(torch.ops.mkldnn, name, None)
    return supported is not None and not supported()
