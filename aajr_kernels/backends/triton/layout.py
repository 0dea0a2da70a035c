"""Rows of tensors with any strides, for kernels that work along the last axis.

A stacked tensor ``[S, *batch, C]`` is handed to a kernel with its strides, a tuple: of the stack, of the batch axes, of
the last axis. Batch axes that follow each other in memory in all tensors of a call are merged first, so that most calls
have one. The kernel turns the number of a row into an offset with :func:`.rows.row_offsets`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch

Strides = tuple[int, ...]


@overload
def within_reach(x: torch.Tensor) -> torch.Tensor: ...
@overload
def within_reach(x: torch.Tensor | None) -> torch.Tensor | None: ...


def within_reach(x: torch.Tensor | None) -> torch.Tensor | None:
    """`x`, copied where offsets along its last axis exceed the 32 bits in which kernels count columns."""
    far = x is not None and (x.shape[-1] - 1) * x.stride(-1) >= 1 << 31
    return x.contiguous() if far and x is not None else x


def row_axes(
    tensors: Sequence[torch.Tensor | None], guide: int | None = None
) -> tuple[int, tuple[int, ...], list[Strides]]:
    """Batch axes that all tensors share, as few as possible.

    Args:
        tensors: ``[S, *batch, C]`` each, S and C of their own; None where a kernel does without.
        guide: which of them decides the order of the rows: they follow each other as in its memory. By default the
            order is that of the axes. The first tensor, or the guide, must not be None.

    Returns:
        Number of rows, sizes of the axes (at least one) as kernels take them, and for every tensor its strides: stack,
        axes, last. None has strides of zero. The size n is given as 2n + 1, because Triton compiles another kernel for
        another divisibility by 16 of a number in a tuple; the first size is not needed and given as 0.
    """
    first = tensors[guide or 0]
    assert first is not None  # the launcher's choice
    count = 1
    for size in first.shape[1:-1]:
        count *= size
    axes = [axis for axis in range(1, first.dim() - 1) if first.shape[axis] != 1]
    if guide is not None:
        axes.sort(key=first.stride, reverse=True)
    batch = [[0] * len(axes) if t is None else [t.stride(axis) for axis in axes] for t in tensors]
    sizes: list[int] = []
    merged: list[list[int]] = [[] for _ in tensors]
    for i, axis in enumerate(axes):
        size = first.shape[axis]
        if sizes and all(m[-1] == b[i] * size for m, b in zip(merged, batch)):
            sizes[-1] *= size
            for m, b in zip(merged, batch):
                m[-1] = b[i]
            continue
        sizes.append(size)
        for m, b in zip(merged, batch):
            m.append(b[i])
    if not sizes:
        sizes, merged = [1], [[0] for _ in tensors]
    strides = [
        (0, *m, 0) if t is None else (t.stride(0), *m, t.stride(-1) if t.shape[-1] > 1 else 1)
        for t, m in zip(tensors, merged)
    ]
    return count, (0, *(2 * size + 1 for size in sizes[1:])), strides
