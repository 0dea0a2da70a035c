"""Sensitivities and softmax on stacked tensors, by the native CPU kernels; contracts as in reference.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...backends import cpu as native
from . import operators

#: metric -> its number in csrc
CODES = {"l2": 0, "logits": 0, "fisher": 1, "probs": 2}


@native.operator(operators.SENSITIVITY_FWD)
def sensitivity_fwd(y: Tensor, metric: str) -> Tensor:
    q = torch.empty((y.shape[0] - 1, *y.shape[1:-1]), dtype=torch.float32)
    native.call(
        "sensitivity_fwd", (native.rows(y), q.view(q.shape[0], math.prod(q.shape[1:]))), (CODES[metric],)
    )
    return q


@native.operator(operators.SENSITIVITY_BWD)
def sensitivity_bwd(q_bar: Tensor, y: Tensor, metric: str) -> Tensor:
    rows = native.rows(y)
    y_bar = native.empty_like(rows)
    q_bar = q_bar.reshape(q_bar.shape[0], math.prod(q_bar.shape[1:])).contiguous()
    native.call("sensitivity_bwd", (rows, q_bar, y_bar), (CODES[metric],))
    return y_bar.reshape(y.shape)


@native.operator(operators.SOFTMAX_FWD)
def softmax_fwd(x: Tensor) -> Tensor:
    rows = native.rows(x)
    y = native.empty_like(rows)
    native.call("softmax_fwd", (rows, y))
    return y.reshape(x.shape)


@native.operator(operators.SOFTMAX_BWD)
def softmax_bwd(y_bar: Tensor, x: Tensor) -> Tensor:
    rows = native.rows(x)
    x_bar = native.empty_like(rows)
    native.call("softmax_bwd", (rows, native.rows(y_bar), x_bar))
    return x_bar.reshape(x.shape)
