"""Attention on the native CPU kernels; functions and contracts are those of the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends import cpu as native
from . import operators
from .options import Options

__all__ = ["attention_bwd", "attention_fwd"]


def _numbers(o: Options) -> tuple[tuple[int, ...], tuple[float, ...]]:
    if native.is_dry():  # lengths that are symbols: no kernel asks for them
        return (), ()
    flags = (
        int(o.offset is not None),
        o.offset or 0,
        o.window or 0,
        int(o.drawn is not None),
        int(o.align_right),
    )
    return flags, (o.scale, o.softcap or 0.0, o.dropout)


def _drawn(options: Options) -> tuple[Tensor, ...]:
    return () if options.drawn is None else (options.drawn,)


def _context(options: Options) -> tuple[Tensor, ...]:
    return () if options.context is None else tuple(native.row_dense(x) for x in options.context)


def _kernel_mask(mask: Tensor | None) -> Tensor | None:
    """The mask in a dtype that the kernels read."""
    if mask is None or mask.dtype == torch.bool or mask.dtype in native.FLOATS:
        return mask
    return mask.float()


@native.operator(operators.ATTENTION_FWD)
def _attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *flat: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Output ``[1+K, B, H, N, V]`` (in memory ``[1+K, B, N, H, V]``) and the row statistics of the reference: shift and
    norm ``[2, B, H, N]``, and the means of the tangents of the scores, K or none."""
    options = Options(*flat)
    q, k, v = (native.row_dense(x) for x in (q, k, v))
    biased = mask is not None and mask.dtype != torch.bool
    stacks = max(x.shape[0] for x in (q, k, v, *((mask,) if biased and mask is not None else ())))
    _, b, h, n, _ = q.shape
    has_scores = q.shape[0] > 1 or k.shape[0] > 1 or (biased and mask is not None and mask.shape[0] > 1)
    # heads next to features: the caller's transpose back is then a view
    out = native.empty((stacks, b, n, h, v.shape[-1]), dtype=q.dtype).transpose(2, 3)
    stats, means = (torch.empty((count, b, h, n)) for count in (2, stacks - 1 if has_scores else 0))
    operands = (q, k, v, _kernel_mask(mask), options.q_start, options.k_start, *stats, means, out)
    native.call("attention_fwd", operands + _drawn(options) + _context(options), *_numbers(options))
    return out, stats, means


@native.operator(operators.ATTENTION_BWD)
def _attention_bwd(
    out_bar: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    stats: Tensor,
    means: Tensor,
    need_q: bool,
    need_k: bool,
    need_v: bool,
    need_bias: bool,
    need_context_k: bool,
    need_context_v: bool,
    *flat: Any,
) -> operators.Gradients:
    """Gradients of q, k, v, the bias and the context, None where not needed."""
    options = Options(*flat)
    q, k, v, out, out_bar = (native.row_dense(x) for x in (q, k, v, out, out_bar))
    needs = zip((q, k, v), (need_q, need_k, need_v))
    q_bar, k_bar, v_bar = (native.empty_like(x) if need else None for x, need in needs)
    bias_bar = torch.zeros(mask.shape) if need_bias and mask is not None else None
    saved = (*stats.contiguous(), means.contiguous(), out, out_bar)
    inputs = (q, k, v, _kernel_mask(mask), options.q_start, options.k_start, *saved)
    context = _context(options)
    of_context = zip(context, (need_context_k, need_context_v))
    context_bars = [native.empty_like(x) if need else None for x, need in of_context]
    outputs = (q_bar, k_bar, v_bar, bias_bar)
    native.call(
        "attention_bwd", (*inputs, *outputs, *_drawn(options), *context, *context_bars), *_numbers(options)
    )
    mask_bar = None if bias_bar is None or mask is None else bias_bar.to(mask.dtype)
    context_k_bar, context_v_bar = context_bars or (None, None)
    return q_bar, k_bar, v_bar, mask_bar, context_k_bar, context_v_bar


attention_fwd, attention_bwd = operators.with_options(_attention_fwd, _attention_bwd)
