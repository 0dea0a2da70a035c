"""RMS norm and layer norm on stacked rows: Triton kernels, contracts and formulas as in :mod:`.reference`.

A program holds whole rows in registers: every stream is read once and written once in each direction. The tangents go
by one after another beside the primal, the next one's loads under way while one is reduced. In the backward a program
takes several tiles of rows and keeps its share of the parameter gradients in registers; the shares are added by a
second kernel in a fixed order. Rows too long for that are in :mod:`.triton_long`.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...backends.triton import launch as gpu
from ...backends.triton.layout import row_axes, within_reach
from ...backends.triton.replay import operator
from ...backends.triton.sums import column_sums
from . import operators
from .triton_long import _norm_bwd_long_kernel, _norm_fwd_long_kernel, _norm_weight_bwd_kernel
from .triton_short import _norm_bwd_kernel, _norm_fwd_kernel

#: features of a row that is held in registers, at most; in a backward beside the sums of the parameter gradients
_LONGEST, _LONGEST_BACKWARD = 8192, 4096
#: registers of a thread of a backward, by compilation at most so many and so many for every tangent, and those of a
#: multiprocessor
REGISTERS, _REGISTER_FILE = (92, 36), {"sm": 65536, "gfx": 131072}


def _tile(rows: int, size: int, architecture: str, per_thread: int) -> tuple[int, dict[str, int]]:
    """Number of tiles, and their rows, columns and warps, with about `per_thread` elements for a thread."""
    block_c = max(16, triton.next_power_of_2(size))
    block_r = max(1, 1024 // block_c)
    threads = max(128, min(512, block_r * block_c // per_thread))
    warps = threads // (64 if architecture.startswith("gfx") else 32)
    return triton.cdiv(rows, block_r), {"BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": warps}


@operator(operators.NORM_FWD)
def norm_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    stacks = max(x.shape[0], 0 if residual is None else residual.shape[0])
    y = torch.empty((stacks, *x.shape[1:]), dtype=x.dtype, device=x.device)
    summed = None if residual is None else torch.empty_like(y)
    x, residual = within_reach(x), within_reach(residual)
    rows, sizes, (x_strides, residual_strides) = row_axes((x, residual))
    shape = (2 * stacks if centred else stacks, rows)
    stats = torch.empty(shape, dtype=torch.float32, device=x.device)
    size = x.shape[-1]
    if rows == 0 or size == 0:
        return y, stats, summed
    arguments = (x, residual, _dense(weight), _dense(bias), y, summed, stats, x_strides, residual_strides)
    kernel, grid, options = _norm_fwd_kernel, *_tile(rows, size, gpu.architecture(x.device), 16)
    if size > _LONGEST:
        kernel, grid, options = _norm_fwd_long_kernel, rows, {"BLOCK": 4096, "num_warps": 8}
    gpu.launch(
        kernel,
        (grid,),
        x.device,
        *arguments,
        sizes,
        rows,
        size,
        float(eps),
        float(offset),
        K=stacks - 1,
        CENTRED=centred,
        X_TAN=x.shape[0] > 1,
        RESIDUAL_TAN=residual is not None and residual.shape[0] > 1,
        **options,
    )
    return y, stats, summed


@operator(operators.NORM_BWD)
def norm_bwd(
    y_bar: Tensor,
    x: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    offset: float,
    centred: bool,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    sum_bar: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x_bar = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else None
    size, arch = x.shape[-1], gpu.architecture(x.device)
    y_bar, x, sum_bar = within_reach(y_bar), within_reach(x), within_reach(sum_bar)
    rows, sizes, strides = row_axes((y_bar, x, sum_bar))
    if x.numel() == 0:
        w_bar, b_bar = (
            torch.zeros(size, dtype=torch.float32, device=x.device) if need else None
            for need in (need_weight, need_bias)
        )
        return x_bar, w_bar, b_bar
    long = size > _LONGEST_BACKWARD
    kernel, programs, options = _norm_bwd_kernel, *_tile(rows, size, arch, 8)
    if long:  # one block where the sums of the weight gradient are to stay in registers
        block, warps = (8192, 16) if size <= _LONGEST else (4096, 8)
        kernel, programs, options = _norm_bwd_long_kernel, rows, {"BLOCK": block, "num_warps": warps}
    sum_weight = need_weight and (need_x if long else True) and size <= _LONGEST
    sum_bias = need_bias and (need_x or need_weight) and not long
    if sum_weight or sum_bias:
        programs = min(programs, _resident(x.device, options["num_warps"], x.shape[0] - 1))
    w_parts, b_parts = (
        torch.empty((programs, size), dtype=torch.float32, device=x.device) if summed else None
        for summed in (sum_weight, sum_bias)
    )
    if need_x or sum_weight:
        gpu.launch(
            kernel,
            (programs,),
            x.device,
            y_bar,
            x,
            _dense(weight) if need_x else None,
            stats,
            sum_bar,
            x_bar,
            w_parts,
            *(() if long else (b_parts,)),
            *strides,
            sizes,
            rows,
            size,
            float(offset),
            K=x.shape[0] - 1,
            CENTRED=centred,
            **options,
        )
    w_bar = b_bar = None
    if need_weight:
        dtype = torch.float32 if weight is None else weight.dtype
        w_parts = _weight_parts(y_bar, x, stats, centred) if w_parts is None else w_parts
        w_bar = column_sums(w_parts, dtype)
    if need_bias:
        b_bar = column_sums(y_bar[0] if b_parts is None else b_parts)
    return x_bar, w_bar, b_bar


def _dense(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def _resident(device: torch.device, warps: int, tangents: int) -> int:
    """Programs of a backward that a device runs at once: as many as the registers of its multiprocessors hold.

    They share the rows, and each leaves partial sums of the parameter gradients: more would leave more of these. The
    shared memory of a program is a few bytes.
    """
    amd = gpu.architecture(device).startswith("gfx")
    registers = (REGISTERS[0] + REGISTERS[1] * tangents) * warps * (64 if amd else 32)
    return gpu.multiprocessors(device) * max(1, _REGISTER_FILE["gfx" if amd else "sm"] // registers)


def _weight_parts(y_bar: Tensor, x: Tensor, stats: Tensor, centred: bool) -> Tensor:
    """``[parts, C]`` in float32: partial sums of the weight's gradient over parts of the rows."""
    rows, sizes, strides = row_axes((y_bar, x))
    size, block_r, block_c = x.shape[-1], 4, 256
    parts = min(128, triton.cdiv(rows, block_r))
    w_parts = torch.empty((parts, size), dtype=torch.float32, device=x.device)
    gpu.launch(
        _norm_weight_bwd_kernel,
        (triton.cdiv(size, block_c), parts),
        x.device,
        y_bar,
        x,
        stats,
        w_parts,
        *strides,
        sizes,
        rows,
        size,
        triton.cdiv(rows, parts),
        K=x.shape[0] - 1,
        CENTRED=centred,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        num_warps=4,
    )
    return w_parts
