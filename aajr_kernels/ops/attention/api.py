"""The public attention: checks, shapes, backend choice, coverage."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import sharding
from ...autocast import autocast_low, no_autocast
from ...backends import choice
from ...backends.errors import UnsupportedOperation
from ...coverage import record, recording
from ...dual import Dual, num_tangents, stack_of
from .function import AttentionFunction
from .packed import Bounds, Packed, packed_sequences, pieces

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_NUMBERS: Any = (Tensor, Dual)
_TRITON_HEAD = 256  # tiles of larger heads do not fit into the memory of a multiprocessor
#: bytes of it that float32 tiles of the largest heads take: consumer processors have less, and take heads up to 128
_TRITON_ROOM = 131_072


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
    _check_tensors(q, k, v, mask)
    scale = _check_options(q, causal, scale, softcap, window, dropout)
    tangents, dual = num_tangents(q, k, v, mask), any(isinstance(x, Dual) for x in (q, k, v, mask))
    if dual and sharding.is_dtensor(*(x.stacked if isinstance(x, Dual) else x for x in (q, k, v, mask))):
        if cu_seqlens is not None:
            raise UnsupportedOperation("attention: cu_seqlens do not go with DTensors: pass local shards.")
        run = functools.partial(
            attention, causal=causal, scale=scale, softcap=softcap, window=window, dropout=dropout
        )
        return sharding.OPS["attention"](run, q, k, v, mask)
    packed = packed_sequences(q, k, mask, cu_seqlens)
    # torch's attention wants the lengths of packed sequences, which a captured graph cannot tell
    captured = packed is not None and packed.bounds is None
    own = dropout > 0 and draws_apart(q.device)
    if not dual and softcap is None and not captured and not own:
        return _plain(
            q, k, v, mask, causal, window, scale, dropout, None if packed is None else packed.bounds
        )
    batch = q.shape[:-3]
    qs, ks, vs = autocast_low(*(_five_axes(stack_of(x)) for x in (q, k, v)))
    for name, x in (("k", ks), ("v", vs)):
        if x.dtype != qs.dtype:
            raise TypeError(
                f"attention: {name} must have the dtype of q ({qs.dtype}), got {x.dtype}: cast one of them."
            )
    bias = None if mask is None else _mask_five_axes(stack_of(mask), batch)
    backend = choice.select_backend("attention", qs, ks, vs, triton_lacks=_too_large(qs, vs))
    drawn = _draw(backend, qs, ks, dropout, packed) if dropout > 0 else None
    if recording() and torch.compiler.is_compiling():
        record("attention", backend)  # lengths may be symbols, and packed ones unknown
    elif recording():
        sizes = [(qs.shape[-2], ks.shape[-2])] if packed is None else packed.sizes()
        pairs = sum(_visible_pairs(n, m, _offset(causal, n, m), window) for n, m in sizes)
        pairs *= qs.shape[1] * qs.shape[2]
        record("attention", backend, 2.0 * pairs * (1 + 2 * tangents) * (qs.shape[-1] + vs.shape[-1]))
    align_right = packed is not None and causal == "lower_right"
    offset = 0 if align_right else _offset(causal, qs.shape[-2], ks.shape[-2])
    options = (scale, softcap, offset, window, dropout, align_right)
    starts = () if packed is None else packed.starts
    out = AttentionFunction.apply(qs, ks, vs, bias, options, backend, drawn, *starts)
    out = out.reshape(out.shape[0], *batch, *out.shape[2:])
    return Dual(out) if dual else out[0]


def draws_apart(device: torch.device) -> bool:
    """Whether torch's attention and ours draw other dropout masks there: fused kernels each draw in their own way."""
    return device.type != "cpu" or choice.current_backend() == "triton"


def _draw(backend: str, q: Tensor, k: Tensor, p: float, packed: Packed | None) -> Tensor:
    """The weights that dropout keeps, bool ``[B, H, N, M]``, or the seed for kernels that draw them."""
    if backend == "triton":
        # on the device: a kernel reads it there, the host does not wait, and a captured graph draws anew
        return torch.randint(1 << 62, (), device=q.device)
    weights = torch.float64 if q.dtype == torch.float64 else torch.float32

    def kept(*shape: int) -> Tensor:
        """As torch's attention written out draws it, in the same order."""
        with torch.no_grad(), no_autocast(q.device.type):
            return torch.dropout(torch.ones(shape, dtype=weights, device=q.device), p, True) != 0

    _, batch, heads, n, _ = q.shape
    if packed is None:
        return kept(batch, heads, n, k.shape[-2])
    sizes = packed.sizes()
    keep = torch.zeros((1, heads, n, max([0, *(m for _, m in sizes)])), dtype=torch.bool, device=q.device)
    start = 0
    for rows, keys in sizes:
        keep[:, :, start : start + rows, :keys] = kept(1, heads, rows, keys)
        start += rows
    return keep


def _too_large(q: Tensor, v: Tensor) -> str | None:
    """None where tiles of the heads fit into the memory of a multiprocessor, or what would."""
    largest, limit = max(q.shape[-1], v.shape[-1]), _TRITON_HEAD
    if (
        largest > limit // 2
        and q.dtype == torch.float32
        and q.device.type == "cuda"
        and not torch.version.hip
    ):
        properties = torch.cuda.get_device_properties(q.device)
        if getattr(properties, "shared_memory_per_block_optin", _TRITON_ROOM) < _TRITON_ROOM:
            limit //= 2
    if largest <= limit:
        return None
    low = " in float32 on this device" if limit < _TRITON_HEAD else ""
    return f"takes head sizes up to {limit}{low}, got {largest}"


