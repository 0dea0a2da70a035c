"""KL(p‖q) of two language-model outputs per token, in one stream over the vocabulary, with its gradients.

z = cap(s(W h + b)) on either side (s the logits multiplier, cap(x) = c tanh(x/c) or the identity), p and q their
softmax, d = z_p − z_q, μ = Σ p d, t = d − μ:

    KL(p‖q) = μ + log Σ p e^{−d} = log(1 + Σ p φ(t)),    φ(t) = e^{−t} − 1 + t ≥ 0
    z̄_p = p t,    z̄_q = q − p = p (e^{−(t + KL)} − 1)

A mean of log p − log q, each of the size of log Σ e^z, would lose every digit of a KL below its rounding, where an
adversary starts. All terms of the sum of φ are positive, and chunks of the vocabulary merge: with W the sum of the
weights e^{z_p − max} of a chunk, B that of w φ(d − μ) and s the distance of its mean from the merged one,

    Σ w φ(d − μ − s) = W φ(s) + e^{−s} B.

Saved: hidden states, weights and four numbers per token. Where a weight needs a gradient, the backward forms the
chunks again: 4 products of [tokens, hidden] by [hidden, vocabulary] for the logits and one per gradient. Where none
does, as in an attack, tokens go through in blocks whose logits are kept for the gradients of the hidden states, per
unit of their cotangents: 2 products and one per gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...autocast import no_autocast
from ...backends.errors import first_order
from ..autograd import Function
from .products import add_product
from .reference import Problem

__all__ = ["DivergenceFunction"]

#: elements of a tile of logits of one side, and its tokens; on the CPU it stays in cache
_TILE, _TILE_TOKENS = {"cpu": 1 << 20}, {"cpu": 512}
_LARGE_TILE, _LARGE_TOKENS, _LEAST_COLUMNS = 1 << 25, 4096, 1024
#: elements of the logits of a block of tokens that are kept, of one side
_KEPT = {"cpu": 1 << 22}
_LARGE_KEPT = 1 << 26

Optional = Tensor | None


class DivergenceFunction(Function):
    """Hidden states ``[T, C]`` of both sides to KL ``[T]``; without a second weight both have the first."""

    @staticmethod
    def forward(
        ctx: Any,
        p: Tensor,
        q: Tensor,
        weight: Tensor,
        bias: Optional,
        q_weight: Optional,
        q_bias: Optional,
        options: tuple[float, float | None],
        q_options: tuple[float, float | None],
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.options, ctx.ready = (options, q_options), None
        need_p, need_q, *of_weights = ctx.needs_input_grad[:6]
        with no_autocast(p.device.type):
            sides = _sides(p, q, weight, bias, q_weight, q_bias, options, q_options)
            is_kept = not any(of_weights) and (need_p or need_q)
            stats, ctx.ready = _kept(sides, need_p, need_q) if is_kept else (_statistics(sides), None)
        saved = (None,) * 6 if is_kept else (p, q, weight, bias, q_weight, q_bias)
        ctx.dtypes = (p.dtype, q.dtype)
        ctx.save_for_backward(*saved, stats)
        return stats[3].clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, bar: Optional) -> tuple[Optional, ...]:
        if bar is None:
            return (None,) * 8
        *operands, stats = ctx.saved_tensors
        if ctx.ready is not None:
            bars = (
                None if unit is None else (unit * bar.unsqueeze(-1)).to(dtype)
                for unit, dtype in zip(ctx.ready, ctx.dtypes)
            )
            return (*bars, *(None,) * 6)
        with no_autocast(bar.device.type):
            sides = _sides(*operands, *ctx.options)
            return (*_gradients(sides, stats, bar, operands, ctx.needs_input_grad[:6]), None, None)


def _sides(
    p: Tensor,
    q: Tensor,
    weight: Tensor,
    bias: Optional,
    q_weight: Optional,
    q_bias: Optional,
    options: tuple[float, float | None],
    q_options: tuple[float, float | None],
) -> tuple[Problem, Problem]:
    second = (weight, bias) if q_weight is None else (q_weight, q_bias)
    return (
        Problem(p.unsqueeze(0), weight, bias, None, None, "l2", *options, -100),
        Problem(q.unsqueeze(0), *second, None, None, "l2", *q_options, -100),
    )


def _blocks(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _tiles(sides: tuple[Problem, Problem]) -> tuple[list[slice], list[slice]]:
    """Blocks of tokens and of the vocabulary; a tile has at most half the elements of [tokens, vocabulary]."""
    first, kind = sides[0], sides[0].h.device.type
    rows = max(1, min(first.tokens, _TILE_TOKENS.get(kind, _LARGE_TOKENS)))
    columns = min(max(_LEAST_COLUMNS, _TILE.get(kind, _LARGE_TILE) // rows), max(1, first.vocab_size // 2))
    return _blocks(first.tokens, rows), _blocks(first.vocab_size, columns)


def _logits(sides: tuple[Problem, Problem], rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
    zp, zq = (side.logits(side.h[0, rows], columns)[0] for side in sides)
    return zp, zq


class _Stream:
    """Running statistics of a block of tokens; a bias may hold −inf, a probability of 0 on both sides."""

    def __init__(self, tokens: int, like: Tensor, may_be_infinite: bool) -> None:
        zero = like.new_zeros(tokens)
        self.peak = torch.full_like(zero, -torch.inf)
        self.weight, self.mean, self.excess = zero, zero, zero  # W, μ and B of p
        self.q_peak, self.q_weight = self.peak, zero
        self.is_first, self.may_be_infinite = True, may_be_infinite

    def add(self, zp: Tensor, zq: Tensor) -> None:
        """Take in a tile ``[t, v]`` of logits of either side."""
        q_peak, q_decay, q_total, _ = _weights(zq, self.q_peak)
        self.q_peak, self.q_weight = q_peak, self.q_weight * q_decay + q_total
        peak, decay, total, w = _weights(zp, self.peak)
        d = zp - zq
        wd = w * d
        if self.may_be_infinite:
            wd = wd.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
        known = total > 0
        mean = torch.where(known, wd.sum(-1) / torch.where(known, total, 1.0), self.mean)
        t = d - mean.unsqueeze(-1)
        near = t.abs() < 1
        # far from the mean the weight may vanish before its e^{−t} does
        far = (zq + (mean - _finite(peak)).unsqueeze(-1)).exp_() - (
            (w * (1 - t)).nan_to_num_(nan=0.0) if self.may_be_infinite else w * (1 - t)
        )
        excess = torch.where(near, w * _phi(t), far).sum(-1)
        if self.is_first:
            self.mean, self.excess, self.weight, self.is_first = mean, excess, total, False
        else:
            before = self.weight * decay
            merged = before + total
            step = (mean - self.mean) * (total / torch.where(merged > 0, merged, 1.0))
            back, ahead = -step, mean - (self.mean + step)
            self.excess = (
                before * _phi(back)
                + decay * (-back).exp() * self.excess
                + total * _phi(ahead)
                + (-ahead).exp() * excess
            )
            # once infinite, for a word of p that q does not have, it stays so
            infinite = (self.mean == torch.inf) | (mean == torch.inf)
            self.mean, self.weight = torch.where(infinite, torch.inf, self.mean + step), merged
        self.peak = peak

    def finish(self) -> Tensor:
        """``[4, t]``: the largest logit of p, log Σ e^(z − it), μ and KL."""
        log_weight = self.weight.log()
        direct = self.mean - (self.peak - self.q_peak) - (log_weight - self.q_weight.log())
        stable = torch.log1p(self.excess / self.weight)
        kl = torch.where(stable.isfinite() & direct.isfinite(), stable, direct)
        return torch.stack([self.peak, log_weight, self.mean, kl])


def _finite(peak: Tensor) -> Tensor:
    return torch.where(peak == -torch.inf, 0.0, peak)


def _weights(z: Tensor, peak: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The largest logit so far, the factor of earlier weights, the sum of these and e^(z − the largest)."""
    largest = torch.maximum(peak, z.amax(-1))
    base = _finite(largest)
    w = (z - base.unsqueeze(-1)).exp_()
    return largest, (peak - base).exp(), w.sum(-1), w


