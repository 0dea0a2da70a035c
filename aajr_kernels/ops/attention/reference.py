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
rows of all query heads that share a key head form one matrix, so keys are never repeated. Row constants (-mu, -D0, -D1)
ride along as one more column of a product whose other side is a column of ones, which saves a pass over the
tile. Tiles are float32 (float64 for float64 inputs).

A context is more keys, before the others and without tangents: against it Q K'_k^T, (P M) V'_k and their reverse are
left out. The two parts of the keys meet in the softmax of a row only. The forward takes each by itself and merges them:
with w the share of a part in the sum of the exponentials of both,

    O = sum w O_part,  mu_k = sum w mu_k,part,  O'_k = sum w (O'_k,part + (mu_k,part - mu_k) O_part).

In the backward, which has the statistics of whole rows, nothing is left to merge: dQ and dQ'_k add up.

Saved for the backward: the output and, per row, shift (the largest score), norm (1 / sum of the exponentials) and mu.
A row without an allowed key has shift +inf and norm 0: its output and all its gradients are zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .options import Options
from .tiling import Tiles, columns, parts, sequences

__all__ = ["attention_bwd", "attention_fwd"]


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and its tangents.

    Args:
        q: ``[1 | 1+K, B, H, N, D]``, a leading 1 meaning that the tangents are zero, as below.
        k: ``[1 | 1+K, B, HK, M, D]`` with HK a divisor of H.
        v: ``[1 | 1+K, B, HK, M, V]``.
        mask: None, bool ``[1, B|1, H|1, N|1, M|1]`` (True = attend) or floating ``[1 | 1+K, B|1, H|1, N|1, M|1]``.
        options: those of the call. With packed sequences B is 1 and there is no mask.

    Returns:
        out ``[1+K, B, H, N, V]`` in the dtype of q, and for the backward shift ``[B, H, N]``, norm ``[B, H, N]`` and
        mu ``[K | 0, B, H, N]`` in float32 (float64 for float64).
    """
    if options.starts is not None:
        sequence = [
            attention_fwd(q[..., rows, :], k[..., keys, :], v[..., keys, :], None, each)
            for rows, keys, each in sequences(options)
        ]
        out, shift, norm, mu = (torch.cat(x, axis) for x, axis in zip(zip(*sequence), (-2, -1, -1, -1)))
        return out, shift, norm, mu
    biased = mask is not None and mask.dtype != torch.bool
    moving = [x.shape[0] > 1 for x in (q, k, *((mask,) if biased and mask is not None else ()))]
    tangents = max(x.shape[0] for x in (q, k, v, mask) if x is not None) - 1
    every = [Tiles(q, *part, tangents, True in moving) for part in parts(k, v, mask, options)]
    if len(every) == 1:
        out, shift, norm, mu = _forward(every[0], q.dtype)
    else:
        first, second = (_forward(t, t.dtype) for t in every)
        out, shift, norm, mu = _merged(first, second, torch.exp if biased else torch.exp2)
    return out.to(q.dtype).flatten(2, 3), shift.flatten(1, 2), norm.flatten(1, 2), mu.flatten(2, 3)


_Softened = tuple[Tensor, Tensor, Tensor, Tensor]


def _forward(t: Tiles, dtype: torch.dtype) -> _Softened:
    """Output in that dtype, shift, norm and mu of the keys of `t`, ``[.., HK, G, N, ..]``."""
    B, HK, G, N, V, K = t.B, t.HK, t.G, t.N, t.V, t.K
    out = t.q.new_zeros(1 + K, B, HK, G, N, V, dtype=dtype)
    shift = torch.full((B, HK, G, N), math.inf, dtype=t.dtype, device=t.device)
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
            drop = t.dropped(at)
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
    return out, shift, norm, mu


def _merged(first: _Softened, second: _Softened, exp: Callable[[Tensor], Tensor]) -> _Softened:
    """Output and statistics of two parts of the keys together; `exp` takes the unit of the shifts."""
    tops = [shift.masked_fill(norm == 0, -math.inf) for _, shift, norm, _ in (first, second)]
    top = torch.maximum(*tops)
    flat = top.masked_fill(top == -math.inf, 0.0)
    totals = [
        torch.where(norm == 0, 0.0, exp(own - flat) / norm)
        for own, (_, _, norm, _) in zip(tops, (first, second))
    ]
    total = totals[0] + totals[1]
    norm = total.reciprocal().masked_fill_(total == 0, 0.0)
    shares = [x * norm for x in totals]
    mu = shares[0] * first[3] + shares[1] * second[3]
    out = torch.zeros_like(first[0])
    for share, (own, _, _, own_mu) in zip(shares, (first, second)):
        out.addcmul_(share.unsqueeze(-1), own)
        out[1 : 1 + len(mu)].addcmul_((share * (own_mu - mu)).unsqueeze(-1), own[0])
    return out, top.masked_fill(total == 0, math.inf), norm, mu


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
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients with respect to q, k, v and the bias, and with a context to its keys and values.

    Args:
        out_bar: ``[1+K, B, H, N, V]``, cotangents of the output and of its tangents.
        q, k, v, mask, options: as passed to :func:`attention_fwd`.
        out, shift, norm, mu: what it returned.
        needs: which of the gradients to compute: four, or six with a context.

    Returns:
        For each of them a tensor of the shape and dtype of its operand, or None where it is not needed.
    """
    if options.starts is not None:
        sequence = []
        for mine, theirs, each in sequences(options):
            inputs = (q[..., mine, :], k[..., theirs, :], v[..., theirs, :])
            saved = (out[..., mine, :], shift[..., mine], norm[..., mine], mu[..., mine])
            sequence.append(attention_bwd(out_bar[..., mine, :], *inputs, None, *saved, each, needs))
        q_bar, k_bar, v_bar, _ = (
            torch.cat(x, -2) if need else None for x, need in zip(zip(*sequence), needs)
        )
        return q_bar, k_bar, v_bar, None
    every = [Tiles(q, *part, out_bar.shape[0] - 1, mu.shape[0] > 0) for part in parts(k, v, mask, options)]
    heads, wide = (every[0].HK, every[0].G), every[0].dtype
    grouped = [x.unflatten(2, heads) for x in (out_bar, out)] + [
        x.unflatten(-2, heads) for x in (shift, norm, mu)
    ]
    # the parts add to both one after another
    q_bar = q.new_zeros(q.shape, dtype=q.dtype if len(every) == 1 else wide) if needs[0] else None
    bias_bar = torch.zeros_like(mask, dtype=wide) if needs[3] and mask is not None else None
    sums: list[Tensor | None] = [None if q_bar is None else q_bar.unflatten(2, heads), None]
    bars: list[Tensor | None] = []
    start = 0
    for t, own_needs in zip(every, (needs[1:3],) if len(every) == 1 else (needs[4:], needs[1:3])):
        if bias_bar is not None:
            sums[1] = t.grouped(columns(bias_bar, start, t.M))
        bars += _backward(t, grouped, own_needs, *sums)
        start += t.M
    return (
        None if q_bar is None else q_bar.to(q.dtype),
        *bars[-2:],
        None if bias_bar is None or mask is None else bias_bar.to(mask.dtype),
        *bars[:-2],
    )


