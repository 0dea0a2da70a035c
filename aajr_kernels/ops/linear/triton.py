"""The linear layer on stacked rows: torch's matrix products, the gradient of the bias in Triton.

Contracts as in :mod:`.reference`.

The products run in the dtype of the rows, cuBLAS and hipBLAS accumulate in float32; W̄ is one product over the rows of
primal and tangents, twice the inner dimension and one write. The bias is added to the primal's rows only: in float32 in
place, in low dtypes by the product itself before it rounds. Its gradient sums the rows of the primal's cotangent in a
fixed order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backends.triton.sums import column_sums
from . import reference


def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.compiler.is_compiling():
        return reference.linear_fwd(x, weight, bias)
    shape = (*x.shape[:-1], weight.shape[0])
    if bias is not None and x.dtype in reference.LOW:
        return reference.affine_(x.new_empty(shape), x, weight, bias)
    # the same product; of rows that have to be copied torch makes many
    y = F.linear(x, weight) if x.is_contiguous() else x.flatten(0, -2).mm(weight.t()).view(shape)
    if bias is not None:
        y[0] += bias
    return y


def linear_bwd(
    y_bar: Tensor, x: Tensor | None, weight: Tensor | None, need_bias: bool, x_bar: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if torch.compiler.is_compiling():
        return reference.linear_bwd(y_bar, x, weight, need_bias, x_bar)
    weight_bar = None
    rows = y_bar.flatten(0, -2)
    if weight is not None and x_bar is not None:
        x_bar.flatten(0, -2).addmm_(rows, weight)
    elif weight is not None:
        x_bar = rows.mm(weight).view(*y_bar.shape[:-1], weight.shape[1])
    if x is not None:
        weight_bar = rows.t().mm(x.flatten(0, -2))
    return x_bar, weight_bar, column_sums(y_bar[0], y_bar.dtype) if need_bias else None