def _phi(t: Tensor) -> Tensor:
    return torch.expm1(-t).add_(t)


def _cotangents(
    sides: tuple[Problem, Problem], z: tuple[Tensor, Tensor], stats: Tensor, needed: tuple[bool, bool]
) -> Iterator[Optional]:
    """Of ``W h + b`` of either side for a tile ``[t, v]``, per unit of the cotangent of KL."""
    zp, zq = z
    peak, log_weight, mean, kl = stats.unsqueeze(-1)
    p, t = (zp - peak).sub_(log_weight).exp_(), zp - zq - mean
    may_be_infinite = _may_be_infinite(sides)
    for index, side in enumerate(sides):
        if not needed[index]:
            yield None
            continue
        if index == 0:
            z_bar = p * t
            if may_be_infinite:
                z_bar = torch.where(p == 0, 0.0, z_bar)
        else:
            u = t + kl
            q = (zq + (mean - kl - peak - log_weight)).exp_()
            z_bar = torch.where(u.abs() < 1, p * torch.expm1(-u), q - p)
        if side.softcap is not None:
            z_bar *= 1.0 - (z[index] / side.softcap).square_()
        yield z_bar if side.scale == 1.0 else z_bar.mul_(side.scale)


def _may_be_infinite(sides: tuple[Problem, Problem]) -> bool:
    return any(side.bias is not None for side in sides)


def _wide(sides: tuple[Problem, Problem]) -> Tensor:
    """An empty tensor of the dtype of the statistics."""
    dtypes = {side.h.dtype for side in sides}
    return sides[0].h.new_empty(0, dtype=torch.float64 if torch.float64 in dtypes else torch.float32)


