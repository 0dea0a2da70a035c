"""The options of one call of attention, in one object from the public function to the edge of the kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_TRITON_HEAD = 256  # tiles of larger heads do not fit into the memory of a multiprocessor
#: bytes of it that float32 tiles of the largest heads take: consumer processors have less, and take heads up to 128
_TRITON_ROOM = 131_072


class Options(NamedTuple):
    """Everything beside q, k, v and the mask. It is a tuple: ``*options`` are flat arguments of an operator of torch.

    Keys count from the first of the context, if there is one: those of the operand k follow it.

    Attributes:
        scale: factor of the scores.
        softcap: c of c tanh(scores / c), or None.
        offset: query i sees the keys j <= i + offset; None without causality.
        window: and only the keys j > i + offset - window; None for all.
        dropout: probability of dropping an attention weight.
        align_right: with packed sequences, offset = keys - queries of each sequence.
        drawn: the dropout mask, bool ``[B, H, N, M]``, True where a weight is kept (of packed sequences
            ``[1, H, N, longest M]``); for kernels that draw it themselves their seed, int64, on their device.
        q_start: of packed sequences, ascending int64 offsets ``[sequences + 1]`` of their queries; None without.
        k_start: likewise of their keys.
        context_k: keys without tangents ``[1, B, HK, C, D]`` before those of the call; None without a context.
        context_v: their values ``[1, B, HK, C, V]``.
    """

    scale: float
    softcap: float | None = None
    offset: int | None = None
    window: int | None = None
    dropout: float = 0.0
    align_right: bool = False
    drawn: Tensor | None = None
    q_start: Tensor | None = None
    k_start: Tensor | None = None
    context_k: Tensor | None = None
    context_v: Tensor | None = None

    @classmethod
    def of(
        cls, causal: bool | str, queries: int, keys: int, packed: bool, context: int = 0, **others: Any
    ) -> Options:
        """The options that say which keys a query sees, `context` keys before the others, and the `others`."""
        right = causal == "lower_right"
        offset = None if causal is False else context + (keys - queries if right and not packed else 0)
        return cls(offset=offset, align_right=packed and right, **others)

    @property
    def starts(self) -> tuple[Tensor, Tensor] | None:
        """Both offsets of packed sequences."""
        return None if self.q_start is None or self.k_start is None else (self.q_start, self.k_start)

    @property
    def context(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the context."""
        return None if self.context_k is None or self.context_v is None else (self.context_k, self.context_v)

    def with_context(self, context: Sequence[Tensor]) -> Options:
        """The same with keys and values of a context, or as it is without any."""
        return self._replace(context_k=context[0], context_v=context[1]) if context else self

    @property
    def context_length(self) -> int:
        """How many keys the context has."""
        return 0 if self.context_k is None else self.context_k.shape[-2]

    def parts(self) -> tuple[Options, Options]:
        """Those of a call with the keys of the context only, and with the other keys only."""
        length, drawn = self.context_length, self.drawn
        one_part = self._replace(context_k=None, context_v=None)
        return (
            one_part._replace(drawn=None if drawn is None else drawn[..., :length]),
            one_part._replace(
                drawn=None if drawn is None else drawn[..., length:],
                offset=None if self.offset is None else self.offset - length,
            ),
        )

    def of_sequence(self, rows: slice, keys: slice) -> Options:
        """Those of one of the packed sequences."""
        offset = self.offset
        if self.align_right:
            offset = keys.stop - keys.start - (rows.stop - rows.start)
        drawn = None if self.drawn is None else self.drawn[:, :, rows, : keys.stop - keys.start]
        return self._replace(offset=offset, drawn=drawn, align_right=False, q_start=None, k_start=None)


