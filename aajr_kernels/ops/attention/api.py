"""The public attention: shapes, shards and plain tensors; :mod:`.options` checks the arguments."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import sharding
from ...autocast import autocast_low
from ...backends import choice
from ...backends.errors import UnsupportedOperation
from ...dual import Dual, num_tangents, stack_of
from ..prepare import SHARDS, prepare
from .configs import spills_in_triton
from .function import kind_of, run
from .options import Options, check_options, check_tensors, flops, lacks_in_triton
from .packed import Bounds, packed_sequences, pieces


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
    cu_seqlens: Tensor | Sequence[Tensor] | None = None,
    context: tuple[Tensor, Tensor] | None = None,
) -> Tensor: ...
@overload
def attention(
    q: Tensor | Dual,
    k: Tensor | Dual,
    v: Tensor | Dual,
    *,
    mask: Tensor | Dual | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
    cu_seqlens: Tensor | Sequence[Tensor] | None = None,
    context: tuple[Tensor, Tensor] | None = None,
) -> Tensor | Dual: ...


def attention(
    q: Tensor | Dual,
    k: Tensor | Dual,
    v: Tensor | Dual,
    *,
    mask: Tensor | Dual | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
    cu_seqlens: Tensor | Sequence[Tensor] | None = None,
    context: tuple[Tensor, Tensor] | None = None,
) -> Tensor | Dual:
    """Attention ``O = P V`` with ``P = softmax(cap(s Q Kᵀ) + bias)`` and its tangents, in memory linear in N and M.

    The tangents are ``Ȯ_k = (P∘(Ṡ_k − μ_k)) V + P V̇_k`` with ``Ṡ_k = cap'∘s(Q̇_k Kᵀ + Q K̇_kᵀ) + ḃias_k`` and
    ``μ_k = rowsum(P∘Ṡ_k)``. Any of `q`, `k`, `v`, `mask` may be a Dual; the tangents of the others are zero and cost
    nothing. Gradients reach the primals and tangents of all four.

    Args:
        q: queries ``[*batch, H, N, D]``; float64, float32, bfloat16 or float16. ``[H, N, D]`` is fine.
        k: keys ``[*batch, HK, M, D]`` with HK a divisor of H: consecutive query heads share a key head. Same dtype.
        v: values ``[*batch, HK, M, V]``. Same dtype.
        mask: bool (True = attend) or a floating bias added to the scores, broadcastable to ``[*batch, H, N, M]``. The
            bias may require a gradient and have any floating dtype.
        causal: True or "upper_left" (query i sees keys j <= i), "lower_right" (j <= i + M − N), or False.
        scale: s, by default ``D ** -0.5``.
        softcap: c of ``cap(x) = c tanh(x / c)``, applied before the mask.
        window: a query sees its last `window` keys only, its own position included; needs `causal`.
        dropout: probability of dropping an attention weight, one mask for primal and tangents. On the reference and
            native backends it is the mask that ``scaled_dot_product_attention`` of plain tensors draws from the same
            random state, ``N * M`` bytes for a head. The Triton kernels draw theirs from a seed of torch's generator,
            for Duals and plain tensors alike.
        cu_seqlens: packed sequences: ascending offsets ``[sequences + 1]`` from 0 to N, int32 or int64. `q`, `k`, `v`
            are then ``[H, N, D]`` (or with a batch axis of one), all sequences one after another, and every sequence
            attends to its own keys; `causal` and `window` count within a sequence, and `mask` is None. A pair
            (cu_seqlens_q, cu_seqlens_k) where a sequence has other numbers of queries and keys; either may be 0.
            Their values are checked, for which the host waits if they are on a device, once for a tensor that is not
            written in place in between; not so while a CUDA graph is captured, where they have to be on the device.
        context: keys ``[*batch, HK, C, D]`` and values ``[*batch, HK, C, V]`` without tangents, before those of `k`
            and `v`: the result is that of keys ``cat(context_key, k)`` whose tangents are zero for the context, without
            the copies, and against the context without the products of tangents of keys and values. Plain Tensors;
            gradients reach them, also through the tangents. Keys count from the context's first one: `window` and
            "lower_right" as for the longer keys, "upper_left" lets query i see the context and keys j <= i of `k`, and
            the last axis of `mask` has C + M columns. Not with `cu_seqlens`.

    Returns:
        ``[*batch, H, N, V]`` in the dtype of `q`, a Dual if any argument is one. A query that may see no key gives
        zeros, with zero gradients. Plain tensors go to ``scaled_dot_product_attention`` where it knows the options
            and draws the same dropout mask.

    Raises:
        TypeError: an argument is no tensor, or a dtype is wrong.
        ValueError: shapes, devices, options or numbers of tangents do not fit.
        UnsupportedOperation: DTensors with `cu_seqlens` or a context.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, (Tensor, Dual)):
            raise TypeError(f"attention: {name} must be a Tensor or a Dual, got {type(x).__name__}.")
    if mask is not None and not isinstance(mask, (Tensor, Dual)):
        raise TypeError(f"attention: mask must be a Tensor, a Dual or None, got {type(mask).__name__}.")
    tensors: tuple[Any, Any, Any, Any] = (q, k, v, mask)
    dual = True in [isinstance(x, Dual) for x in tensors]
    tangents = num_tangents(*tensors)
    stacks = (stack_of(q), stack_of(k), stack_of(v), stack_of(mask)) if dual else tensors
    if context is not None:
        context = _checked_context(context, cu_seqlens)
    q_shape, k_shape = check_tensors(*stacks, axes=int(dual), context=context)
    check_options(causal, softcap, window, dropout)
    scale = max(q_shape[-1], 1) ** -0.5 if scale is None else float(scale)
    packed = packed_sequences(q_shape, k_shape, stacks[0].device, mask is not None, cu_seqlens)
    before = 0 if context is None else context[0].shape[-2]
    others = {"scale": scale, "softcap": softcap, "window": window, "dropout": dropout}
    options = Options.of(causal, q_shape[-2], k_shape[-2], packed is not None, before, **others)
    if packed is not None:
        options = options._replace(q_start=packed.starts[0], k_start=packed.starts[1])
    if not dual:
        # torch's attention wants the lengths of packed sequences, which a captured graph cannot tell
        captured = packed is not None and packed.bounds is None
        apart = captured or context is not None or (dropout > 0 and draws_apart(q.device))
        if softcap is None and not apart:
            return _plain(*tensors, options, None if packed is None else packed.bounds)
        stacks = stack_of(q), stack_of(k), stack_of(v), stack_of(mask)

    def on_shards() -> Tensor | Dual:
        for name, argument in (("cu_seqlens", cu_seqlens), ("context", context)):
            if argument is not None:
                raise UnsupportedOperation(f"attention: {name} must be None for DTensors: pass local shards.")
        flat = {"causal": causal, "scale": scale, "softcap": softcap, "window": window, "dropout": dropout}
        return sharding.OPS["attention"](functools.partial(attention, **flat), *tensors)

    def counted(q: Tensor, k: Tensor, v: Tensor, *context: Tensor) -> float:
        sizes = None if packed is None else packed.sizes()
        return flops(q, k, v, options.with_context(context), tangents, sizes)

    backend, operands = prepare(
        "attention",
        (*stacks[:3], *(x.unsqueeze(0) for x in context or ())),
        flops=counted,
        shards=on_shards if dual else None,
        cast=autocast_low,
        uncast=stacks[3],
        triton_lacks=lacks_in_triton,
        triton_spills=spills_in_triton,
        kind=lambda q, k, v, *context: kind_of(q, k, v, stacks[3], options.with_context(context)),
    )
    if backend == SHARDS:
        return operands
    qs, ks, vs, *contexts = operands
    options = options.with_context(contexts)
    # read for the mask of dropout only: compiled code would guard on the number of sequences
    sizes = packed.sizes() if packed is not None and dropout > 0 else None
    out = run(qs, ks, vs, stacks[3], options, backend, sizes)
    return Dual(out) if dual else out[0]


