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
            Their values are checked, for which the host waits if they are on a device; not so while a CUDA graph is
            captured, where they have to be on the device.

    Returns:
        ``[*batch, H, N, V]`` in the dtype of `q`, a Dual if any argument is one. A query that may see no key gives
        zeros, with zero gradients. Plain tensors go to ``scaled_dot_product_attention`` where it knows the options
            and draws the same dropout mask.

    Raises:
        TypeError: an argument is no tensor, or a dtype is wrong.
        ValueError: shapes, devices, options or numbers of tangents do not fit.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, (Tensor, Dual)):
            raise TypeError(f"attention: {name} must be a Tensor or a Dual, got {type(x).__name__}.")
    if mask is not None and not isinstance(mask, (Tensor, Dual)):
        raise TypeError(f"attention: mask must be a Tensor, a Dual or None, got {type(mask).__name__}.")
    tensors: tuple[Any, Any, Any, Any] = (q, k, v, mask)
    dual = any(isinstance(x, Dual) for x in tensors)
    tangents = num_tangents(*tensors)
    stacks = (stack_of(q), stack_of(k), stack_of(v), stack_of(mask)) if dual else tensors
    q_shape, k_shape = check_tensors(*stacks, axes=int(dual))
    check_options(causal, softcap, window, dropout)
    scale = max(q_shape[-1], 1) ** -0.5 if scale is None else float(scale)
    packed = packed_sequences(q_shape, k_shape, stacks[0].device, mask is not None, cu_seqlens)
    options = Options.of(causal, q_shape[-2], k_shape[-2], packed is not None)
    options = options._replace(scale=scale, softcap=softcap, window=window, dropout=dropout)
    if packed is not None:
        options = options._replace(q_start=packed.starts[0], k_start=packed.starts[1])
    if not dual:
        # torch's attention wants the lengths of packed sequences, which a captured graph cannot tell
        captured = packed is not None and packed.bounds is None
        if softcap is None and not captured and not (dropout > 0 and draws_apart(q.device)):
            return _plain(*tensors, options, None if packed is None else packed.bounds)
        stacks = stack_of(q), stack_of(k), stack_of(v), stack_of(mask)

    def on_shards() -> Tensor | Dual:
        if cu_seqlens is not None:
            raise UnsupportedOperation("attention: cu_seqlens do not go with DTensors: pass local shards.")
        flat = {"causal": causal, "scale": scale, "softcap": softcap, "window": window, "dropout": dropout}
        return sharding.OPS["attention"](functools.partial(attention, **flat), *tensors)

    backend, operands = prepare(
        "attention",
        stacks[:3],
        flops=lambda q, k, v: (
            (1 + 2 * tangents) * flops(q, k, v, options, None if packed is None else packed.sizes())
        ),
        shards=on_shards if dual else None,
        cast=autocast_low,
        uncast=stacks[3],
        triton_lacks=lacks_in_triton,
        kind=lambda q, k, v: kind_of(q, k, v, stacks[3], options),
    )
    if backend == SHARDS:
        return operands
    qs, ks, vs = operands
    # read for the mask of dropout only: compiled code would guard on the number of sequences
    sizes = packed.sizes() if packed is not None and dropout > 0 else None
    out = run(qs, ks, vs, stacks[3], options, backend, sizes)
    return Dual(out) if dual else out[0]


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