def check_tensors(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, axes: int, context: tuple[Tensor, Tensor] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Raise unless the operands fit; returns the shapes of q and k without their first `axes`, 1 for stacks.

    The tensors of the context have no such axes.
    """
    shapes = []
    for name, x in (("q", q), ("k", k), ("v", v)):
        shape = tuple(x.shape[axes:])
        shapes.append(shape)
        if x.dtype not in _FLOATS:
            raise TypeError(
                f"attention: {name} must be float64, float32, bfloat16 or float16, got {x.dtype}."
            )
        if len(shape) < 3:
            raise ValueError(
                f"attention: {name} must be [*batch, heads, positions, features], got {shape}: add the axis of heads "
                "with unsqueeze(-3)."
            )
    qs, ks, vs = shapes
    message = f"q {qs}, k {ks}, v {vs}"
    if not qs[:-3] == ks[:-3] == vs[:-3]:
        raise ValueError(
            f"attention: the batch axes of q, k and v must be equal, got {message}: expand them first."
        )
    if ks[-3:-1] != vs[-3:-1]:
        raise ValueError(f"attention: k and v must agree in heads and positions, got {message}.")
    if qs[-1] != ks[-1]:
        raise ValueError(f"attention: q and k must have equally many features, got {message}.")
    if ks[-3] == 0 or qs[-3] % ks[-3]:
        raise ValueError(f"attention: the heads of q must be a multiple of those of k and v, got {message}.")
    keys = ks[-2]
    if context is not None:
        _check_context(*context, ks, vs)
        keys += context[0].shape[-2]
    first, second = context or (None, None)
    others = (
        ("k", k),
        ("v", v),
        ("mask", mask),
        ("the context's key", first),
        ("the context's value", second),
    )
    for name, other in others:
        if other is not None and other.device != q.device:
            raise ValueError(
                f"attention: {name} must be on the device of q ({q.device}), got {other.device}."
            )
    if mask is not None:
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(
                f"attention: mask must be bool (True = attend) or a floating bias, got {mask.dtype}: use mask.bool()."
            )
        full, shape = (*qs[:-1], keys), tuple(mask.shape[axes:])
        pairs = zip(reversed(shape), reversed(full), strict=False)
        if len(shape) > len(full) or any(n not in (1, size) for n, size in pairs):
            raise ValueError(
                f"attention: mask must be broadcastable to [*batch, H, N, M] = {full}, got {shape}."
            )
    return qs, ks


def _check_context(key: Tensor, value: Tensor, ks: tuple[int, ...], vs: tuple[int, ...]) -> None:
    for name, x, beside in (("key", key, ks), ("value", value, vs)):
        if x.dtype not in _FLOATS:
            raise TypeError(
                f"attention: the context's {name} must be float64, float32, bfloat16 or float16, got {x.dtype}."
            )
        length = x.shape[-2] if x.dim() > 1 else 0
        expected = (*beside[:-2], length, beside[-1])
        if tuple(x.shape) != expected:
            raise ValueError(
                f"attention: the context's {name} must have the shape of {name[0]} but for its length, "
                f"{expected}, got {tuple(x.shape)}."
            )
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(
            "attention: the context must have equally many keys and values, got "
            f"{key.shape[-2]} and {value.shape[-2]}."
        )


def check_options(causal: bool | str, softcap: float | None, window: int | None, dropout: float) -> None:
    """Raise unless the options have values that mean something."""
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


def lacks_in_triton(q: Tensor, k: Tensor, v: Tensor, *context: Tensor) -> str | None:
    """None where tiles of the heads fit into the memory of a multiprocessor, or the largest heads that do."""
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


def visible_pairs(queries: int, keys: int, offset: int | None, window: int | None) -> int:
    """How many (query, key) pairs the causal limit and the window leave."""
    if offset is None:
        return queries * keys

    def below(last: int) -> int:
        """Keys 0 to i of all queries, where i runs from ``last - queries + 1`` to `last`."""

        def upto(i: int) -> int:
            full = min(max(i + 1, 0), keys)
            return full * (full + 1) // 2 + max(i + 1 - keys, 0) * keys

        return upto(last) - upto(last - queries)

    last = queries - 1 + offset
    return below(last) - (0 if window is None else below(last - window))


def flops(
    q: Tensor, k: Tensor, v: Tensor, options: Options, tangents: int, sizes: list[tuple[int, int]] | None
) -> float:
    """Multiplications and additions of a forward: a product of scores and one of weights, and those of tangents.

    A tangent takes two of each, and one where the keys have none: those of a context.
    """
    before, offset = options.context_length, options.offset
    pairs = 0
    for queries, keys in [(q.shape[-2], k.shape[-2])] if sizes is None else sizes:
        if options.align_right:
            offset = keys - queries
        after = offset if offset is None else offset - before
        pairs += (1 + 2 * tangents) * visible_pairs(queries, keys, after, options.window)
        if before:
            pairs += (1 + tangents) * visible_pairs(queries, before, offset, options.window)
    return 2.0 * pairs * math.prod(q.shape[1:-2]) * (q.shape[-1] + v.shape[-1])