def _checked_context(context: Any, cu_seqlens: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(context, (tuple, list)) or len(context) != 2:
        raise TypeError(
            f"attention: context must be a pair (keys, values) or None, got {type(context).__name__}."
        )
    for name, x in zip(("keys", "values"), context):
        if not isinstance(x, Tensor):
            raise TypeError(
                f"attention: the context's {name} must be a Tensor, got {type(x).__name__}: those with tangents belong "
                "into k and v."
            )
    if cu_seqlens is not None:
        raise ValueError(
            "attention: context must be None with cu_seqlens, whose sequences see their own keys only: put each "
            "sequence's context before its keys."
        )
    return context[0], context[1]


def draws_apart(device: torch.device) -> bool:
    """Whether torch's attention and ours draw other dropout masks there: fused kernels each draw in their own way."""
    return device.type != "cpu" or choice.current_backend() == "triton"


def _plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options, bounds: Bounds | None
) -> Tensor:
    """torch's own attention of plain tensors, of packed ones a sequence at a time."""
    if bounds is not None:
        parts = [
            _plain(
                q[..., rows, :], k[..., keys, :], v[..., keys, :], None, options.of_sequence(rows, keys), None
            )
            for rows, keys in pieces(bounds)
        ]
        return torch.cat(parts, -2) if parts else q.new_zeros(*q.shape[:-1], v.shape[-1])
    offset, window = options.offset, options.window
    common: dict[str, Any] = {"dropout_p": options.dropout, "scale": options.scale}
    common["enable_gqa"] = q.shape[-3] != k.shape[-3]
    if mask is None and window is None and offset in (None, 0):
        return F.scaled_dot_product_attention(q, k, v, is_causal=offset == 0, **common)
    if offset is not None:
        last = torch.arange(offset, offset + q.shape[-2], device=q.device).unsqueeze(1)
        key = torch.arange(k.shape[-2], device=q.device)
        allowed = key <= last if window is None else (key <= last) & (key > last - window)
        if mask is None:
            mask = allowed
        else:
            mask = mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, -math.inf)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **common)
