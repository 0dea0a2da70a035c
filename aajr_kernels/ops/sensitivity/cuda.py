"""Sensitivities of stacked outputs by the CUDA C++ kernels; contracts as in reference.py. Softmax has none."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...backends import cpu as native
from ...backends import cuda
from . import operators
from .cpu import CODES

#: numbers that a tile, and the whole, know of a row, and of each of its tangents (csrc/cuda/sensitivity.h)
_TILE, _MOMENTS = (3, 4), (2, 4)


@cuda.operator(operators.SENSITIVITY_FWD)
def sensitivity_fwd(y: Tensor, metric: str) -> Tensor:
    q = torch.empty((y.shape[0] - 1, *y.shape[1:-1]), dtype=torch.float32, device=y.device)
    flat = q.view(q.shape[0], math.prod(q.shape[1:]))
    cuda.call("sensitivity_fwd", (native.rows(y), flat, _parts(y, metric)), (CODES[metric],))
    return q


@cuda.operator(operators.SENSITIVITY_BWD)
def sensitivity_bwd(q_bar: Tensor, y: Tensor, metric: str) -> Tensor:
    rows = native.rows(y)
    y_bar = torch.empty(rows.shape, dtype=y.dtype, device=y.device)
    k, count = q_bar.shape[0], math.prod(q_bar.shape[1:])
    parts = moments = None
    if CODES[metric] != CODES["l2"]:
        parts = _parts(y, metric)
        moments = torch.empty((_MOMENTS[0] + _MOMENTS[1] * k, count), dtype=torch.float32, device=y.device)
    q_bar = q_bar.reshape(k, count).contiguous()
    cuda.call("sensitivity_bwd", (rows, q_bar, parts, moments, y_bar), (CODES[metric],))
    return y_bar.reshape(y.shape)


def _parts(y: Tensor, metric: str) -> Tensor:
    """Room for what the tiles of the rows find, ``[tiles, fields, rows]``."""
    k = y.shape[0] - 1
    tiles = max(1, -(-y.shape[-1] // cuda.module().tile))
    fields = k if CODES[metric] == CODES["l2"] else _TILE[0] + _TILE[1] * k
    return torch.empty((tiles, fields, math.prod(y.shape[1:-1])), dtype=torch.float32, device=y.device)
