# mypy: disable-error-code="no-untyped-def, assignment"
"""Products over the tokens that count, whose number is on the device.

A library's product takes its sizes from the host. These stop at the count: the gradient of h leaves out blocks of rows,
that of the weight sums no further. Rows beyond the count may hold anything.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...backends.triton import launch as gpu
from .triton_config import product_tile
from .triton_kernels import _place


@triton.jit(do_not_specialize=["T", "stacks", "width"])
def _head_rows_kernel(
    part, weight, total, count, T, stacks, width, C, part_stride, w_stride, total_stride,
    BT: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """``total [stacks T, C] += part [stacks T, width] weight [width, C]`` in the rows that count of every stack."""
    blocks = tl.cdiv(T, BT)
    row, column = _place(tl.program_id(0), stacks * blocks, tl.cdiv(C, BC), GROUP)
    stack, block = row // blocks, row % blocks
    counting = tl.load(count)
    if block * BT >= counting:
        return
    tokens = block * BT + tl.arange(0, BT)
    inside = (tokens < counting)[:, None]
    rows = (stack * T + tokens).to(tl.int64)[:, None]
    c = column * BC + tl.arange(0, BC)
    valid = (c < C)[None, :]
    sums = tl.zeros((BT, BC), tl.float32)
    for k in range(0, width, BK):
        word = k + tl.arange(0, BK)
        a = tl.load(
            part + rows * part_stride + word[None, :], mask=inside & (word < width)[None, :], other=0.0
        )
        at = weight + tl.minimum(word, width - 1).to(tl.int64)[:, None] * w_stride + c[None, :]
        b = tl.load(at) if EVEN else tl.load(at, mask=valid, other=0.0)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    to = total + rows * total_stride + c[None, :]
    tl.store(to, tl.load(to, mask=inside & valid, other=0.0) + sums, mask=inside & valid)


@triton.jit(do_not_specialize=["T", "stacks", "width"])
def _head_weight_kernel(
    part, hidden, total, count, T, stacks, width, C, part_stride, h_stride, total_stride,
    BV: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, MORE: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``total [width, C]``, or what is added to it, is ``partᵀ hidden`` summed over the rows that count."""
    block, column = _place(tl.program_id(0), tl.cdiv(width, BV), tl.cdiv(C, BC), GROUP)
    counting = tl.load(count)
    v, c = block * BV + tl.arange(0, BV), column * BC + tl.arange(0, BC)
    words, valid = (v < width)[None, :], (c < C)[None, :]
    sums = tl.zeros((BV, BC), tl.float32)
    steps = tl.cdiv(counting, BK)
    for step in range(stacks * steps):
        stack = step // steps
        tokens = (step - stack * steps) * BK + tl.arange(0, BK)
        inside = (tokens < counting)[:, None]
        rows = (stack * T + tokens).to(tl.int64)[:, None]
        a = tl.load(part + rows * part_stride + v[None, :], mask=inside & words, other=0.0)
        at = hidden + rows * h_stride + c[None, :]
        b = tl.load(at, mask=inside if EVEN else inside & valid, other=0.0)
        sums = tl.dot(a.T, b, sums, input_precision=PRECISION)
    to = total + v.to(tl.int64)[:, None] * total_stride + c[None, :]
    store = (v < width)[:, None] & valid
    if MORE:
        sums += tl.load(to, mask=store, other=0.0)
    tl.store(to, sums, mask=store)


def _precision(part: Tensor) -> str:
    """How products of float32 are formed: three of tf32 for one have no budgets with these tiles."""
    offered = gpu.float32_products(part)
    return "ieee" if offered == "tf32x3" else offered


def add_rows(total: Tensor, part: Tensor, weight: Tensor, count: Tensor, tokens: int) -> None:
    """``total += part weight`` for stacks of `tokens` rows each, of which the first `count` count.

    Args:
        total: float32 ``[S · tokens, C]``.
        part: ``[S · tokens, v]``.
        weight: ``[v, C]``.
        count: int32 ``[]``.
    """
    device, precision = part.device, _precision(part)
    t = product_tile(gpu.architecture(device), part.dtype, precision)
    (width, size), stacks = weight.shape, part.shape[0] // tokens
    gpu.launch(
        _head_rows_kernel,
        (stacks * triton.cdiv(tokens, t.tokens) * triton.cdiv(size, t.columns),),
        device,
        *(part, weight, total, count, tokens, stacks, width, size),
        *(part.stride(0), weight.stride(0), total.stride(0)),
        BT=t.tokens,
        BC=t.columns,
        BK=t.depth,
        EVEN=size % t.columns == 0,
        PRECISION=precision,
        GROUP=8,
        num_warps=t.warps,
        num_stages=t.stages,
    )


def add_weight(total: Tensor, part: Tensor, hidden: Tensor, count: Tensor, tokens: int, more: bool) -> None:
    """``total = partᵀ hidden``, or with `more` added to what is there; as :func:`add_rows`.

    Args:
        total: float32 ``[v, C]``.
        part: ``[S · tokens, v]``.
        hidden: ``[S · tokens, C]``.
        count: int32 ``[]``.
        tokens: rows of a stack.
        more: whether `total` holds a sum.
    """
    device, precision = part.device, _precision(part)
    t = product_tile(gpu.architecture(device), part.dtype, precision)
    width, size = total.shape
    gpu.launch(
        _head_weight_kernel,
        (triton.cdiv(width, t.tokens) * triton.cdiv(size, t.columns),),
        device,
        *(part, hidden, total, count, tokens, part.shape[0] // tokens, width, size),
        *(part.stride(0), hidden.stride(0), total.stride(0)),
        BV=t.tokens,
        BC=t.columns,
        BK=t.depth,
        EVEN=size % t.columns == 0,
        MORE=more,
        PRECISION=precision,
        GROUP=8,
        num_warps=t.warps,
        num_stages=t.stages,
    )
