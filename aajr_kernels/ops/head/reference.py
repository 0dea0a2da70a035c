"""The streamed head in plain PyTorch: tiles of tokens by vocabulary that stay in cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .products import add_product, product

#: Elements of a tile, its rows (tokens times 1 + K) and its least columns; 4 MB of float32.
_TILE, _TILE_ROWS, _TILE_COLUMNS = 1 << 20, 1024, 1024


_P = TypeVar("_P", bound="Problem")


@dataclass
class Problem:
    """The operands of every launcher, in the order of their schemas.

    Attributes:
        h: hidden states ``[1 + K, T, C]``.
        weight: ``[V, C]``.
        bias: ``[V]`` or None.
        labels: int64 ``[T]`` or None.
        count: int32 ``[]``, on the device: so many tokens count, the first ones; the others have q, nll and gradients
            0. None: all.
        metric: ``l2``, ``logits``, ``fisher`` or ``probs``.
        scale: logits multiplier.
        softcap: c of c tanh(x/c), or None.
        ignore_index: label whose token has loss 0.
    """

    h: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor | None
    count: Tensor | None
    metric: str
    scale: float
    softcap: float | None
    ignore_index: int

    @property
    def stacks(self) -> int:
        return self.h.shape[0]

    @property
    def tokens(self) -> int:
        return self.h.shape[1]

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    def block(self: _P, rows: slice) -> _P:
        """The same of some of the tokens."""
        labels = None if self.labels is None else self.labels[rows]
        count = None if self.count is None else (self.count - rows.start).clamp(0, rows.stop - rows.start)
        return replace(self, h=self.h[:, rows], labels=labels, count=count)

    @property
    def beyond(self) -> Tensor | None:
        """Tokens that do not count, bool ``[T]``; None if there are none."""
        return None if self.count is None else torch.arange(self.tokens, device=self.h.device) >= self.count

    def blank(self: _P) -> _P:
        """The same with zeros and ignored labels in place of the tokens that do not count."""
        beyond = self.beyond
        if beyond is None:
            return self
        labels = None if self.labels is None else self.labels.masked_fill(beyond, self.ignore_index)
        return replace(self, h=self.h.masked_fill(beyond.unsqueeze(-1), 0.0), labels=labels)

    def logits(self, rows: Tensor, columns: slice) -> Tensor:
        """Logits and their tangents ``[1 + K, t, v]`` in float32 (float64) for hidden states ``[(1 + K) t, C]``."""
        weight = self.weight[columns]
        z = product(rows, weight.t()).view(self.stacks, rows.shape[0] // self.stacks, weight.shape[0])
        if self.bias is not None:
            z[0] += self.bias[columns]
        if self.scale != 1.0:
            z *= self.scale
        if self.softcap is not None:
            tau = z[0].mul_(1.0 / self.softcap).tanh_()
            z[1:] *= 1.0 - tau * tau
            tau.mul_(self.softcap)
        return z

    def pull(self, z_bar: Tensor, z: Tensor, z_tan: Tensor) -> None:
        """Turn the cotangents ``[1 + K, t, v]`` of a tile into those of ``W h + b``, in place."""
        if self.softcap is not None:
            slope = 1.0 - (z / self.softcap).square_()
            through = (z_tan * z_bar[1:]).sum(0).mul_(z).mul_(-2.0 / self.softcap**2)
            z_bar.mul_(slope)
            z_bar[0] += through
        if self.scale != 1.0:
            z_bar *= self.scale


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _blocks(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _tiles(p: Problem) -> tuple[list[slice], list[slice]]:
    """Blocks of tokens and of the vocabulary; a tile has at most half as many elements as [tokens, vocabulary]."""
    step = max(1, min(p.tokens, _TILE_ROWS // p.stacks))
    columns = max(_TILE_COLUMNS, _TILE // (p.stacks * step))
    width = max(1, min(columns, p.vocab_size // (2 * p.stacks)))
    return _blocks(p.tokens, step), _blocks(p.vocab_size, width)


@dataclass
class _Moments:
    """Weighted mean and sum of squares about it, merged chunk by chunk.

    `rest` is the total weight without the 1 of the likeliest word, −1 while there is none: in the total of a confident
    token the others would lose their digits.
    """

    rest: Tensor
    mean: Tensor
    square: Tensor

    def add(self, w: Tensor, newcomer: _Newcomer) -> None:
        """Take in the weights `w` ``[t, v]``, relative to the likeliest word so far, of a chunk."""
        rest, before = newcomer.rest(w), (1.0 + self.rest) * newcomer.decay
        self.rest = rest + torch.where(newcomer.moved, before, self.rest + newcomer.hit)

    def merge(self, w: Tensor, shifted: Tensor, shift: Tensor, newcomer: _Newcomer) -> None:
        """The same with the values ``[K, t, v]`` of the chunk; `shift` ``[K, t]`` moves the mean to their reference."""
        tiny = torch.finfo(w.dtype).tiny
        before = (1.0 + self.rest) * newcomer.decay
        total = newcomer.rest(w) + newcomer.hit
        self.add(w, newcomer)
        mean = (w * shifted).sum(-1) / total.clamp_min(tiny)
        centred = shifted - mean.unsqueeze(-1)
        square = centred.square_().mul_(w).sum(-1)
        merged = (before + total).clamp_min(tiny)
        share = total / merged
        old = self.mean + shift
        step = mean - old
        self.square.mul_(newcomer.decay).add_(square).add_(step * step * share * before)
        self.mean = old * (before / merged) + mean * share


@dataclass
class _Newcomer:
    """Shared between the sums of a chunk, ``[t]``.

    Attributes:
        decay: factor of the weights before it.
        moved: whether it has the likeliest word so far.
        hit: 1.0 where its likeliest word is as likely as any before or likelier, else 0.0.
        index: the likeliest word of the chunk ``[t, 1]``.
    """

    decay: Tensor
    moved: Tensor
    hit: Tensor
    index: Tensor

    def rest(self, w: Tensor) -> Tensor:
        """The sum of weights ``[t, v]`` without the 1 of the likeliest word, where it is in the chunk."""
        largest = w.gather(-1, self.index)
        total = w.scatter_(-1, self.index, largest - self.hit.unsqueeze(-1)).sum(-1)
        w.scatter_(-1, self.index, largest)
        return total

    def squared(self) -> _Newcomer:
        return replace(self, decay=self.decay * self.decay)


class _Stream:
    """Running statistics of one block of tokens; `like` ``[K, t]`` gives shape, dtype and device."""

    def __init__(self, metric: str, labels: Tensor | None, like: Tensor) -> None:
        self.metric, self.labels = metric, labels
        row, per_tangent = like.new_zeros(like.shape[1:]), torch.zeros_like(like)
        self.peak = torch.full_like(row, -torch.inf)
        self.at_label = row
        self.reference = (
            per_tangent.clone()
        )  # ż of the likeliest word so far: its own share of the mean is zero
        self.first = _Moments(row - 1.0, per_tangent.clone(), per_tangent.clone())  # under p
        self.second = _Moments(row - 1.0, per_tangent.clone(), per_tangent.clone())  # under p²
        self.norm = per_tangent

    def add(self, z: Tensor, columns: slice) -> None:
        """Take in a tile ``[1 + K, t, v]``, which is overwritten."""
        primal, tangents = z[0], z[1:]
        if self.labels is not None:
            local = self.labels - columns.start
            inside = (local >= 0) & (local < primal.shape[-1])
            value = primal.gather(-1, local.clamp(0, primal.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
            self.at_label = torch.where(inside, value, self.at_label)
        if self.metric == "logits":
            self.norm += tangents.square().sum(-1)
            if self.labels is None:
                return
        value, index = primal.max(-1, keepdim=True)
        moved, known = value.squeeze(-1) > self.peak, self.peak > -torch.inf
        peak = torch.maximum(self.peak, value.squeeze(-1))
        finite = torch.where(peak == -torch.inf, torch.zeros_like(peak), peak)  # a row of -inf so far
        hit = (value.squeeze(-1) == finite).to(peak.dtype)
        newcomer = _Newcomer((self.peak - finite).exp(), moved, hit, index)
        self.peak = peak
        w = primal.sub_(finite.unsqueeze(-1)).exp_()
        if self.metric in ("l2", "logits"):
            self.first.add(w, newcomer)
            return
        at_peak = tangents.gather(-1, index.expand(*tangents.shape[:-1], 1)).squeeze(-1)
        shift = torch.where(moved & known, self.reference - at_peak, 0.0)
        self.reference = torch.where(moved, at_peak, self.reference)
        shifted = tangents.sub_(self.reference.unsqueeze(-1))
        self.first.merge(w, shifted, shift, newcomer)
        if self.metric == "probs":
            self.second.merge(w.square_(), shifted, shift, newcomer.squared())

    def finish(self) -> tuple[Tensor, Tensor | None]:
        """Statistics ``[2 + 4K, t]``, see :func:`head_fwd`, and the loss of every token."""
        rest, mean = self.first.rest, self.first.mean
        total, q, slope = 1.0 + rest, self.norm, torch.zeros_like(self.norm)
        if self.metric == "fisher":
            q = self.first.square / total
        elif self.metric == "probs":
            square, rest2 = total**2, self.second.rest
            mass = (1.0 + rest2) / square  # Σ p²
            gap = self.second.mean - mean
            q = self.second.square / square + mass * gap * gap
            slope = -((rest - rest2) / square * mean + mass * self.second.mean)
        nll = None if self.labels is None else rest.log1p() + (self.peak - self.at_label)
        return torch.cat([torch.stack([self.peak, rest]), self.reference, mean, q, slope]), nll


def head_fwd(*operands: Any) -> tuple[Tensor, Tensor | None, Tensor]:
    """Sensitivities and token losses from one pass over the vocabulary.

    Args:
        operands: the fields of a :class:`Problem`.

    Returns:
        q ``[K, T]``, nll ``[T]`` or None, and the statistics ``[2 + 4K, T]`` that the backward needs: the largest logit
        and Σ e^(z - largest) over all words but one of the likeliest, then per tangent the reference r (ż of that
        word), the mean m = Σ p (ż - r), q and, for ``probs``, p e - κ at that word; all float32 (float64). None of them
        is a difference of nearly equal numbers where a token is confident.
        Statistics of tokens that do not count are finite and have no meaning. This backend computes them all the same,
        from zeros: it serves as specification, and nothing here waits for a device.
    """
    p = Problem(*operands).blank()
    k, labels = p.stacks - 1, p.labels
    stats = _wide(p.h[:0]).new_empty((2 + 4 * k, p.tokens))
    nll = None if labels is None else stats.new_empty(p.tokens)
    token_blocks, column_blocks = _tiles(p)
    if p.metric == "l2" and labels is None:
        column_blocks = []
    for rows in token_blocks:
        hs = p.h[:, rows].flatten(0, 1)
        stream = _Stream(p.metric, None if labels is None else labels[rows], stats[2 : 2 + k, rows])
        if p.metric == "l2":
            stream.norm = _wide(p.h[1:, rows]).square().sum(-1)
        for columns in column_blocks:
            stream.add(p.logits(hs, columns), columns)
        stats[:, rows], loss = stream.finish()
        if labels is not None and nll is not None and loss is not None:
            nll[rows] = loss.masked_fill(labels[rows] == p.ignore_index, 0.0)
    return stats[2 + 2 * k : 2 + 3 * k].clone(), nll, stats


def head_bwd(*args: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Cotangents of h ``[1 + K, T, C]``, weight ``[V, C]`` and bias ``[V]``; None where not needed.

    Args:
        args: the operands of :func:`head_fwd`, the cotangents of q ``[K, T]`` and nll ``[T]`` (each or None), the
            statistics that it returned, and which results are needed: of h, the weight, the bias.
    """
    p = Problem(*args[:9]).blank()
    q_bar, nll_bar, stats, need_h, need_weight, need_bias = args[9:]
    beyond = p.beyond
    if q_bar is not None and beyond is not None:
        q_bar = q_bar.masked_fill(beyond, 0.0)
    h, weight, labels, wide = p.h, p.weight, p.labels, stats.dtype
    token_blocks, column_blocks = _tiles(p)
    tile_q_bar = None if p.metric == "l2" else q_bar
    if tile_q_bar is None and nll_bar is None:
        column_blocks = []
    if nll_bar is not None and labels is not None:
        nll_bar = nll_bar.masked_fill(labels == p.ignore_index, 0.0)
    inputs = [h[:, rows].flatten(0, 1) for rows in token_blocks]
    sums = [torch.zeros_like(hs, dtype=wide) for hs in inputs] if need_h else []
    w_bar = torch.zeros_like(weight) if need_weight else None
    b_bar = weight.new_zeros(weight.shape[0], dtype=wide) if need_bias else None
    for columns in column_blocks:
        chunk = weight[columns]
        chunk_bar = torch.zeros_like(chunk, dtype=wide) if need_weight else None
        for i, rows in enumerate(token_blocks):
            z = p.logits(inputs[i], columns)
            z_bar = _tile_cotangents(
                z,
                stats[:, rows],
                p.metric,
                None if tile_q_bar is None else tile_q_bar[:, rows],
                None if nll_bar is None else nll_bar[rows],
                None if labels is None else labels[rows] - columns.start,
            )
            p.pull(z_bar, z[0], z[1:])
            if b_bar is not None:
                b_bar[columns] += z_bar[0].sum(0)
            flat = z_bar.flatten(0, 1).to(chunk.dtype)
            if need_h:
                add_product(sums[i], flat, chunk)
            if chunk_bar is not None:
                add_product(chunk_bar, flat.t(), inputs[i])
        if w_bar is not None and chunk_bar is not None:
            w_bar[columns] = chunk_bar
    h_bar = None
    if need_h:
        h_bar = torch.empty_like(h, memory_format=torch.contiguous_format)
        for rows, total in zip(token_blocks, sums):
            total = total.view(h[:, rows].shape)
            if p.metric == "l2" and q_bar is not None:
                total[1:] += 2.0 * q_bar[:, rows].unsqueeze(-1) * h[1:, rows]
            h_bar[:, rows] = total
    return h_bar, w_bar, b_bar


