"""Sensitivities and softmax on stacked tensors: Triton kernels, contracts as in :mod:`.reference`.

One program a row, which it reads in blocks: a vocabulary is as good as a few classes. The first pass gathers the
moments of ż under softmax; a backward and softmax itself read the row again, mostly from cache.
"""

from __future__ import annotations

from typing import Any

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


def _launch(
    kernel: Any, tensors: tuple[Tensor, ...], strided: tuple[Tensor, ...], needed: int, **constants: Any
) -> None:
    """One program a row of the stacked tensors `strided`, whose strides follow the tensors; none if not `needed`."""
    rows, sizes, strides = row_axes(strided)
    (stacks, *_, size), device = strided[0].shape, strided[0].device
    tile = _tile(stacks - 1, size, device)
    grid = (rows if needed else 0,)
    gpu.launch(kernel, grid, device, *tensors, *strides, sizes, rows, size, **tile, **constants)


@operator(operators.SENSITIVITY_FWD)
def sensitivity_fwd(y: Tensor, metric: str) -> Tensor:
    y = within_reach(y)
    k = y.shape[0] - 1
    q = torch.empty((k, *y.shape[1:-1]), dtype=torch.float32, device=y.device)
    _launch(_sensitivity_fwd_kernel, (y, q), (y,), k, METRIC=_METRICS[metric])
    return q


@operator(operators.SENSITIVITY_BWD)
def sensitivity_bwd(q_bar: Tensor, y: Tensor, metric: str) -> Tensor:
    y = within_reach(y)
    y_bar = torch.empty_like(y)
    tensors = (q_bar.contiguous(), y, y_bar)
    _launch(_sensitivity_bwd_kernel, tensors, (y, y_bar), y.shape[-1], METRIC=_METRICS[metric])
    return y_bar


@operator(operators.SOFTMAX_FWD)
def softmax_fwd(x: Tensor) -> Tensor:
    x = within_reach(x)
    y = torch.empty_like(x)
    _launch(_softmax_fwd_kernel, (x, y), (x, y), x.shape[-1])
    return y


@operator(operators.SOFTMAX_BWD)
def softmax_bwd(y_bar: Tensor, x: Tensor) -> Tensor:
    y_bar, x = within_reach(y_bar), within_reach(x)
    x_bar = torch.empty_like(x)
    tensors = (y_bar, x, x_bar)
    _launch(_softmax_bwd_kernel, tensors, tensors, x.shape[-1])
    return x_bar
