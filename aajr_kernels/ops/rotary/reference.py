"""Rotary embedding on stacked tensors, in plain PyTorch."""

from __future__ import annotations

import torch


def _halves(x: torch.Tensor, size: int, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the first and second members of the rotated pairs among the first `size` features."""
    if interleaved:
        return x[..., 0:size:2], x[..., 1:size:2]
    return x[..., : size // 2], x[..., size // 2 : size]


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rotary_fwd(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate the first ``cos.shape[-1]`` features.

    Args:
        x: ``[1 + K, *shape]``; low dtypes are computed in float32.
        cos: broadcasts to ``[*shape[:-1], R]``, R even and at most ``shape[-1]``.
        sin: likewise.
        interleaved: pairs are neighbours instead of halves.

    Returns:
        Shape and dtype of x.
    """
    y = torch.empty_like(x)
    size = cos.shape[-1]
    (c1, c2), (s1, s2) = _halves(_wide(cos), size, interleaved), _halves(_wide(sin), size, interleaved)
    x1, x2 = (_wide(half) for half in _halves(x, size, interleaved))
    y1, y2 = _halves(y, size, interleaved)
    y1.copy_((x1 * c1).addcmul_(x2, s1, value=-1))
    y2.copy_((x2 * c2).addcmul_(x1, s2))
    if size < x.shape[-1]:
        y[..., size:] = x[..., size:]
    return y


def rotary_bwd(y_bar: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """The transpose of :func:`rotary_fwd` applied to stacked cotangents."""
    x_bar = torch.empty_like(y_bar)
    size = cos.shape[-1]
    (c1, c2), (s1, s2) = _halves(_wide(cos), size, interleaved), _halves(_wide(sin), size, interleaved)
    g1, g2 = (_wide(half) for half in _halves(y_bar, size, interleaved))
    x1, x2 = _halves(x_bar, size, interleaved)
    x1.copy_((g1 * c1).addcmul_(g2, s2))
    x2.copy_((g2 * c2).addcmul_(g1, s1, value=-1))
    if size < y_bar.shape[-1]:
        x_bar[..., size:] = y_bar[..., size:]
    return x_bar


def rotary_tables_bwd(
    y_bar: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
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
