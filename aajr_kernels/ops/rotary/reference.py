"""Rotary embedding on stacked tensors, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def _halves(x: Tensor, size: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the first and second members of the rotated pairs among the first `size` features."""
    if interleaved:
        return x[..., 0:size:2], x[..., 1:size:2]
    return x[..., : size // 2], x[..., size // 2 : size]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transposed: bool) -> Tensor:
    """Rotate the first ``cos.shape[-1]`` features, out of place: every transform of torch differentiates it.

    Args:
        x: ``[1 + K, *shape]``, or ``[*shape]``; low dtypes are computed in float32.
        cos: broadcasts to ``[*shape[:-1], R]``, R even and at most ``shape[-1]``.
        sin: likewise.
        interleaved: pairs are neighbours instead of halves.
        transposed: the transpose of the map, which takes cotangents of y to those of x.

    Returns:
        Shape and dtype of x.
    """
    size = cos.shape[-1]
    (c1, c2), (s1, s2) = _halves(_wide(cos), size, interleaved), _halves(_wide(sin), size, interleaved)
    if transposed:
        s1, s2 = -s2, -s1
    x1, x2 = (_wide(half) for half in _halves(x, size, interleaved))
    turned = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
    y = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([y.to(x.dtype), x[..., size:]], -1)


def rotary_tables_bwd(
    y_bar: Tensor, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Cotangents of cos and sin, shaped like them."""
    size = cos.shape[-1]
    cos_bar, sin_bar = (
        torch.empty((*x.shape[:-1], size), dtype=_wide(x[:0]).dtype, device=x.device) for _ in "cs"
    )
    g1, g2 = (_wide(half) for half in _halves(y_bar, size, interleaved))
    x1, x2 = (_wide(half) for half in _halves(x, size, interleaved))
    for out, first, second in ((cos_bar, g1 * x1, g2 * x2), (sin_bar, -g1 * x2, g2 * x1)):
        o1, o2 = _halves(out, size, interleaved)
        o1.copy_(first)
        o2.copy_(second)
    return cos_bar.sum_to_size(cos.shape).to(cos.dtype), sin_bar.sum_to_size(sin.shape).to(sin.dtype)
