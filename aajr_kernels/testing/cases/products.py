"""Cases of attention and of the streamed head."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...dual import Dual
from ...ops.attention import attention as attention_op
from ...ops.head import METRICS, lm_head_sensitivity
from .. import formulas
from ..oracle import metric_values
from .case import Case, Stacks, dense, flipped, forward_mode, gap, stacked, stacks, swapped


def attention(
    name: str,
    sizes: Sequence[int],
    *,
    moves: Sequence[int] = (1, 1, 1),
    mask: str | None = None,
    bias: Sequence[int] | None = None,
    bias_moves: bool = False,
    size: float = 1.0,
    context: int = 0,
    **options: Any,
) -> Case:
    """Sizes B, H, HK, N, M, D, V; `moves` tells which of q, k, v have tangents; mask "square" or "padding"; a bias is
    a further leaf of the given shape, as are keys and values of a context of so many positions."""
    B, H, HK, N, M, D, V = sizes
    shapes = [(B, H, N, D), (B, HK, M, D), (B, HK, M, V)]

    def build(k: int) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [size * stacks(*shape, k=k if moving else 0) for shape, moving in zip(shapes, moves)]
        if bias is not None:
            leaf = stacks(*bias, k=k if bias_moves else 0)
            leaf[0].masked_fill_(torch.rand(tuple(bias)) < 0.2, -math.inf)
            leaves.append(leaf)
        if context:
            leaves += [size * stacks(B, HK, context, features, k=0) for features in (D, V)]
        return leaves, []

    case_options = {key: options.pop(key) for key in ("layout", "ulps", "large") if key in options}
    allowed: Tensor | None = None
    if mask is not None:
        generator = torch.Generator().manual_seed(1)
        allowed = torch.rand(B, 1, N if mask == "square" else 1, context + M, generator=generator) > 0.3
        allowed[0, 0, 0] = False  # an empty row, or a batch row without keys

    def with_mask(op: Callable[..., Any]) -> Callable[..., Any]:
        def call(q: Any, k: Any, v: Any, *more: Any) -> Any:
            permitted = None if allowed is None else allowed.to(q.device)
            before = {"context": more[-2:]} if context else {}
            return op(q, k, v, mask=permitted if bias is None else more[0], **before, **options)

        return call

    leaves = "q k v" + " mask" * (bias is not None) + " context_k context_v" * (context > 0)
    names = ("attention", name, "attention", leaves)
    return stacked(*names, with_mask(attention_op), with_mask(formulas.attention), build, **case_options)


ATTENTION = [
    attention("causal, D 64", (1, 4, 2, 65, 65, 64, 64), causal=True),
    attention("full, D 128", (1, 2, 2, 37, 70, 128, 128)),
    # a softmax over one key is constant: what is left of the gradients is rounding, exactly 0 in eager code
    attention("one query, one key", (2, 2, 1, 1, 1, 16, 16), ulps=16.0),
    attention("D 20, V 12", (2, 2, 1, 13, 29, 20, 12), causal="lower_right"),
    attention("D 1, V 3", (1, 2, 1, 9, 11, 1, 3)),
    attention("D 256", (1, 1, 1, 10, 18, 256, 256), causal=True),
    attention("D 80, few queries", (1, 3, 1, 5, 130, 80, 80), causal="lower_right"),
    attention("more queries than keys", (1, 2, 2, 40, 9, 16, 16), causal="lower_right"),
    attention("window", (1, 4, 4, 70, 70, 32, 32), causal=True, window=9),
    attention("window of one", (1, 2, 1, 33, 33, 16, 16), causal=True, window=1),
    attention("softcap and scale", (1, 2, 1, 30, 30, 16, 16), softcap=2.0, scale=0.4, causal=True),
    attention("large scores", (1, 2, 2, 33, 40, 32, 32), size=4.0),
    attention("heads cut out of rows", (2, 4, 2, 19, 19, 24, 24), causal=True, layout=swapped),
    attention("rows with gaps", (1, 2, 2, 17, 21, 18, 10), layout=gap),
    attention("last axis not dense", (1, 2, 2, 9, 9, 8, 8), layout=flipped),
    attention("boolean mask with an empty row", (2, 4, 2, 13, 37, 16, 16), mask="square"),
    attention("padding, a batch row without keys", (2, 4, 2, 37, 37, 16, 16), mask="padding", causal=True),
    attention("bias per pair", (2, 4, 2, 13, 17, 16, 16), bias=(2, 4, 13, 17)),
    attention("bias per head", (2, 4, 2, 13, 17, 16, 16), bias=(4, 13, 17), causal="lower_right"),
    attention("bias per key, softcap", (2, 4, 2, 13, 17, 16, 16), bias=(4, 1, 17), softcap=3.0),
    attention("bias with tangents", (1, 2, 1, 13, 17, 16, 16), bias=(2, 13, 17), bias_moves=True),
    attention("bias alone moves", (1, 2, 1, 9, 17, 8, 8), bias=(2, 9, 17), bias_moves=True, moves=(0, 0, 0)),
    attention("q alone moves", (1, 4, 2, 20, 33, 16, 16), moves=(1, 0, 0), causal="lower_right"),
    attention("k alone moves", (1, 4, 2, 20, 33, 16, 16), moves=(0, 1, 0)),
    attention("v alone moves", (1, 4, 2, 20, 33, 16, 16), moves=(0, 0, 1)),
    attention("q and v move, softcap", (1, 2, 1, 20, 20, 16, 16), moves=(1, 0, 1), softcap=2.0),
    attention("upper left, GQA 4:1, scale", (2, 4, 1, 5, 17, 8, 6), causal="upper_left", scale=0.4),
    attention("GQA, window, softcap", (2, 4, 2, 13, 13, 8, 8), causal=True, window=3, softcap=2.0),
    attention("211 positions", (1, 2, 1, 211, 211, 16, 16), causal=True, large=True),
    attention("window across blocks", (1, 1, 1, 301, 301, 8, 8), causal=True, window=40, large=True),
]

#: two parts of keys and values, of which only the second has tangents
CONTEXT = [
    attention("context, causal, D 64", (1, 4, 2, 33, 33, 64, 64), context=70, causal=True),
    attention("context, full, D 20, V 12", (2, 2, 1, 13, 7, 20, 12), context=29),
    attention("context, more keys than queries", (1, 2, 2, 5, 40, 16, 16), context=9, causal="lower_right"),
    attention("context, other keys end before the queries", (1, 2, 1, 11, 4, 16, 16), context=6, causal=True),
    attention("context, fewer keys than queries", (1, 2, 1, 40, 7, 16, 16), context=9, causal="lower_right"),
    attention("context of one", (1, 2, 1, 9, 9, 8, 8), context=1, causal=True),
    attention("context, no other keys", (1, 2, 1, 9, 0, 16, 16), context=21, moves=(1, 0, 0)),
    attention("context, window", (1, 4, 4, 50, 50, 32, 32), context=31, causal=True, window=9),
    attention("context, softcap and scale", (1, 2, 1, 30, 30, 16, 16), context=37, softcap=2.0, scale=0.4, causal=True),
    attention("context, large scores", (1, 2, 2, 33, 40, 32, 32), context=23, size=4.0),
    attention("context, heads cut out of rows", (2, 4, 2, 19, 19, 24, 24), context=9, causal=True, layout=swapped),
    attention("context, boolean mask with an empty row", (2, 4, 2, 13, 37, 16, 16), context=21, mask="square"),
    attention("context, padding", (2, 4, 2, 37, 37, 16, 16), context=30, mask="padding", causal=True),
    attention("context, bias per pair", (2, 4, 2, 13, 17, 16, 16), context=12, bias=(2, 4, 13, 29)),
    attention("context, bias per query", (2, 4, 2, 13, 17, 16, 16), context=12, bias=(4, 13, 1)),
    attention("context, bias per key, softcap", (2, 4, 2, 13, 17, 16, 16), context=5, bias=(4, 1, 22), softcap=3.0),
    attention("context, bias with tangents", (1, 2, 1, 13, 17, 16, 16), context=6, bias=(2, 13, 23), bias_moves=True),
    attention("context, q alone moves", (1, 4, 2, 20, 33, 16, 16), context=14, moves=(1, 0, 0), causal="lower_right"),
    attention("context, k alone moves", (1, 4, 2, 20, 33, 16, 16), context=14, moves=(0, 1, 0)),
    attention("context, v alone moves", (1, 4, 2, 20, 33, 16, 16), context=14, moves=(0, 0, 1)),
    attention("context, 211 positions", (1, 2, 1, 111, 111, 16, 16), context=300, causal=True, large=True),
    attention("context, window across blocks", (1, 1, 1, 201, 201, 8, 8), context=150, causal=True, window=140,
              large=True),
]  # fmt: skip


# -- head -----------------------------------------------------------------------------------------------------------
def head(
    metric: str,
    name: str,
    batch: Sequence[int],
    size: int,
    words: int,
    *,
    bias: bool = False,
    labelled: bool = False,
    spread: float = 0.3,
    layout: Callable[[Tensor], Tensor] = dense,
    large: bool = False,
    values: Callable[[Tensor, Tensor, str], Tensor] = metric_values,
    **options: Any,
) -> Case:
    """The sensitivities, by the formula `values`, and with labels the cross-entropies behind them."""
    labels: Tensor | None = None
    if labelled:
        labels = torch.randint(words, tuple(batch), generator=torch.Generator().manual_seed(2))
        labels.view(-1)[0] = -100
    scale, softcap = options.get("scale", 1.0), options.get("softcap")

    def build(k: int) -> tuple[list[Tensor], list[Tensor]]:
        weight = spread * torch.randn(words, size, dtype=torch.float64)
        return [stacks(*batch, size, k=k)], [weight, *([torch.randn(words).double()] if bias else [])]

    def ours(s: Stacks, p: Stacks) -> Tensor:
        targets = None if labels is None else labels.to(s[0].device)
        b = p[1] if bias else None
        result: Any = lm_head_sensitivity(Dual(s[0]), p[0], b, metric=metric, labels=targets, **options)
        return torch.cat([result[0], result[1].unsqueeze(0)]) if labelled else result

    def written(s: Stacks, p: Stacks) -> Tensor:
        z = forward_mode(functools.partial(formulas.logits, scale=scale, softcap=softcap), s, p)
        z = z if z.dtype == torch.float64 else z.float()
        h = s[0] if s[0].dtype == torch.float64 else s[0].float()
        q = h[1:].square().sum(-1) if metric == "l2" else values(z[0], z[1:], metric)
        if labels is None:
            return q
        nll = F.cross_entropy(z[0].reshape(-1, words), labels.flatten(), reduction="none")
        return torch.cat([q, nll.view(1, *batch)])

    return Case(
        *("head", f"{metric} {name}", "lm_head_sensitivity", ("hidden", "weight", "bias")),
        build,
        ours,
        written,
        rows="each",
        layout=layout,
        large=large,
    )


HEAD = [
    *(head(metric, "labels, 517 words", (3, 11), 64, 517, labelled=True) for metric in METRICS),
    *(head(metric, "bias, softcap", (7,), 37, 61, bias=True, softcap=3.0) for metric in METRICS),
    # many rows, because each shares one rounding of its log-sum-exp
    *(
        head(metric, "large logits", (151,), 9, 41, bias=True, labelled=True, spread=8 / 3, large=True)
        for metric in METRICS
    ),
    *(
        head(metric, "540 tokens, 1061 words", (2, 270), 8, 1061, labelled=True, large=True)
        for metric in METRICS
    ),
    head("fisher", "labels, bias, scale", (2, 9), 20, 252, bias=True, labelled=True, scale=-1.5, softcap=4.0),
    head("fisher", "one word", (4,), 5, 1),
    head("probs", "one token", (), 33, 130),
    head("logits", "rows with gaps", (2, 5), 26, 70, layout=gap),
    head("fisher", "last axis not dense", (3, 5), 8, 40, layout=flipped),
]

CASES = [*ATTENTION, *HEAD]
