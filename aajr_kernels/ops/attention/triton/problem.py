"""Shared by the kernels of one call of attention: sizes, constants, scalars, descriptors."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ....backends.triton.launch import architecture, float32_products, launch
from ..configs import Tile, products, tile
from ..options import Options
from . import schedule
from .device import _pack_mask_kernel

# a gradient of a bias is shared among programs until there are this many: a constant, so that the order of its sums
# depends on nothing but the sizes
_BIAS_PROGRAMS = 1024
# statistics, and rows and columns of packed masks, are padded to a multiple of it: tiles read them without a mask
_PADDING = 128
_ROWS, _WORDS = 32, _PADDING // 32  # of a mask, packed by one program
# Triton compiles for whether 16 divides a stride: those of masks are its multiples, so that no length is another kernel
_ALIGNED = 16


def block_size(features: int) -> int:
    """Features of a tile: a power of two, and no product has an inner dimension below 16."""
    return max(16, 1 << (features - 1).bit_length())


@dataclass(frozen=True)
class Problem:
    """Arguments that all kernels of one call share.

    Attributes:
        q, k, v, mask: stacks ``[1|1+K, B, heads, positions, features]``; of a mask the part for these keys.
        options: their offset counts from the first of these keys.
        tangents: K, of the whole call.
        moves: whether the scores have tangents, of any key.
        context: the same queries with the keys and values of a context, which have no tangents; None without.
        before: keys of a context before these; None without.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    options: Options
    tangents: int
    moves: bool
    context: Problem | None = None
    before: int | None = None

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options) -> Problem:
        """That of a call, whose offset counts from the first key of all."""
        biased = [mask] if mask is not None and mask.dtype != torch.bool else []
        tangents = max(x.shape[0] for x in (q, k, v, *biased)) - 1
        moves = any(x.shape[0] > 1 for x in (q, k, *biased))
        if options.context is None:
            return cls(q, k, v, mask, options, tangents, moves)
        key, value = (row_dense(x) for x in options.context)
        length, options = key.shape[3], options._replace(context_k=None, context_v=None)
        before = after = options
        if options.offset is not None:
            after = options._replace(offset=options.offset - length)
            if options.window is None and options.offset >= length - 1:
                before = options._replace(offset=None)  # all queries see all of it: nothing to compare
        context = cls(q, key, value, of_keys(mask, slice(length)), before, tangents, moves)
        rest = of_keys(mask, slice(length, None))
        return cls(q, k, v, rest, after, tangents, moves, context, length)

    @property
    def parts(self) -> tuple[Problem, ...]:
        """One for the keys of a context, one for the others; without those that have no keys."""
        parts = (self,) if self.context is None else (self.context, self)
        return tuple(part for part in parts if part.k.shape[3])

    @property
    def mask_kind(self) -> int:
        return 0 if self.mask is None else 1 if self.mask.dtype == torch.bool else 2

    @property
    def split(self) -> bool:
        """Whether the two statistics of a row are kept apart."""
        return self.mask_kind == 2 or self.q.dtype == torch.float32

    @property
    def busy(self) -> str:
        """Step between the products and the weights that takes most registers, or an empty string."""
        options = self.options
        present = {
            "bias": self.mask_kind == 2,
            "softcap": options.softcap is not None,
            "dropout": options.dropout > 0,
            "packed": self.options.starts is not None,
        }
        return next((name for name, there in present.items() if there), "")

    @property
    def products(self) -> str:
        """How products of float32 are formed."""
        arch, sizes = architecture(self.q.device), (self.q.shape[-1], self.v.shape[-1])
        return products(float32_products(self.q), arch, *sizes, self.busy)

    def pinned(self, kernel: str) -> bool:
        """Whether operands are pinned, lest products wait for one another; where they do not, it costs registers."""
        large = block_size(max(self.q.shape[-1], self.v.shape[-1])) > 64
        free = (
            self.options.window is not None
            or (large and self.busy == "dropout" and kernel != "dv")
            or (kernel == "fwd" and self.busy == "packed")
        )
        return architecture(self.q.device) == "sm_90" and not free

    @property
    def padded(self) -> int:
        return -(-self.q.shape[3] // _PADDING) * _PADDING

    def constants(self, index: int) -> dict[str, Any]:
        """Constants of the kernels for the tangent `index`; -1 is none."""
        options, (D, V) = self.options, (self.q.shape[-1], self.v.shape[-1])
        some = index >= 0
        return {
            "GROUP": self.q.shape[2] // self.k.shape[2],
            "D": D,
            "V": V,
            "BLOCK_D": block_size(D),
            "BLOCK_V": block_size(V),
            "CAUSAL": options.offset is not None,
            "WINDOW": options.window is not None,
            "MASK": self.mask_kind,
            "SOFTCAP": options.softcap is not None,
            "DROPOUT": options.dropout > 0,
            "MOVES": some and self.moves,
            "Q_TAN": some and self.q.shape[0] > 1,
            "K_TAN": some and self.k.shape[0] > 1,
            "V_TAN": some and self.v.shape[0] > 1,
            "MASK_TAN": some and self.mask_kind == 2 and self.mask is not None and self.mask.shape[0] > 1,
            "PACKED": self.options.starts is not None,
            "ALIGN_RIGHT": options.align_right,
            "FIRST": index <= 0,
            "SPLIT": self.split,
            "PRECISION": self.products,
        }

    def scalars(self) -> tuple[Any, ...]:
        options = self.options
        (H, N), M = self.q.shape[2:4], self.k.shape[3]
        return (
            # floats: an int of 1 would become a constant of the kernel
            float(options.scale),
            float(options.softcap or 1.0),
            float(options.dropout),
            options.drawn,
            H,
            N,
            M,
            self.padded,
            options.offset or 0,
            options.window or 0,
        )

    @functools.cached_property
    def _bits(self) -> dict[bool, tuple[Tensor, tuple[int | None, ...]]]:
        """A boolean mask in words along the keys and, transposed, along the queries, once they are asked for."""
        return {}

    @functools.cached_property
    def _bias(self) -> Tensor:
        assert self.mask is not None
        return self.mask if architecture(self.q.device) == "" else aligned(self.mask)  # "": a dry run

    def masks(
        self, index: int, transposed: bool = False
    ) -> tuple[Tensor | None, Tensor | None, tuple[int | None, ...]]:
        """The mask, as bits if boolean, its tangent and its strides.

        0 where it is broadcast, and None if that is along the queries, or where all bits of a word are the same.
        """
        if self.mask is None:
            return None, None, (0, 0, 0, 0)
        if self.mask_kind == 1:
            if transposed not in self._bits:
                self._bits[transposed] = packed_mask(self.mask[0], transposed)
            bits, strides = self._bits[transposed]
            return bits, None, strides
        bias = self._bias
        b, h, i, j = (s if n > 1 else 0 for n, s in zip(bias.shape[1:], bias.stride()[1:]))
        return bias[0], stack(bias, index), (b, h, i or None, j)

    def grid(self, tile: int, padded: bool = False) -> tuple[int, int, int]:
        """Programs of blocks of queries."""
        batch, heads, positions = self.q.shape[1:4]
        size = self.padded if padded and self.options.starts is None else positions
        return schedule.grid(batch, heads, self.blocks(size, tile))

    def key_kernels(self, need_k: bool, need_v: bool) -> list[str]:
        """One kernel for both gradients where the accumulators of both fit into the registers, otherwise two."""
        if need_k and need_v and max(block_size(self.q.shape[-1]), block_size(self.v.shape[-1])) <= 64:
            return ["dkv"]
        return ["dv"] * need_v + ["dk"] * need_k

    def shared_heads(self, kernel: str) -> int:
        """Key heads and, where their programs are few, the parts of their groups of query heads."""
        batch, heads, keys = self.k.shape[1:4]
        programs = batch * heads * self.blocks(keys, self.tile(kernel).n)
        return heads * schedule.parts(programs, self.q.shape[2] // heads)

    @property
    def last_first(self) -> bool:
        """Whether the last keys are seen by the most queries: those of a context, if there is a window."""
        options = self.options
        return options.window is not None and (options.offset or 0) >= self.k.shape[3]

    def blocks(self, size: int, tile: int) -> int:
        """Programs along positions; of packed sequences as many as those of any lengths can have blocks."""
        starts = self.options.starts
        return -(-size // tile) if starts is None else size // tile + starts[0].shape[0] - 1

    def tile(self, kernel: str) -> Tile:
        """The tile of a kernel."""
        arch, causal = architecture(self.q.device), self.options.offset is not None
        sizes = self.q.shape[-1], self.v.shape[-1]
        return tile(kernel, arch, self.q.dtype, *sizes, causal, self.busy, self.products)

    def bias_grid(self, bias: tuple[int, ...]) -> tuple[int, int]:
        """Tiles of a bias ``[B|1, H|1, N|1, M|1]`` and the programs that share one.

        Several do where few tiles add up many others.
        """
        chosen = self.tile("bias")
        sizes = (*self.q.shape[1:3], -(-self.q.shape[3] // chosen.m), -(-self.k.shape[3] // chosen.n))
        tiles = math.prod(size for size, kept in zip(sizes, bias) if kept > 1)
        return tiles, max(1, min(math.prod(sizes), _BIAS_PROGRAMS) // tiles)


def stack(x: Tensor, index: int) -> Tensor:
    """Tangent `index` of a stacked tensor; the primal where it has none, as a stand-in that is never read."""
    return x[1 + index if x.shape[0] > 1 and index >= 0 else 0]


def of_keys(mask: Tensor | None, keys: slice) -> Tensor | None:
    """The part of a mask ``[..., M|1]`` for some of the keys."""
    return mask if mask is None or mask.shape[-1] == 1 else mask[..., keys]


def row_dense(x: Tensor) -> Tensor:
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def aligned(x: Tensor) -> Tensor:
    """`x`, copied with padded rows unless its strides are 1 or multiples of 16."""
    if all(s == 1 or s % _ALIGNED == 0 for n, s in zip(x.shape, x.stride()) if n > 1):
        return x
    distinct = x[tuple(slice(0, None if stride else 1) for stride in x.stride())]
    return padded_rows(distinct.shape, x.dtype, x.device).copy_(distinct).expand(x.shape)


def padded_rows(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a tensor whose strides are multiples of 16, but for the 1 of the last axis that has a length."""
    last = max((axis for axis, n in enumerate(shape) if n > 1), default=len(shape) - 1)
    padded = list(shape)
    padded[last] = -(-shape[last] // _ALIGNED) * _ALIGNED
    return torch.empty(padded, dtype=dtype, device=device).narrow(last, 0, shape[last])


def descriptors_fit(arch: str, *tensors: Tensor) -> bool:
    """Whether the tensor memory accelerator loads them: it wants rows of whole 16 bytes.

    Only where products read their operands from shared memory. Elsewhere the compiler takes what a descriptor loaded
    before the loop into registers for the whole of it, but leaves in shared memory what pointers loaded.
    """
    if not arch.startswith(("sm_9", "sm_10")):
        return False
    for x in tensors:
        size = x.element_size()
        strides = x.stride()[:-1]
        if x.data_ptr() % 16 or any(s * size % 16 or s <= 0 for s in strides) or size != 2:
            return False
        if not 8 <= x.shape[-1] <= 128 or 0 in x.shape:
            return False
    return True


def like(x: Tensor) -> Tensor:
    """Memory for a gradient, in the order of `x` where its last axis stays dense."""
    bar = torch.empty_like(x)
    return (
        bar
        if x.shape[-1] <= 1 or bar.stride(-1) == 1
        else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    )


def rows(x: Tensor, block: tuple[int, int], tma: bool) -> Any:
    """A tensor ``[B, H, N, D]`` as a kernel takes it."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, *block]) if tma else x


def packed_mask(mask: Tensor, transposed: bool) -> tuple[Tensor, tuple[int | None, ...]]:
    """A mask ``[B|1, H|1, N|1, M|1]`` in words along the keys, or transposed, along the queries.

    Returns:
        int32 words ``[B|1, H|1, rows, words]`` and strides as :func:`allowed` takes them: of batch rows and heads, 0
        where broadcast; of rows, None where all share one; of words, None where a first one, 0 or −1, is for all.
    """
    if transposed:
        mask = mask.transpose(2, 3)
    batch, heads, rows, cols = mask.shape
    shared = cols == 1
    if shared:  # all bits of a word the same
        mask, cols = mask.expand(batch, heads, rows, 32), 32
    pad = 1 if rows == 1 else _PADDING
    size = (-(-rows // pad) * pad, _ALIGNED * (-(-cols // (32 * _ALIGNED))))
    bits = torch.empty((batch, heads, *size), dtype=torch.int32, device=mask.device)
    block = 1 if rows == 1 else _ROWS
    launch(
        _pack_mask_kernel,
        (batch * heads, size[0] // block, size[1] // _WORDS),
        mask.device,
        mask,
        bits,
        *mask.stride()[:2],
        *(None if stride == 1 else stride for stride in mask.stride()[2:]),
        bits.stride()[:3],
        heads,
        rows,
        cols,
        ROWS=block,
        WORDS=_WORDS,
        num_warps=4,
    )
    strides = (
        bits.stride(0) if batch > 1 else 0,
        bits.stride(1) if heads > 1 else 0,
        None if rows == 1 else bits.stride(2),
        None if shared else 1,
    )
    return bits, strides