def _statistics(sides: tuple[Problem, Problem]) -> Tensor:
    like, may_be_infinite = _wide(sides), _may_be_infinite(sides)
    stats = like.new_empty(4, sides[0].tokens)
    token_blocks, column_blocks = _tiles(sides)
    for rows in token_blocks:
        stream = _Stream(rows.stop - rows.start, like, may_be_infinite)
        for columns in column_blocks:
            stream.add(*_logits(sides, rows, columns))
        stats[:, rows] = stream.finish()
    return stats


def _kept(
    sides: tuple[Problem, Problem], need_p: bool, need_q: bool
) -> tuple[Tensor, tuple[Optional, Optional]]:
    """Statistics, and cotangents of the hidden states per unit of those of KL; logits are formed once."""
    like, needed, first = _wide(sides), (need_p, need_q), sides[0]
    stats = like.new_empty(4, first.tokens)
    sums = tuple(
        torch.zeros_like(side.h[0], dtype=_sum_dtype(side.h.dtype)) if need else None
        for side, need in zip(sides, needed)
    )
    kept = _KEPT.get(first.h.device.type, _LARGE_KEPT) // first.vocab_size
    step = max(1, min(kept, (first.tokens + 1) // 2))
    for rows in _blocks(first.tokens, step):
        stream, tiles = _Stream(rows.stop - rows.start, like, _may_be_infinite(sides)), []
        width = max(_LEAST_COLUMNS, _TILE.get(first.h.device.type, _LARGE_TILE) // (rows.stop - rows.start))
        for columns in _blocks(first.vocab_size, width):
            tiles.append((columns, _logits(sides, rows, columns)))
            stream.add(*tiles[-1][1])
        stats[:, rows] = stream.finish()
        while tiles:
            columns, z = tiles.pop()
            for total, side, z_bar in zip(sums, sides, _cotangents(sides, z, stats[:, rows], needed)):
                if total is not None and z_bar is not None:
                    _add(total[rows], z_bar, side.weight[columns])
    return stats, sums  # type: ignore[return-value]


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _add(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a b``, where `a` has a wide dtype and `b` may have a low one.

    Cotangents close to a KL of 0 are below what float16 can hold.
    """
    if b.dtype == torch.float16:
        b = b.float()
    add_product(total, a.to(b.dtype), b)


def _gradients(
    sides: tuple[Problem, Problem],
    stats: Tensor,
    bar: Tensor,
    operands: list[Optional],
    needed: tuple[bool, ...],
) -> list[Optional]:
    """Cotangents of p, q, and of weight and bias of either side, None where not needed."""
    is_shared = operands[4] is None
    # where both sides have one head its cotangents come from both
    of_head = [needed[2:4], needed[2:4] if is_shared else needed[4:6]]
    wanted = tuple(needed[i] or any(of_head[i]) for i in (0, 1))
    sums = [
        torch.zeros_like(side.h[0], dtype=_sum_dtype(side.h.dtype)) if needed[i] else None
        for i, side in enumerate(sides)
    ]
    weight_bars = [
        torch.zeros_like(x) if x is not None and n else None for x, n in _at(operands, needed, 2, 4)
    ]
    bias_bars = [
        torch.zeros_like(x, dtype=_sum_dtype(x.dtype)) if x is not None and n else None
        for x, n in _at(operands, needed, 3, 5)
    ]
    token_blocks, column_blocks = _tiles(sides)
    for columns in column_blocks:
        chunks = [
            None if total is None else torch.zeros_like(total[columns], dtype=_sum_dtype(total.dtype))
            for total in weight_bars
        ]
        for rows in token_blocks:
            z = _logits(sides, rows, columns)
            for i, z_bar in enumerate(_cotangents(sides, z, stats[:, rows], wanted)):  # type: ignore[arg-type]
                if z_bar is None:
                    continue
                z_bar *= bar[rows].unsqueeze(-1)
                side, head, total = sides[i], 0 if is_shared else i, sums[i]
                if total is not None:
                    _add(total[rows], z_bar, side.weight[columns])
                chunk, bias_bar = chunks[head], bias_bars[head]
                if chunk is not None:
                    _add(chunk, z_bar.t(), side.h[0, rows])
                if bias_bar is not None:
                    bias_bar[columns] += z_bar.sum(0)
        for total, chunk in zip(weight_bars, chunks):
            if total is not None and chunk is not None:
                total[columns] = chunk
    bars = [*sums, weight_bars[0], bias_bars[0], weight_bars[1], bias_bars[1]]
    return [
        None if bar is None or x is None else bar.to(x.dtype) for bar, x in zip(bars, operands, strict=True)
    ]


def _at(operands: list[Optional], needed: tuple[bool, ...], *places: int) -> list[tuple[Optional, bool]]:
    return [(operands[i], needed[i]) for i in places]