def _backward(
    t: Tiles,
    saved: list[Tensor],
    needs: tuple[bool, ...],
    q_bar: Tensor | None,
    bias_bar: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the keys and values of `t`, where needed; what they add to those of q and the bias is added.

    `saved`: out_bar, out, shift, norm and mu, their heads grouped.
    """
    options, k, v, D, V = t.options, t.k, t.v, t.D, t.V
    out_bar, out, shift, norm, mu = saved
    need_k, need_v = needs
    need_scores = q_bar is not None or need_k or bias_bar is not None
    empty, dense = t.q.new_empty(0), torch.contiguous_format
    k_bar = torch.zeros_like(k, memory_format=dense) if need_k else None
    v_bar = torch.zeros_like(v, memory_format=dense) if need_v else None
    if not need_scores and not need_v:
        return None, None
    for b, h, blocks in t.plan():
        keys, values = t.keys(b, h), t.values(b, h)
        # transposed, [.., features, keys]: the faster shape of product; the values' primal comes last
        k_acc = values.new_zeros(k.shape[0], values.shape[0], D, t.M) if need_k else empty
        v_acc = values.new_zeros(values.shape[0], v.shape[0] * V, t.M) if need_v else empty
        for at in blocks:
            p, tau = t.scores(at, keys[0], at.take(shift))
            slope = None if tau is None else t.slope(tau)
            t.exp_(p)  # not normalised: the cotangents take the factor instead
            drop = t.dropped(at)
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
                if bias_bar is not None and t.has_bias:
                    at.add_part_(bias_bar[1 + j], t_bar)
                if slope is not None:
                    t_bar.mul_(slope)
                if q_bar is not None and rows.numel():
                    grad = t.product("dqj", t_bar, t.partner(at, keys, j, rows.shape[-1]))
                    if t.has_k:
                        dq += grad[..., :D]
                    if t.has_q:
                        q_bar[1 + j][at.rows] += at.ungroup(grad[..., -D:] * options.scale)
                if need_k and rows.numel():
                    grad = t.product("dkj", rows.mT, t_bar)
                    if t.has_k:
                        k_acc[1 + j][..., at.keys] += grad[:, :D]
                    if t.has_q:
                        k_acc[0][..., at.keys] += grad[:, -D:]
            if bias_bar is not None:
                at.add_part_(bias_bar[0], s_bar)
            if need_scores and options.softcap and tau is not None and bend is not None and slope is not None:
                s_bar.addcmul_(tau, bend, value=-2.0 / options.softcap).mul_(slope)
            if q_bar is not None:
                dq.baddbmm_(s_bar, keys[0][:, at.keys, -D - 1 : -1])
                q_bar[0][at.rows] += at.ungroup(dq.mul_(options.scale))
            if need_k:
                rows = t.pack("q", [t.q[0][at.rows]], options.scale)
                k_acc[0][..., at.keys] += t.product("dk", rows.mT, s_bar)
        for j, bar in enumerate(() if k_bar is None else k_bar):
            bar[b, h] = k_acc[j].mT.unflatten(0, (-1, h.stop - h.start))
        for j, bar in enumerate(() if v_bar is None else v_bar):
            part = v_acc[:, (j - 1) % v.shape[0] * V :][:, :V]
            bar[b, h] = part.mT.unflatten(0, (-1, h.stop - h.start))
    return k_bar, v_bar
