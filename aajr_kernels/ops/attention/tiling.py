"""The tiling of the reference: blocks, masks and scratch memory, which forward and backward share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .options import Options

# Tiles hold about this many numbers: a few of them stay in the caches of a CPU, a GPU wants fewer, larger launches.
TILE_NUMEL = 1 << 20
TILE_NUMEL_GPU = 1 << 25
# Rows of a tile (query heads of a group times query positions): fewer starve the matrix products, more waste work
# above the diagonal of a causal tile.
TILE_ROWS = 192
_LOG2E = 1.0 / math.log(2.0)


@dataclass(frozen=True)
class Block:
    """Query positions ``[start, stop)`` of the batch rows b and key heads h, and the keys ``[low, high)`` they see."""

    b: slice
    h: slice
    start: int
    stop: int
    low: int
    high: int
    shape: tuple[int, int, int, int]  # batch rows, key heads, query heads of a key head, query positions

    @property
    def rows(self) -> tuple[slice, ...]:
        """Index of the block in ``[B, HK, G, N, ..]``."""
        return self.b, self.h, slice(None), slice(self.start, self.stop)

    @property
    def keys(self) -> slice:
        return slice(self.low, self.high)

    def ungroup(self, tile: Tensor) -> Tensor:
        """``[batch, rows, x]`` as ``[b, h, G, positions, x]``."""
        return tile.view(*self.shape, tile.shape[-1])

    def take(self, x: Tensor) -> Tensor:
        """The block of ``[B, HK, G, N, ..]`` as ``[batch, rows, ..]``."""
        return x[self.rows].flatten(0, 1).flatten(1, 2)

    def part(self, mask: Tensor) -> Tensor:
        """The block of ``[B|1, HK|1, G|1, N|1, M|1]``."""
        index = (*self.rows, self.keys)
        return mask[tuple(slice(None) if n == 1 else i for n, i in zip(mask.shape, index, strict=True))]

    def add_part_(self, total: Tensor, tile: Tensor) -> None:
        """Add a tile to its block of ``[B|1, HK|1, G|1, N|1, M|1]``, summed over the axes that were broadcast."""
        part = self.part(total)
        part.add_(self.ungroup(tile).sum_to_size(part.shape))


class Tiles:
    """Grouped views of the inputs, the tiling, and the tiles that forward and backward share.

    The keys are those of a call without a context, or of one of the two parts of a call with one. `tangents` and
    `has_scores` (whether the scores of some key have tangents) are those of the call.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        options: Options,
        tangents: int,
        has_scores: bool,
    ) -> None:
        self.options = options
        _, self.B, H, self.N, self.D = q.shape
        self.HK, self.M, self.V = k.shape[2], k.shape[3], v.shape[4]
        self.G = H // self.HK
        self.K = tangents
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.device = q.device
        self.q, self.k, self.v = q.unflatten(2, (self.HK, self.G)), k, v
        self.bias = self.allowed = None
        if mask is not None:
            mask = self.grouped(mask)
            self.bias, self.allowed = (None, mask[0]) if mask.dtype == torch.bool else (mask, None)
        self.has_q, self.has_k, self.has_v = (x.shape[0] > 1 for x in (q, k, v))
        self.has_bias = self.bias is not None and self.bias.shape[0] > 1
        # if the scores have no tangents, only the values do, and c_k = 0
        self.has_scores = has_scores
        # in [K'_k | K | 1] the ones are next to the keys in use if the queries have tangents; a cap acts before mu
        self.rides = self.has_q and options.softcap is None
        # exp2 is cheaper than exp, but a bias near the largest number must not be multiplied by log2(e)
        self.unit, self.exp_ = (_LOG2E, torch.exp2_) if self.bias is None else (1.0, torch.exp_)
        self.keep = None if options.drawn is None else options.drawn.unflatten(1, (self.HK, self.G))
        self.workspace: dict[str, Tensor] = {}

    def grouped(self, mask: Tensor) -> Tensor:
        """A mask ``[J, B|1, H|1, N|1, M|1]`` as ``[J, B|1, HK|1, G|1, N|1, M|1]``."""
        return mask.unsqueeze(3) if mask.shape[2] == 1 else mask.unflatten(2, (self.HK, self.G))

    def plan(self) -> list[tuple[slice, slice, list[Block]]]:
        """Chunks of batch rows and key heads that are processed one after another, each with its query blocks."""
        if 0 in (self.B, self.HK, self.G, self.N, self.M):
            return []
        budget = TILE_NUMEL if self.device.type == "cpu" else TILE_NUMEL_GPU
        step = min(self.N, max(1, TILE_ROWS // self.G))
        heads = max(1, budget // (self.G * step * self.M))
        batch = max(1, heads // self.HK)
        heads = -(-self.HK // -(-self.HK // min(heads, self.HK)))  # chunks of about equal size
        chunks = []
        for b in slices(self.B, batch):
            for h in slices(self.HK, heads):
                blocks = []
                for rows in slices(self.N, step):
                    low, high = self.visible(rows.start, rows.stop)
                    shape = (b.stop - b.start, h.stop - h.start, self.G, rows.stop - rows.start)
                    if low < high:
                        blocks.append(Block(b, h, rows.start, rows.stop, low, high, shape))
                chunks.append((b, h, blocks))
        return chunks

    def visible(self, start: int, stop: int) -> tuple[int, int]:
        """The keys ``[low, high)`` that some query in ``[start, stop)`` may see."""
        offset, window = self.options.offset, self.options.window
        if offset is None:
            return 0, self.M
        return 0 if window is None else max(0, start + offset - window + 1), min(self.M, stop + offset)

    def tile(self, name: str, *shape: int) -> Tensor:
        """A contiguous scratch tensor of that shape; the memory of a name is reused from block to block."""
        numel = math.prod(shape)
        flat = self.workspace.get(name)
        if flat is None or flat.numel() < numel:
            flat = self.workspace[name] = torch.empty(numel, dtype=self.dtype, device=self.device)
        return flat[:numel].view(shape)

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """``a @ b`` for batches of matrices, in the scratch memory `name`."""
        return torch.bmm(a, b, out=self.tile(name, a.shape[0], a.shape[1], b.shape[2]))

    def pack(
        self, name: str, parts: list[Tensor], scale: float = 1.0, column: Tensor | float | None = None
    ) -> Tensor:
        """Tensors ``[b, h, *rows, width]`` side by side, times `scale`, then `column`: ``[b h, rows, widths]``."""
        lead, width = parts[0].shape[:-1], sum(part.shape[-1] for part in parts)
        packed, at = self.tile(name, *lead, width + (column is not None)), 0
        for part in parts:
            packed[..., at : at + part.shape[-1]].copy_(part)
            at += part.shape[-1]
        if scale != 1.0:
            packed[..., :at].mul_(scale)
        packed = packed.flatten(0, 1).flatten(1, -2)
        if column is not None:
            packed[..., at] = column
        return packed

    def keys(self, b: slice, h: slice) -> list[Tensor]:
        """Per tangent [K'_k | K | 1]; only [K | 1] without tangents."""
        if self.k.shape[0] == 1:
            return [self.pack("keys", [self.k[0, b, h]], column=1.0)]
        return [
            self.pack(f"keys{j}", [k, self.k[0, b, h]], column=1.0) for j, k in enumerate(self.k[1:, b, h])
        ]

    def values(self, b: slice, h: slice) -> Tensor:
        """[V'_1 | .. | V'_K | V | 1]."""
        return self.pack("values", [*self.v[1:, b, h], self.v[0, b, h]], column=1.0)

    def scores(self, at: Block, keys: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The masked scores less the shift, in the unit of the exponential; and tanh(S0 / c) with a softcap."""
        cap, tau = self.options.softcap, None
        keys = keys[:, at.keys, -self.D - 1 :]
        factor = self.options.scale * self.unit if cap is None else self.options.scale / cap
        s = self.product("p", self.pack("q", [self.q[0][at.rows]], factor), keys[..., :-1].mT)
        if cap is not None:
            tau = s.tanh_()
            s = torch.mul(tau, cap * self.unit, out=self.tile("capped", *tau.shape))
        self.mask_(at.ungroup(s), at)
        if shift is not None:  # not within the product: the largest score must round as it did in the forward
            s.sub_(shift.unsqueeze(-1))
        return s, tau

    def mask_(self, s: Tensor, at: Block) -> None:
        """Add the bias to a tile ``[b, h, G, rows, keys]`` and set the positions that are not allowed to -inf."""
        if self.bias is not None:
            s.add_(at.part(self.bias[0]))
        if self.allowed is not None:
            s.masked_fill_(at.part(self.allowed).logical_not(), -math.inf)
        offset, window = self.options.offset, self.options.window
        if offset is None:
            return
        last = torch.arange(at.start + offset, at.stop + offset, device=self.device).unsqueeze(1)
        first = max(at.low, at.start + offset + 1)  # the keys before it are seen by every row of the block
        if first < at.high:
            later = torch.arange(first, at.high, device=self.device) > last
            s[..., first - at.low :].masked_fill_(later, -math.inf)
        if window is not None and (stop := min(at.high, at.stop + offset - window)) > at.low:
            earlier = torch.arange(at.low, stop, device=self.device) <= last - window
            s[..., : stop - at.low].masked_fill_(earlier, -math.inf)

    def slope(self, tau: Tensor) -> Tensor:
        """cap' = 1 - tau^2."""
        return torch.mul(tau, tau, out=self.tile("slope", *tau.shape)).neg_().add_(1.0)

    def tangent(self, at: Block, keys: list[Tensor], j: int, mu: Tensor | None) -> tuple[Tensor, Tensor]:
        """S0'_j (less mu, if that can ride along), and the rows [s Q | s Q'_j] it was made of.

        Of the rows, a half is there only if its partner has tangents.
        """
        parts = ([self.q[0]] if self.has_k else []) + ([self.q[1 + j]] if self.has_q else [])
        if not parts:
            shape = (at.shape[0] * at.shape[1], at.shape[2] * at.shape[3], at.high - at.low)
            return self.tile("c", *shape).zero_(), self.q.new_empty(0)
        column = -mu if mu is not None and self.rides else None
        rows = self.pack("qs", [part[at.rows] for part in parts], self.options.scale, column)
        c = self.product("c", rows, self.partner(at, keys, j, rows.shape[-1]).mT)
        return c, rows[..., : len(parts) * self.D]

    def partner(self, at: Block, keys: list[Tensor], j: int, width: int) -> Tensor:
        """The columns of [K'_j | K | 1] that meet the rows of :meth:`tangent`."""
        return keys[j if self.has_k else 0][:, at.keys, :width]

    def finish_(self, c: Tensor, at: Block, j: int, slope: Tensor | None, mu: Tensor | None) -> Tensor:
        """Make S0'_j into S'_j (less mu)."""
        if slope is not None:
            c.mul_(slope)
        if self.bias is not None and self.bias.shape[0] > 1:
            at.ungroup(c).add_(at.part(self.bias[1 + j]))
        return c if mu is None or self.rides else c.sub_(mu.unsqueeze(-1))

    def weighted(self, name: str, rows: Tensor, values: Tensor, p: Tensor, drop: Tensor | None) -> Tensor:
        """P (M (rows values^T) - d) from rows [.. | -d] and values [.. | 1]."""
        if drop is None:
            return self.product(name, rows, values.mT).mul_(p)
        result = self.product(name, rows[..., :-1], values[..., :-1].mT).mul_(drop)
        return result.add_(rows[..., -1:]).mul_(p)

    def dropped(self, at: Block) -> Tensor | None:
        """The dropout mask of a tile with its factor 1 / (1 - p), None without dropout."""
        if self.keep is None:
            return None
        rows = at.part(self.keep).flatten(0, 1).flatten(1, 2)
        mask = self.tile("dropout", *rows.shape).copy_(rows)
        return mask.div_(1.0 - self.options.dropout) if self.options.dropout < 1 else mask


Part = tuple[Tensor, Tensor, "Tensor | None", Options]


def parts(k: Tensor, v: Tensor, mask: Tensor | None, options: Options) -> list[Part]:
    """Keys, values, mask and options of the context, if there is one, and of what follows it."""
    if options.context is None:
        return [(k, v, mask, options)]
    sizes, masks = (options.context_length, k.shape[-2]), (mask, mask)
    if mask is not None:
        masks = columns(mask, 0, sizes[0]), columns(mask, *sizes)
    first, rest = options.parts()
    return [(*options.context, masks[0], first), (k, v, masks[1], rest)]


def columns(mask: Tensor, start: int, count: int) -> Tensor:
    """The mask of `count` keys from `start`, a view."""
    return mask if mask.shape[-1] == 1 else mask.narrow(-1, start, count)


def slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def sequences(options: Options) -> Iterator[tuple[slice, slice, Options]]:
    """Packed sequences one by one: query rows, key rows and options of each; an empty one where there is none."""
    starts = options.starts or ()
    (rows, keys) = (x.tolist() if x.numel() > 1 else [0, 0] for x in starts)
    for q0, q1, k0, k1 in zip(rows, rows[1:], keys, keys[1:]):
        own = slice(q0, q1), slice(k0, k1)
        yield *own, options.of_sequence(*own)