def _tile_cotangents(
    z: Tensor,
    stats: Tensor,
    metric: str,
    q_bar: Tensor | None,
    nll_bar: Tensor | None,
    labels: Tensor | None,
) -> Tensor:
    """Cotangents ``[1 + K, t, v]`` of a tile of logits and their tangents; `labels` count from the tile's start."""
    k = z.shape[0] - 1
    peak, rest = stats[:2].unsqueeze(-1)
    reference, mean, q, slope = stats[2:].reshape(4, k, stats.shape[1], 1)
    z_bar = torch.empty_like(z)
    w = (z[0] - peak).exp_()
    inverse = 1.0 / (1.0 + rest)
    if q_bar is None:
        z_bar.zero_()
    elif metric == "logits":
        z_bar[0] = 0
        torch.mul(z[1:], 2.0 * q_bar.unsqueeze(-1), out=z_bar[1:])
    else:
        g = q_bar.unsqueeze(-1) * inverse
        e = (z[1:] - reference).sub_(mean)
        we = w * e
        if metric == "fisher":
            z_bar[0] = e.mul_(we).addcmul_(w, q, value=-1).mul_(g).sum(0)
            torch.mul(we, 2.0 * g, out=z_bar[1:])
        else:
            slopes = we.add_(mean).mul_(inverse).add_(slope)  # p e - κ
            z_bar[0] = e.mul_(slopes).sub_(q).mul_(w).mul_(2.0 * g).sum(0)
            torch.mul(slopes.mul_(w), 2.0 * g, out=z_bar[1:])
    if nll_bar is not None and labels is not None:
        inside = ((labels >= 0) & (labels < w.shape[-1])).to(w.dtype).unsqueeze(-1)
        index = labels.clamp(0, w.shape[-1] - 1).unsqueeze(-1)
        # p - 1 of a likely label keeps its digits
        w.scatter_(-1, index, w.gather(-1, index) - inside - inside * rest)
        z_bar[0].addcmul_(w, nll_bar.unsqueeze(-1) * inverse)
    return z_bar
