"""Activations and gated products on stacked tensors: Triton kernels, contracts as in :mod:`.reference`.

Every stream is read once and written once. Tensors may have any strides: axes that follow each other in the memory of
all of them are merged, the last of what remains is that of the columns, the others are rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ...backends.triton import launch as gpu
from ...backends.triton.layout import row_axes
from ...backends.triton.replay import operator
from . import operators
from .triton_kernels import _gated_bwd_kernel, _gated_fwd_kernel, _pointwise_bwd_kernel, _pointwise_fwd_kernel


def _run(kernel: Any, tensors: Sequence[Tensor | None], guide: Tensor, **constants: Any) -> None:
    """Launch on tensors ``[S, *shape]``; the guide, one of them, decides what is neighbouring."""
    place = next(i for i, t in enumerate(tensors) if t is guide)
    # with an axis of one at the end all of the shape counts as batch
    count, sizes, strides = row_axes([None if t is None else t.unsqueeze(-1) for t in tensors], place)
    if count == 0:
        return
    strides = [(s[0], *(s[1:-2] or (0,)), s[-2]) for s in strides]
    cols = sizes[-1] >> 1 if len(sizes) > 1 else count
    rows, sizes = count // cols, sizes[:-1] or (0,)
    block_c = min(1024, max(16, triton.next_power_of_2(cols)))
    block_r = 1024 // block_c
    gpu.launch(
        kernel,
        (triton.cdiv(rows, block_r) * triton.cdiv(cols, block_c),),
        guide.device,
        *tensors,
        *strides,
        sizes,
        rows,
        cols,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        num_warps=2 if gpu.architecture(guide.device).startswith("gfx") else 4,
        **constants,
    )


@operator(operators.POINTWISE_FWD)
def pointwise_fwd(x: Tensor, kind: str) -> Tensor:
    y = torch.empty_like(x)
    _run(_pointwise_fwd_kernel, (x, y), y, KIND=kind, K=x.shape[0] - 1)
    return y


@operator(operators.POINTWISE_BWD)
def pointwise_bwd(y_bar: Tensor, x: Tensor, kind: str) -> Tensor:
    x_bar = torch.empty_like(x)
    _run(_pointwise_bwd_kernel, (y_bar, x, x_bar), x_bar, KIND=kind, K=x.shape[0] - 1)
    return x_bar


@operator(operators.GATED_FWD)
def gated_fwd(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    h = torch.empty_like(gate if gate.shape[0] > 1 else up)
    _run(_gated_fwd_kernel, (gate, up, h), h, KIND=kind, **_tangents(gate, up))
    return h


@operator(operators.GATED_BWD)
def gated_bwd(
    h_bar: Tensor, gate: Tensor, up: Tensor, kind: str, need_gate: bool, need_up: bool
) -> tuple[Tensor | None, Tensor | None]:
    gate_bar = torch.empty_like(gate) if need_gate else None
    up_bar = torch.empty_like(up) if need_up else None
    guide = up_bar if gate_bar is None else gate_bar
    if guide is not None:
        tensors = (h_bar, gate, up, gate_bar, up_bar)
        _run(_gated_bwd_kernel, tensors, guide, KIND=kind, **_tangents(gate, up))
    return gate_bar, up_bar


def _tangents(gate: Tensor, up: Tensor) -> dict[str, int | bool]:
    k = max(gate.shape[0], up.shape[0]) - 1
    return {"K": k, "GATE_TAN": gate.shape[0] > 1, "UP_TAN": up.shape[0] > 1}
