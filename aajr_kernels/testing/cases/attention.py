"""Cases of attention in every form that its oracle can repeat (dropout draws a mask of its own)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ...ops.attention import attention
from .. import formulas
from .case import Case, Draw, case


def attention_cases(draw: Draw) -> Iterator[Case]:
    def make(n: int, m: int, heads: int = 2, key_heads: int = 2, d: int = 8, dv: int = 8, b: int = 2) -> Any:
        return {"q": draw(b, heads, n, d), "k": draw(b, key_heads, m, d), "v": draw(b, key_heads, m, dv)}

    both = partial(case, draw, op=attention, formula=formulas.attention, duals="q k v")
    yield both("full", tensors=make(7, 7))
    yield both("causal", tensors=make(13, 13, d=6), options={"causal": True}, k=3)
    yield both("GQA 6:2, causal", tensors=make(11, 11, 6, 2, d=5), options={"causal": True})
    yield both("GQA 4:1, cross lengths, scale", tensors=make(5, 17, 4, 1, dv=6), options={"scale": 0.4}, k=3)
    yield both("cross lengths, upper left", tensors=make(5, 9), options={"causal": "upper_left"})
    yield both("cross lengths, lower right", tensors=make(5, 9), options={"causal": "lower_right"}, k=3)
    yield both("plain keys and values", tensors=make(5, 9), duals="q", k=3)
    yield both("plain queries", tensors=make(5, 9), duals="k v")
    yield both("softcap", tensors=make(9, 9), options={"softcap": 1.5}, k=3)
    yield both("window 4", tensors=make(13, 13), options={"causal": True, "window": 4})
    yield both(
        "GQA, window, softcap",
        tensors=make(13, 13, 4, 2),
        options={"causal": True, "window": 3, "softcap": 2.0},
    )
    masked = draw.bool(2, 1, 6, 9)
    masked[:, :, 0], masked[:, :, 1:, 0] = False, True
    yield both("boolean mask with an empty row", tensors=make(6, 9), constants={"mask": masked}, k=3)
    padding = torch.arange(9) >= torch.tensor([[[[4]]], [[[0]]]])
    yield both(
        "left padding, causal", tensors=make(9, 9), constants={"mask": padding}, options={"causal": True}
    )
    yield both("learned bias", tensors={**make(6, 9), "mask": draw(1, 2, 6, 9)}, k=3)
    yield both(
        "learned bias over batch, softcap, GQA",
        tensors={**make(6, 9, 4, 2), "mask": draw(4, 1, 9)},
        options={"softcap": 2.0},
    )
    yield both(
        "bias with tangents", tensors={**make(6, 7), "mask": draw(2, 1, 6, 7)}, duals="q k v mask", k=3
    )
    barred = draw(6, 9).masked_fill(~masked[0, 0], float("-inf"))
    yield both("additive mask with -inf", tensors=make(6, 9), constants={"mask": barred})
    for n in (9, 61):
        large = {name: 3 * t for name, t in make(n, n).items()}
        yield both(f"large scores, {n} positions", tensors=large, options={"causal": True}, k=3)
    yield both("strided", tensors=make(7, 9), strided=True, k=3)
    # the softmax of one score is 1: nothing depends on queries and keys
    yield both("one key", tensors=make(3, 1, d=4), vanishing="q k")
    yield both(
        "211 positions, causal", tensors=make(211, 211, 2, 1, d=16, dv=16, b=1), options={"causal": True}
    )
    yield both(
        "window across blocks", tensors=make(301, 301, 1, 1, b=1), options={"causal": True, "window": 40}
    )
