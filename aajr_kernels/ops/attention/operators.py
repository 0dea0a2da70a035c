"""Schemas of attention's launchers, the same on every backend, and how its Function calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...backends.operator import Operator
from .options import Options

#: `Options` as an operator takes them; lengths may be symbols
_OPTIONS = (
    "float scale, float? softcap, SymInt? offset, SymInt? window, float dropout, bool align_right, Tensor? drawn, "
    "Tensor? q_start, Tensor? k_start, Tensor? context_k, Tensor? context_v"
)
ATTENTION_FWD = Operator(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? mask, {_OPTIONS}) -> (Tensor, Tensor, Tensor)"
)
ATTENTION_BWD = Operator(
    "attention_bwd(Tensor out_bar, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor stats, Tensor means, "
    "bool need_q, bool need_k, bool need_v, bool need_bias, bool need_context_k, bool need_context_v, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    present=("need_q", "need_k", "need_v", "need_bias", "need_context_k", "need_context_v"),
)

#: of q, k, v and the mask, and from a launcher, or with a context, of its keys and values
Gradients = tuple[Tensor | None, ...]


def with_options(
    forward: Callable[..., Any], backward: Callable[..., Any]
) -> tuple[Callable[..., tuple[Tensor, Tensor, Tensor]], Callable[..., Gradients]]:
    """`attention_fwd` and `attention_bwd`, as the reference has them, from launchers that take `Options` flat."""

    def attention_fwd(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, stats, means = forward(q, k, v, mask, *options)
        return out, stats, means

    def attention_bwd(
        out_bar: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        out: Tensor,
        stats: Tensor,
        means: Tensor,
        options: Options,
        needs: tuple[bool, ...],
    ) -> Gradients:
        of_context = needs[4:] or (False, False)
        every = (*needs[:3], needs[3] and mask is not None, *of_context)
        bars: Gradients = backward(out_bar, q, k, v, mask, out, stats, means, *every, *options)
        return bars[: len(needs)]

    return attention_fwd, attention_bwd
