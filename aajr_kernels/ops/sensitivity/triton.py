"""Sensitivities and softmax on stacked tensors: Triton kernels, contracts as in :mod:`.reference`.

One program a row, which it reads in blocks: a vocabulary is as good as a few classes. The first pass gathers the
moments of ż under softmax; a backward and softmax itself read the row again, mostly from cache.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...backends.triton import launch as gpu
from ...backends.triton.layout import row_axes, within_reach
from ...backends.triton.replay import operator
from . import operators
from .triton_kernels import (
    _sensitivity_bwd_kernel,
    _sensitivity_fwd_kernel,
    _softmax_bwd_kernel,
    _softmax_fwd_kernel,
)

_METRICS = {"l2": "squares", "logits": "squares", "fisher": "fisher", "probs": "probs"}


def _tile(k: int, size: int, device: torch.device) -> dict[str, int]:
    """Tangents and columns of a block, and the warps that read it."""
    kp = max(1, triton.next_power_of_2(k))
    block = min(max(16, triton.next_power_of_2(size)), max(256, 4096 // kp))
    warps = max(1, min(8, block * kp // 512))
    if gpu.architecture(device).startswith("gfx"):
        warps = max(1, warps // 2)
    return {"K": k, "KP": kp, "BLOCK": block, "num_warps": warps}


@operator(operators.SENSITIVITY_FWD)
def sensitivity_fwd(y: Tensor, metric: str) -> Tensor:
    """q ``[K, *batch]`` in float32 of a stacked output ``[1 + K, *batch, V]``."""
    y = within_reach(y)
    k, size = y.shape[0] - 1, y.shape[-1]
    q = torch.empty((k, *y.shape[1:-1]), dtype=torch.float32, device=y.device)
    rows, sizes, strides = row_axes((y,))
    tile = _tile(k, size, y.device)
    gpu.launch(
        _sensitivity_fwd_kernel,
        (rows if k else 0,),
        y.device,
        y,
        q,
        *strides,
        sizes,
        rows,
        size,
        METRIC=_METRICS[metric],
        **tile,
    )
    return q


@operator(operators.SENSITIVITY_BWD)
def sensitivity_bwd(q_bar: Tensor, y: Tensor, metric: str) -> Tensor:
    """Stacked cotangent of y; q_bar is ``[K, *batch]``."""
    y = within_reach(y)
    y_bar = torch.empty_like(y)
    k, size = y.shape[0] - 1, y.shape[-1]
    rows, sizes, strides = row_axes((y, y_bar))
    gpu.launch(
        _sensitivity_bwd_kernel,
        (rows if size else 0,),
        y.device,
        q_bar.contiguous(),
        y,
        y_bar,
        *strides,
        sizes,
        rows,
        size,
        METRIC=_METRICS[metric],
        **_tile(k, size, y.device),
    )
    return y_bar


@operator(operators.SOFTMAX_FWD)
def softmax_fwd(x: Tensor) -> Tensor:
    """Stacked p and ``p∘(ẋ_k − Σ p ẋ_k)`` of ``[1 + K, ..., V]``, along the last axis."""
    x = within_reach(x)
    y = torch.empty_like(x)
    size = x.shape[-1]
    rows, sizes, strides = row_axes((x, y))
    tile = _tile(x.shape[0] - 1, size, x.device)
    grid = (rows if size else 0,)
    gpu.launch(_softmax_fwd_kernel, grid, x.device, x, y, *strides, sizes, rows, size, **tile)
    return y


@operator(operators.SOFTMAX_BWD)
def softmax_bwd(y_bar: Tensor, x: Tensor) -> Tensor:
    """Stacked cotangent of x."""
    y_bar, x = within_reach(y_bar), within_reach(x)
    x_bar = torch.empty_like(x)
    size = x.shape[-1]
    rows, sizes, strides = row_axes((y_bar, x, x_bar))
    tile = _tile(x.shape[0] - 1, size, x.device)
    grid = (rows if size else 0,)
    tensors = (y_bar, x, x_bar)
    gpu.launch(_softmax_bwd_kernel, grid, x.device, *tensors, *strides, sizes, rows, size, **tile)
    return x_bar
