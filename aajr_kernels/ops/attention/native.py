"""Attention on the native CPU kernels; functions and contracts are those of the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from .tiling import Options

__all__ = ["Options", "attention_bwd", "attention_fwd"]


def _numbers(options: Options) -> tuple[tuple[int, ...], tuple[float, ...]]:
    causal = options.offset is not None
    ints = (
        int(causal),
        options.offset or 0,
        options.window or 0,
        int(options.seed),
        int(options.align_right),
    )
    return ints, (options.scale, options.softcap or 0.0, options.dropout)


def _kernel_mask(mask: Tensor | None) -> Tensor | None:
    """The mask in a dtype that the kernels read."""
    if mask is None or mask.dtype == torch.bool or mask.dtype in native.FLOATS:
        return mask
    return mask.float()


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    options: Options,
    starts: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output ``[1+K, B, H, N, V]`` (in memory ``[1+K, B, N, H, V]``) and the row statistics of the reference."""
    q, k, v = (native.row_dense(x) for x in (q, k, v))
    biased = mask is not None and mask.dtype != torch.bool
    stacks = max(x.shape[0] for x in (q, k, v, *((mask,) if biased and mask is not None else ())))
    _, b, h, n, _ = q.shape
    has_scores = q.shape[0] > 1 or k.shape[0] > 1 or (biased and mask is not None and mask.shape[0] > 1)
    # heads next to features: the caller's transpose back is then a view
    out = native.empty((stacks, b, n, h, v.shape[-1]), dtype=q.dtype).transpose(2, 3)
    stats = torch.empty((2 + (stacks - 1 if has_scores else 0), b, h, n))
    shift, norm, mu = stats[0], stats[1], stats[2:]
    ints, floats = _numbers(options)
    native.call(
        "attention_fwd",
        (q, k, v, _kernel_mask(mask), *(starts or (None, None)), shift, norm, mu, out),
        ints,
        floats,
    )
    return out, shift, norm, mu


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
    starts: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k, v and the bias, None where not needed."""
    q, k, v, out_bar = (native.row_dense(x) for x in (q, k, v, out_bar))
    q_bar, k_bar, v_bar = (native.empty_like(x) if need else None for x, need in zip((q, k, v), needs))
    bias_bar = torch.zeros(mask.shape) if needs[3] and mask is not None else None
    ints, floats = _numbers(options)
    native.call(
        "attention_bwd",
        (
            q,
            k,
            v,
            _kernel_mask(mask),
            *(starts or (None, None)),
            shift,
            norm,
            mu,
            out,
            out_bar,
            q_bar,
            k_bar,
            v_bar,
            bias_bar,
        ),
        ints,
        floats,
    )
    return q_bar, k_bar, v_bar, None if bias_bar is None or mask is None else bias_bar.to(mask.dtype)
