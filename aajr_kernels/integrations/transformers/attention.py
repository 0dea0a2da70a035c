"""The attention implementation ``"aajr"``: the fused attention behind transformers' calling convention."""

from __future__ import annotations

from typing import Any

import torch

from ...backends.errors import UnsupportedOperation
from ...ops.attention import attention
from .context_keys import Joined
from .masks import Visibility

__all__ = ["attend", "attention_forward"]


def attention_forward(
    module: torch.nn.Module,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Any = None,
    **kwargs: Any,
) -> tuple[Any, None]:
    """Attention of Tensors or Duals, called by the attention modules of transformers.

    Args:
        module: the attention module; its ``is_causal`` counts where no mask was built.
        query: ``[B, H, N, D]``; key, value: ``[B, HK, M, D]``, their heads never repeated. Those
            of a suffix and its context (:class:`.context_keys.Joined`) reach the kernels in two parts.
        attention_mask: a :class:`Visibility` (what the registered mask function returns), a bool or additive tensor
            that broadcasts to ``[B, H, N, M]`` (a mask the user prepared), or None. A query that may see nothing gives
            zeros, as under torch's sdpa; transformers' eager attention averages over all keys there.
        scaling: factor of the scores; None means ``D ** -0.5``.
        dropout: probability; one mask for primal and tangents.
        is_causal: overrides ``module.is_causal`` where `attention_mask` is None.
        softcap: c of ``c tanh(scores / c)``.
        position_bias: added to the scores, broadcasts to ``[B, H, N, M]``; may require grad (T5).

    Returns:
        ``([B, N, H, D], None)``: there are no attention weights.

    Raises:
        UnsupportedOperation: attention sinks or a paged cache.
    """
    _refuse(kwargs)
    options: dict[str, Any] = dict(dropout=dropout, is_causal=is_causal, softcap=softcap)
    out = attend(module, query, key, value, attention_mask, scaling, position_bias=position_bias, **options)
    return out.transpose(1, 2), None


def attend(
    module: torch.nn.Module,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None,
    *,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Any = None,
) -> Any:
    """The same with the heads before the positions, ``[B, H, N, D]``."""
    causal: bool | str = False
    window, mask, context = None, attention_mask, None
    if isinstance(attention_mask, Visibility):
        causal, window, mask = attention_mask.causal, attention_mask.window, attention_mask.mask
        mask = None if mask is None else mask.to(query.device)
    elif attention_mask is None:
        # transformers aligns a cache that was filled in advance with the first key, and lets one query see everything
        decoder = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = "upper_left" if decoder and query.shape[2] > 1 else False
    else:
        mask = mask[..., : key.shape[2]]
    if isinstance(key, Joined) and isinstance(value, Joined) and causal != "upper_left":
        context, key, value = (key.context, value.context), key.suffix, value.suffix
    if position_bias is not None:
        mask = _with_bias(mask, position_bias)
    shape: dict[str, Any] = dict(causal=causal, scale=scaling, softcap=softcap, window=window)
    return attention(query, key, value, mask=mask, dropout=dropout, context=context, **shape)


def _with_bias(mask: Any, bias: Any) -> Any:
    """One additive mask from a learned bias and a bool or additive mask."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, float("-inf"))
    return bias + mask


def _refuse(options: dict[str, Any]) -> None:
    for name, what in {
        "s_aux": "attention sinks",
        "sinks": "attention sinks",
        "cache": "a paged cache",
    }.items():
        if options.get(name) is not None:
            raise UnsupportedOperation(
                f"attention implementation 'aajr' was given {what} ({name}=), which it does not have: call "
                "model.set_attn_implementation('eager') for this model."
            )
