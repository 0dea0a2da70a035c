"""RMS norm and layer norm on stacked rows, in plain PyTorch.

Rows are taken in blocks that stay in cache, because every line below is one pass over memory; low dtypes are widened
to float32 block by block. Writing x̂ and ẋ̂ out turns the reverse pass into row-scaled sums of ȳ, ẏ̄, x and ẋ:

    α = r m(a∘x), β_k = r m(b_k∘x), γ_k = m(b_k∘ẋ_k), s = α + r Σ_k (γ_k − 3 c_k β_k)
    ẋ̄_k = r b_k − r² β_k x
    x̄ = r a − r² (Σ_k c_k b_k + Σ_k β_k ẋ_k + s x)
    w̄ = Σ_rows (r ȳ∘x + Σ_k (r ẏ̄_k∘ẋ_k − r² c_k ẏ̄_k∘x))
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK_BYTES = 1 << 20


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows(x: Tensor) -> Tensor:
    """``[1 + K, *batch, C]`` as ``[1 + K, R, C]``."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def _blocks(x: Tensor) -> Iterator[slice]:
    """Slices of the row axis of ``[1 + K, R, C]``; one block where there is no cache to stay in."""
    rows = x.shape[1]
    step = rows
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        step = max(8, _BLOCK_BYTES // (4 * x.shape[0] * max(x.shape[2], 1)))
    for start in range(0, rows, max(step, 1)):
        yield slice(start, min(start + step, rows))


def norm_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Normalised rows and the statistics that the backward needs.

    Args:
        x: ``[1 + K, *batch, C]``; R is the number of rows of the batch.
        weight: ``[C]`` or None.
        bias: ``[C]`` or None, added to the primal.
        eps: added to the mean square.
        offset: added to the weight.
        centred: subtract the row means first (layer norm).
        residual: added to x first, or None. It may be ``[1, *batch, C]``, without tangents, and so may x beside it.

    Returns:
        y in the shape and dtype of x; statistics ``[S, R]`` in float32 (float64 for float64): r, then c_k for every
        tangent, then, if centred, the 1 + K row means; the sum, rounded to the dtype of x, or None.
    """
    summed = None if residual is None else _sum(x, residual)
    x = x if summed is None else summed
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    xs, ys = _rows(x), _rows(y)
    k, (rows, size), wide = x.shape[0] - 1, xs.shape[1:], _wide(x.dtype)
    stats = x.new_empty((1 + k + (1 + k if centred else 0), rows), dtype=wide)
    scale = None if weight is None else weight.to(wide) + offset
    shift = None if bias is None else bias.to(wide)
    for block in _blocks(xs):
        values = xs[:, block].to(wide)
        stat = stats[:, block]
        if centred:
            means = values.mean(-1, keepdim=True)
            stat[1 + k :] = means.squeeze(-1)
            values = values - means
        dots = (values * values[0]).sum(-1).div_(size)
        r = stat[0].copy_(dots[0].add_(eps).rsqrt_())
        c = stat[1 : 1 + k].copy_(dots[1:].mul_(r))
        out = values.mul(r.unsqueeze(-1))
        out[1:].addcmul_(out[:1], (r * c).unsqueeze(-1), value=-1)
        if scale is not None:
            out.mul_(scale)
        if shift is not None:
            out[0].add_(shift)
        ys[:, block] = out
    return y, stats, summed


def _sum(x: Tensor, residual: Tensor) -> Tensor:
    if x.shape[0] == residual.shape[0]:
        return x + residual
    more, fewer = (x, residual) if x.shape[0] > residual.shape[0] else (residual, x)
    return torch.cat([more[:1] + fewer, more[1:]])


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
    """Cotangents of the stacked rows ``[1 + K, *batch, C]``, the weight ``[C]`` and the bias ``[C]``.

    `sum_bar`, what comes to x from elsewhere, is added to the first.

    Weight and bias gradients come in float32 (float64 for float64), or by kernels in the weight's dtype. None where not
    needed.
    """
    result = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
    x, y_bar, x_bar = _rows(x), _rows(y_bar), None if result is None else _rows(result)
    more = None if sum_bar is None else _rows(sum_bar)
    k, size, wide = x.shape[0] - 1, x.shape[2], _wide(x.dtype)
    w_bar = x.new_zeros(size, dtype=wide) if need_weight else None
    b_bar = x.new_zeros(size, dtype=wide) if need_bias else None
    scale = None if weight is None else weight.to(wide) + offset
    for block in _blocks(x):
        g = y_bar[:, block].to(wide)
        if b_bar is not None:
            b_bar += g[0].sum(0)
        if x_bar is None and w_bar is None:
            continue
        xs = x[:, block].to(wide)
        if centred:
            xs = xs - stats[1 + k :, block].unsqueeze(-1)
        r, c = stats[0, block], stats[1 : 1 + k, block]
        same = g * xs  # ȳ∘x and ẏ̄_k∘ẋ_k
        cross = g[1:] * xs[0]  # ẏ̄_k∘x
        if w_bar is not None:
            w_bar += (same * r.unsqueeze(-1)).sum((0, 1))
            w_bar -= (cross * (r * r * c).unsqueeze(-1)).sum((0, 1))
        if x_bar is None:
            continue
        if scale is not None:
            same.mul_(scale)
            cross.mul_(scale)
            g = g * scale  # a and b_k
        dots = same.sum(-1).div_(size)
        beta = cross.sum(-1).mul_(r / size)
        s = r * (dots[0] + (dots[1:] - 3 * c * beta).sum(0))
        out = g * r.unsqueeze(-1)
        r2 = r * r
        out[1:].addcmul_(xs[:1], (r2 * beta).unsqueeze(-1), value=-1)
        out[0].addcmul_(xs[0], (r2 * s).unsqueeze(-1), value=-1)
        for i in range(k):
            out[0].addcmul_(g[1 + i], (r2 * c[i]).unsqueeze(-1), value=-1)
            out[0].addcmul_(xs[1 + i], (r2 * beta[i]).unsqueeze(-1), value=-1)
        if centred:
            out -= out.mean(-1, keepdim=True)
        if more is not None:
            out += more[:, block]
        x_bar[:, block] = out
    return result, w_bar, b_bar
