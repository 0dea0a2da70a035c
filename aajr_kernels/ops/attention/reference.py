"""Attention on stacked tensors in plain PyTorch: the specification of the op, tiled over blocks of query rows.

With s the scale, cap(x) = c tanh(x / c) or the identity, P = softmax(S) over the allowed keys, and M the dropout mask
with its factor 1 / (1 - p); a prime marks a tangent, tiles are multiplied elementwise where no ^T is near:

    S0 = s Q K^T,  S = cap(S0) + bias          S0'_k = s (Q'_k K^T + Q K'_k^T),  S'_k = cap'(S0) S0'_k + bias'_k
    O = (P M) V                                O'_k = (P M c_k) V + (P M) V'_k
                                               with mu_k = rowsum(P S'_k), c_k = S'_k - mu_k

With G and H_k the cotangents of O and O'_k, D1_k = rowsum(H_k O), D0 = rowsum(G O) + sum_k rowsum(H_k O'_k):

    dS'_k = P (M (H_k V^T) - D1_k)             dS = P (M (G V^T + sum_k H_k V'_k^T) - D0) + sum_k dS'_k c_k
    dS0'_k = cap' dS'_k                        dS0 = cap' dS + sum_k cap'' S0'_k dS'_k
    dV'_k = (P M)^T H_k                        dV = (P M)^T G + sum_k (P M c_k)^T H_k
    dQ'_k = s dS0'_k K                         dQ = s (dS0 K + sum_k dS0'_k K'_k)
    dK'_k = s dS0'_k^T Q                       dK = s (dS0^T Q + sum_k dS0'_k^T Q'_k)

and dS, dS'_k are the gradients of the bias and its tangents. With tau = tanh(S0 / c): cap' = 1 - tau^2 and
cap'' = -2 tau cap' / c.

A tile holds the scores of one block against the keys that it may see, so memory is linear in the sequence length. The
rows of all query heads that share a key head form one matrix, so keys are never repeated. Row constants (-shift, -mu,
-D0, -D1) ride along as one more column of a product whose other side is a column of ones, which saves a pass over the
tile. Tiles are float32 (float64 for float64 inputs).

Saved for the backward: the output and, per row, shift (the largest score), norm (1 / sum of the exponentials) and mu.
A row without an allowed key has shift +inf and norm 0: its output and all its gradients are zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Tiles hold about this many numbers: a few of them stay in the caches of a CPU, a GPU wants fewer, larger launches.
_TILE_NUMEL = 1 << 20
_TILE_NUMEL_GPU = 1 << 25
# Rows of a tile (query heads of a group times query positions): fewer starve the matrix products, more waste work
# above the diagonal of a causal tile.
_TILE_ROWS = 192
_LOG2E = 1.0 / math.log(2.0)


@dataclass(frozen=True)
class Options:
    """What to compute, beside the tensors.

    Attributes:
        scale: factor of the scores.
        softcap: c of c tanh(scores / c), or None.
        offset: query i sees the keys j <= i + offset; None without causality.
        window: and only the keys j > i + offset - window; None for all.
        dropout: probability of dropping an attention weight.
        seed: seed of the dropout mask.
    """

    scale: float
    softcap: float | None = None
    offset: int | None = None
    window: int | None = None
    dropout: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class _Block:
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


class _Tiles:
    """Grouped views of the inputs, the tiling, and the tiles that forward and backward share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options) -> None:
        self.options = options
        _, self.B, H, self.N, self.D = q.shape
        self.HK, self.M, self.V = k.shape[2], k.shape[3], v.shape[4]
        self.G = H // self.HK
        self.K = max(x.shape[0] for x in (q, k, v, mask) if x is not None) - 1
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.device = q.device
        self.q, self.k, self.v = q.unflatten(2, (self.HK, self.G)), k, v
        self.bias = self.allowed = None
        if mask is not None:
            mask = self.grouped(mask)
            self.bias, self.allowed = (None, mask[0]) if mask.dtype == torch.bool else (mask, None)
        self.has_q, self.has_k, self.has_v = (x.shape[0] > 1 for x in (q, k, v))
        self.has_bias = self.bias is not None and self.bias.shape[0] > 1
        # whether the scores have tangents; if not, only the values do, and c_k = 0
        self.has_scores = self.has_q or self.has_k or self.has_bias
        # in [K'_k | K | 1] the ones are next to the keys in use if the queries have tangents; a cap acts before mu
        self.rides = self.has_q and options.softcap is None
        # exp2 is cheaper than exp, but a bias near the largest number must not be multiplied by log2(e)
        self.unit, self.exp_ = (_LOG2E, torch.exp2_) if self.bias is None else (1.0, torch.exp_)
        self.generator = None
        if options.dropout > 0:
            self.generator = torch.Generator(device=q.device).manual_seed(options.seed)
        self.workspace: dict[str, Tensor] = {}

    def grouped(self, mask: Tensor) -> Tensor:
        """A mask ``[J, B|1, H|1, N|1, M|1]`` as ``[J, B|1, HK|1, G|1, N|1, M|1]``."""
        return mask.unsqueeze(3) if mask.shape[2] == 1 else mask.unflatten(2, (self.HK, self.G))

    def plan(self) -> list[tuple[slice, slice, list[_Block]]]:
        """Chunks of batch rows and key heads that are processed one after another, each with its query blocks."""
        if 0 in (self.B, self.HK, self.G, self.N, self.M):
            return []
        budget = _TILE_NUMEL if self.device.type == "cpu" else _TILE_NUMEL_GPU
        step = min(self.N, max(1, _TILE_ROWS // self.G))
        heads = max(1, budget // (self.G * step * self.M))
        batch = max(1, heads // self.HK)
        heads = -(-self.HK // -(-self.HK // min(heads, self.HK)))  # chunks of about equal size
        chunks = []
        for b in _slices(self.B, batch):
            for h in _slices(self.HK, heads):
                blocks = []
                for rows in _slices(self.N, step):
                    low, high = self.visible(rows.start, rows.stop)
                    shape = (b.stop - b.start, h.stop - h.start, self.G, rows.stop - rows.start)
                    if low < high:
                        blocks.append(_Block(b, h, rows.start, rows.stop, low, high, shape))
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
        """Per tangent [K'_k | K | 1]; [K | 1] alone without tangents."""
        if self.k.shape[0] == 1:
            return [self.pack("keys", [self.k[0, b, h]], column=1.0)]
        return [
            self.pack(f"keys{j}", [k, self.k[0, b, h]], column=1.0) for j, k in enumerate(self.k[1:, b, h])
        ]

    def values(self, b: slice, h: slice) -> Tensor:
        """[V'_1 | .. | V'_K | V | 1]."""
        return self.pack("values", [*self.v[1:, b, h], self.v[0, b, h]], column=1.0)

    def scores(self, at: _Block, keys: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The masked scores less the shift, in the unit of the exponential; and tanh(S0 / c) with a softcap."""
        cap, tau = self.options.softcap, None
        keys = keys[:, at.keys, -self.D - 1 :]
        # with a cap or a bias the shift comes last: a large bias must round as it did in the forward
        last = shift is not None and (cap is not None or self.bias is not None)
        column = None if shift is None or last else -shift
        factor = self.options.scale * self.unit if cap is None else self.options.scale / cap
        rows = self.pack("q", [self.q[0][at.rows]], factor, column)
        s = self.product("p", rows, keys[..., : rows.shape[-1]].mT)
        if cap is not None:
            tau = s.tanh_()
            s = torch.mul(tau, cap * self.unit, out=self.tile("capped", *tau.shape))
        self.mask_(at.ungroup(s), at)
        if shift is not None and last:
            s.sub_(shift.unsqueeze(-1))
        return s, tau

    def mask_(self, s: Tensor, at: _Block) -> None:
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

    def tangent(self, at: _Block, keys: list[Tensor], j: int, mu: Tensor | None) -> tuple[Tensor, Tensor]:
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

    def partner(self, at: _Block, keys: list[Tensor], j: int, width: int) -> Tensor:
        """The columns of [K'_j | K | 1] that meet the rows of :meth:`tangent`."""
        return keys[j if self.has_k else 0][:, at.keys, :width]

    def finish_(self, c: Tensor, at: _Block, j: int, slope: Tensor | None, mu: Tensor | None) -> Tensor:
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

    def dropped(self, like: Tensor) -> Tensor | None:
        """The dropout mask of the next tile with its factor 1 / (1 - p), None without dropout."""
        if self.generator is None:
            return None
        keep = 1.0 - self.options.dropout
        mask = self.tile("dropout", *like.shape).bernoulli_(keep, generator=self.generator)
        return mask.div_(keep) if keep > 0 else mask


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and its tangents.

    Args:
        q: ``[1 | 1+K, B, H, N, D]``, a leading 1 meaning that the tangents are zero, as below.
        k: ``[1 | 1+K, B, HK, M, D]`` with HK a divisor of H.
        v: ``[1 | 1+K, B, HK, M, V]``.
        mask: None, bool ``[1, B|1, H|1, N|1, M|1]`` (True = attend) or floating ``[1 | 1+K, B|1, H|1, N|1, M|1]``.
        options: scale, softcap, causality, window, dropout.

    Returns:
        out ``[1+K, B, H, N, V]`` in the dtype of q, and for the backward shift ``[B, H, N]``, norm ``[B, H, N]`` and
        mu ``[K | 0, B, H, N]`` in float32 (float64 for float64).
    """
    t = _Tiles(q, k, v, mask, options)
    B, HK, G, N, V, K = t.B, t.HK, t.G, t.N, t.V, t.K
    out = q.new_zeros(1 + K, B, HK, G, N, V)
    shift = torch.full((B, HK, G, N), math.inf, dtype=t.dtype, device=q.device)
    norm = torch.zeros_like(shift)
    mu = shift.new_zeros(K if t.has_scores else 0, B, HK, G, N)
    for b, h, blocks in t.plan():
        keys, values = t.keys(b, h), t.values(b, h)
        for at in blocks:
            p, tau = t.scores(at, keys[0], None)
            slope = None if tau is None else t.slope(tau)
            top = p.amax(-1, keepdim=True)
            top.masked_fill_(top == -math.inf, 0.0)
            t.exp_(p.sub_(top))
            total = p.sum(-1, keepdim=True)
            scaled = total.reciprocal().masked_fill_(total == 0, 0.0)
            norm[at.rows] = at.ungroup(scaled).squeeze(-1)
            shift[at.rows] = at.ungroup(top.masked_fill(total == 0, math.inf)).squeeze(-1)
            drop = t.dropped(p)
            kept = p if drop is None else torch.mul(p, drop, out=t.tile("kept", *p.shape))
            both = t.product("pv", kept, values[:, at.keys, :-1]).mul_(scaled)
            primal = both[..., -V:]
            out[0][at.rows] = at.ungroup(primal)
            for j in range(K):
                tangent = both[..., j * V : (j + 1) * V] if t.has_v else None
                if t.has_scores:
                    c, _ = t.tangent(at, keys, j, None)
                    t.finish_(c, at, j, slope, None).mul_(p)
                    mean = c.sum(-1, keepdim=True).mul_(scaled)
                    mu[j][at.rows] = at.ungroup(mean).squeeze(-1)
                    c = c if drop is None else c.mul_(drop)
                    moved = t.product("cv", c, values[:, at.keys, -V - 1 : -1]).mul_(scaled)
                    moved.addcmul_(mean, primal, value=-1.0)
                    tangent = moved if tangent is None else moved.add_(tangent)
                if tangent is not None:
                    out[1 + j][at.rows] = at.ungroup(tangent)
    return out.flatten(2, 3), shift.flatten(1, 2), norm.flatten(1, 2), mu.flatten(2, 3)


def attention_bwd(
    out_bar: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    shift: Tensor,
    norm: Tensor,
    mu: Tensor,
    options: Options,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients with respect to q, k, v and the bias.

    Args:
        out_bar: ``[1+K, B, H, N, V]``, cotangents of the output and of its tangents.
        q, k, v, mask, options: as given to :func:`attention_fwd`.
        out, shift, norm, mu: what it returned.
        needs: which of the four gradients to compute.

    Returns:
        For each of q, k, v, mask a tensor of its shape and dtype, or None where it is not needed.
    """
    t = _Tiles(q, k, v, mask, options)
    D, V = t.D, t.V
    need_q, need_k, need_v, need_bias = needs
    need_scores = need_q or need_k or need_bias
    out_bar, out = (x.unflatten(2, (t.HK, t.G)) for x in (out_bar, out))
    shift, norm, mu = (x.unflatten(-2, (t.HK, t.G)) for x in (shift, norm, mu))
    empty, dense = q.new_empty(0), torch.contiguous_format
    q_bar = torch.zeros_like(t.q, memory_format=dense) if need_q else empty
    k_bar = torch.zeros_like(k, memory_format=dense) if need_k else empty
    v_bar = torch.zeros_like(v, memory_format=dense) if need_v else empty
    bias_bar = torch.zeros_like(t.bias, dtype=t.dtype) if need_bias and t.bias is not None else empty
    for b, h, blocks in t.plan():
        keys, values = t.keys(b, h), t.values(b, h)
        # transposed, [.., features, keys]: the faster shape of product; the values' primal comes last
        k_acc = values.new_zeros(k.shape[0], values.shape[0], D, t.M) if need_k else empty
        v_acc = values.new_zeros(values.shape[0], v.shape[0] * V, t.M) if need_v else empty
        for at in blocks:
            p, tau = t.scores(at, keys[0], at.take(shift))
            slope = None if tau is None else t.slope(tau)
            t.exp_(p)  # not normalised: the cotangents take the factor instead
            drop = t.dropped(p)
            kept = p if drop is None else torch.mul(p, drop, out=t.tile("kept", *p.shape))
            factor = at.take(norm).unsqueeze(-1)
            g = [at.take(x).to(t.dtype) * factor for x in out_bar]
            o = [at.take(x).to(t.dtype) for x in out]
            d0 = torch.stack([(x * y).sum(-1) for x, y in zip(g, o)]).sum(0)
            rows = t.pack("g", [at.ungroup(x) for x in (g[1:] if t.has_v else []) + g[:1]], column=-d0)
            if need_v:
                v_acc[..., at.keys] += t.product("dv", rows[..., :-1].mT, kept)
            s_bar = t.weighted("s_bar", rows, values[:, at.keys], p, drop) if need_scores else empty
            bend = None if tau is None else t.tile("bend", *p.shape).zero_()
            dq = t.tile("dq", *p.shape[:2], D).zero_()
            for j in range(t.K if t.has_scores else 0):
                h_j, mu_j = g[1 + j], at.take(mu[j])
                c, rows = t.tangent(at, keys, j, mu_j)
                if need_scores:
                    packed = t.pack("h", [at.ungroup(h_j)], column=-(h_j * o[0]).sum(-1))
                    t_bar = t.weighted("t_bar", packed, values[:, at.keys, -V - 1 :], p, drop)
                    if bend is not None:
                        bend.addcmul_(c, t_bar)
                    s_bar.addcmul_(t_bar, t.finish_(c, at, j, slope, mu_j))
                else:
                    t.finish_(c, at, j, slope, mu_j)
                if need_v:
                    v_acc[:, -V:, at.keys] += t.product("dv", h_j.mT, c.mul_(kept))
                if not need_scores:
                    continue
                if need_bias and t.has_bias:
                    at.add_part_(bias_bar[1 + j], t_bar)
                if slope is not None:
                    t_bar.mul_(slope)
                if need_q and rows.numel():
                    grad = t.product("dqj", t_bar, t.partner(at, keys, j, rows.shape[-1]))
                    if t.has_k:
                        dq += grad[..., :D]
                    if t.has_q:
                        q_bar[1 + j][at.rows] = at.ungroup(grad[..., -D:] * options.scale)
                if need_k and rows.numel():
                    grad = t.product("dkj", rows.mT, t_bar)
                    if t.has_k:
                        k_acc[1 + j][..., at.keys] += grad[:, :D]
                    if t.has_q:
                        k_acc[0][..., at.keys] += grad[:, -D:]
            if need_bias:
                at.add_part_(bias_bar[0], s_bar)
            if need_scores and options.softcap and tau is not None and bend is not None and slope is not None:
                s_bar.addcmul_(tau, bend, value=-2.0 / options.softcap).mul_(slope)
            if need_q:
                dq.baddbmm_(s_bar, keys[0][:, at.keys, -D - 1 : -1])
                q_bar[0][at.rows] = at.ungroup(dq.mul_(options.scale))
            if need_k:
                rows = t.pack("q", [t.q[0][at.rows]], options.scale)
                k_acc[0][..., at.keys] += t.product("dk", rows.mT, s_bar)
        for j in range(k.shape[0] if need_k else 0):
            k_bar[j, b, h] = k_acc[j].mT.unflatten(0, (-1, h.stop - h.start))
        for j in range(v.shape[0] if need_v else 0):
            part = v_acc[:, (j - 1) % v.shape[0] * V :][:, :V]
            v_bar[j, b, h] = part.mT.unflatten(0, (-1, h.stop - h.start))
    return (
        q_bar.flatten(2, 3) if need_q else None,
        k_bar if need_k else None,
        v_bar if need_v else None,
        bias_bar.reshape(mask.shape).to(mask.dtype) if need_bias and mask is not None else None,
    )