def _offset(causal: bool | str, queries: int, keys: int) -> int | None:
    """Query i sees the keys j <= i + offset."""
    return None if causal is False else keys - queries if causal == "lower_right" else 0


def _check_tensors(q: Any, k: Any, v: Any, mask: Any) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, _NUMBERS):
            raise TypeError(f"attention: {name} must be a Tensor or a Dual, got {type(x).__name__}.")
        if x.dtype not in _FLOATS:
            raise TypeError(
                f"attention: {name} must be float64, float32, bfloat16 or float16, got {x.dtype}."
            )
        if len(x.shape) < 3:
            raise ValueError(
                f"attention: {name} must be [*batch, heads, positions, features], got {tuple(x.shape)}: add the axis "
                "of heads with unsqueeze(-3)."
            )
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.shape[:-3] == k.shape[:-3] == v.shape[:-3]:
        raise ValueError(
            f"attention: the batch axes of q, k and v must be equal, got {shapes}: expand them first."
        )
    if k.shape[-3:-1] != v.shape[-3:-1]:
        raise ValueError(f"attention: k and v must agree in heads and positions, got {shapes}.")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"attention: q and k must have equally many features, got {shapes}.")
    if k.shape[-3] == 0 or q.shape[-3] % k.shape[-3]:
        raise ValueError(f"attention: the heads of q must be a multiple of those of k and v, got {shapes}.")
    for name, x in (("k", k), ("v", v), ("mask", mask)):
        if isinstance(x, _NUMBERS) and x.device != q.device:
            raise ValueError(f"attention: {name} must be on the device of q ({q.device}), got {x.device}.")
    if mask is None:
        return
    if not isinstance(mask, _NUMBERS):
        raise TypeError(f"attention: mask must be a Tensor, a Dual or None, got {type(mask).__name__}.")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"attention: mask must be bool (True = attend) or a floating bias, got {mask.dtype}: use mask.bool()."
        )
    full = (*q.shape[:-1], k.shape[-2])
    pairs = zip(reversed(mask.shape), reversed(full), strict=False)
    if len(mask.shape) > len(full) or any(n not in (1, size) for n, size in pairs):
        raise ValueError(
            f"attention: mask must be broadcastable to [*batch, H, N, M] = {full}, got {tuple(mask.shape)}."
        )


def _check_options(
    q: Tensor | Dual,
    causal: bool | str,
    scale: float | None,
    softcap: float | None,
    window: int | None,
    dropout: float,
) -> float:
    if causal not in (False, True, "upper_left", "lower_right"):
        raise ValueError(
            f"attention: causal must be False, True, 'upper_left' or 'lower_right', got {causal!r}."
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"attention: softcap must be positive or None, got {softcap!r}.")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"attention: window must be a positive int or None, got {window!r}.")
    if window is not None and causal is False:
        raise ValueError(
            f"attention: window={window} counts keys back from the query and needs causal=True or 'lower_right': "
            "pass a bool mask for a window to both sides."
        )
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"attention: dropout must be a probability between 0 and 1, got {dropout!r}.")
    return max(q.shape[-1], 1) ** -0.5 if scale is None else float(scale)


def _plain(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    causal: bool | str,
    window: int | None,
    scale: float,
    dropout: float,
    bounds: Bounds | None,
) -> Tensor:
    """torch's own attention of plain tensors, of packed ones a sequence at a time."""
    if bounds is not None:
        parts = [
            _plain(
                q[..., rows, :], k[..., keys, :], v[..., keys, :], None, causal, window, scale, dropout, None
            )
            for rows, keys in pieces(bounds)
        ]
        return torch.cat(parts, -2) if parts else q.new_zeros(*q.shape[:-1], v.shape[-1])
    offset = _offset(causal, q.shape[-2], k.shape[-2])
    gqa = q.shape[-3] != k.shape[-3]
    if mask is None and window is None and offset in (None, 0):
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=offset == 0, scale=scale, enable_gqa=gqa
        )
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
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=gqa
    )


def _five_axes(x: Tensor) -> Tensor:
    """``[J, *batch, heads, positions, features]`` with one batch axis."""
    return x.unsqueeze(1) if x.dim() == 4 else x.flatten(1, -4)


def _mask_five_axes(mask: Tensor, batch: tuple[int, ...]) -> Tensor:
    """``[J, ...]``, broadcastable to ``[J, *batch, H, N, M]``, as ``[J, B|1, H|1, N|1, M|1]``."""
    mask = mask.reshape(mask.shape[0], *[1] * (len(batch) + 4 - mask.dim()), *mask.shape[1:])
    if any(n != 1 for n in mask.shape[1:-3]):
        mask = mask.expand(mask.shape[0], *batch, *mask.shape[-3:])
    return mask.reshape(mask.shape[0], math.prod(mask.shape[1:-3]), *mask.shape[-3:])


def _visible_pairs(queries: int, keys: int, offset: int | None, window: int | None) -> float:
    """How many (query, key) pairs the causal limit and the window leave."""
    if offset is None:
        return float(queries * keys)
    total = 0
    for i in range(queries):
        high = min(i + offset + 1, keys)
        low = 0 if window is None else max(0, i + offset + 1 - window)
        total += max(0, high - low)
    return float(total)
