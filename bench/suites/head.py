"""Suite `head`: the streamed language-model head against linear + cross-entropy."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aajr_kernels import LMHead, aligned_penalty, lm_kl
from aajr_kernels.dual import Dual
from aajr_kernels.ops.head import lm_head_sensitivity
from aajr_kernels.testing.formulas import fisher

from .. import roofline
from ..case import Case, Selection, Suite, Variant, draw, has_kernels
from .op import Op

HIDDEN, VOCABULARY = 384, 32000
#: fisher, forward and backward, over plain linear + cross-entropy; bytes beside the gradients
RATIO, EXTRA_BYTES = 2.3, 64e6
#: the same with the loss from one stream, over the penalty
SHARED = 1.1
#: loss and penalty on every n-th token only, over those on all
IGNORED = {2: 0.55, 8: 0.17}
#: peak of a streamed KL over that of one from logits in memory
KL_PEAK = 0.35
#: matrix products over the vocabulary: plain, fisher
PRODUCTS = {"both": (3, 8), "forward": (1, 2), "backward": (2, 6)}


def cases(selection: Selection) -> list[Case]:
    makers: dict[str, tuple[Callable[..., Case], int]] = {
        "fisher": (_fisher, 512),
        "shared": (_shared, 512),
        "ignored": (_ignored, 1024),
        "kl": (_kl, 512),
        "kl-attack": (functools.partial(_kl, attack=True), 512),
    }
    return [
        maker(dtype, n, selection)
        for family, (maker, length) in makers.items()
        if selection.wants(family)
        for dtype, n in selection.grid(("float32",), (length,))
    ]


def variants(
    dtype: str, length: int, hidden: int, words: int, device: str, part: str = "both"
) -> dict[str, Variant]:
    """The ways to compute a head of so many features and words, by name."""

    @functools.cache
    def labels(n: int, device: torch.device) -> Tensor:
        return torch.randint(words, (n,), generator=torch.Generator().manual_seed(2)).to(device)

    def inputs(n: int) -> tuple[list[Tensor], list[Tensor], None]:
        weight = draw(words, hidden, dtype="float32", seed=1) * hidden**-0.5
        states = draw(2, 1, n, hidden, dtype=dtype)
        return [states], [weight.to(states.dtype)], None

    def crossentropy(x: Tensor, w: Tensor) -> Tensor:
        z = F.linear(x, w).flatten(0, 1)
        return F.cross_entropy(z if z.dtype == torch.float64 else z.float(), labels(len(z), z.device))

    def penalty(x: Dual, w: Tensor) -> Tensor:
        per_token = lm_head_sensitivity(x, w, metric="fisher")
        assert isinstance(per_token, Tensor)
        return per_token.mean()

    def both(x: Dual, w: Tensor) -> Tensor:
        target = labels(x.shape[-2], w.device)[None]
        per_token, loss = lm_head_sensitivity(x, w, metric="fisher", labels=target)
        return per_token.mean() + loss.mean()

    def exact(x: Tensor, w: Tensor) -> Tensor:
        return fisher(F.linear(x[0], w), F.linear(x[1], w)).mean()

    op = Op(inputs, part, device)
    plain, dual = (_costs(dtype, length, hidden, words, part, K) for K in (0, 1))
    both_true = op.stacked_truth(lambda x, w: exact(x, w) + crossentropy(x[0], w))
    made = [
        Variant("plain", op.plain(crossentropy), op.truth(crossentropy), **plain),
        Variant("fisher", op.dual(penalty), op.stacked_truth(exact), **dual),
        Variant("fisher and loss", op.dual(both), both_true, **dual),
    ]
    slow: Any = {"backend": "reference", "rounds": 3, "peak": False, "work": ()}
    made.append(dataclasses.replace(made[1], name="fisher, reference", **slow))
    sizes = (hidden, words, device, part)
    return {variant.name: dataclasses.replace(variant, key=(variant.name, sizes)) for variant in made}


def _costs(dtype: str, length: int, hidden: int, words: int, part: str, K: int) -> dict[str, Any]:
    """Arithmetic and traffic that are necessary, bytes of the gradients, the kernels of the roofline model."""
    item = getattr(torch, dtype).itemsize
    tensors = item * hidden * (words + (1 + K) * length)  # hidden states and weight; no logits
    passes = {"forward": 1, "backward": 2, "both": 3}[part]  # of those, and of those with their gradients
    model = roofline.head(length, hidden, words) if K else roofline.plain_head(length, hidden, words)
    return {
        "flops": PRODUCTS[part][K] * 2.0 * length * words * hidden,
        "bytes": float(passes * tensors),
        "gradient_bytes": tensors,
        "work": tuple(model) if part == "both" else (),
    }


def _fisher(dtype: str, length: int, selection: Selection) -> Case:
    ways = variants(dtype, length, HIDDEN, VOCABULARY, selection.device, selection.part)
    ways["fisher"] = _bounded(ways["fisher"], dtype, length, selection, ratio=RATIO, extra_bytes=EXTRA_BYTES)
    names = ["plain", "fisher"] + ["fisher, reference"] * has_kernels("head", selection.device)
    return selection.case(
        *("head", "fisher", dtype, length, [ways[name] for name in names]),
        base=("plain",),
        config={"V": VOCABULARY, "C": HIDDEN, "metric": "fisher"},
        repeats=10,
        peak=selection.part == "both",
        why="Fisher head ÷ plain linear + cross-entropy",
    )


def _shared(dtype: str, length: int, selection: Selection) -> Case:
    ways = variants(dtype, length, HIDDEN, VOCABULARY, selection.device, selection.part)
    both = _bounded(ways["fisher and loss"], dtype, length, selection, ratio=SHARED)
    return selection.case(
        *("head", "shared", dtype, length, [ways["fisher"], both]),
        base=("fisher",),
        config={"V": VOCABULARY, "C": HIDDEN, "metric": "fisher"},
        repeats=10,
        why="loss and penalty from one stream ÷ the penalty",
    )


def _ignored(dtype: str, length: int, selection: Selection) -> Case:
    """Loss and penalty by the public path, with labels and mask on all tokens and on every n-th."""

    def inputs(n: int) -> tuple[list[Tensor], list[Tensor], None]:
        weight = draw(VOCABULARY, HIDDEN, dtype="float32", seed=1) * HIDDEN**-0.5
        states = draw(2, 1, n, HIDDEN, dtype=dtype)
        return [states], [weight.to(states.dtype)], None

    def variant(name: str, every: int) -> Variant:
        @functools.cache
        def counting(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
            keep = torch.arange(n, device=device)[None] % every == 0
            labels = torch.randint(VOCABULARY, (1, n), generator=torch.Generator().manual_seed(2)).to(device)
            return keep, labels.masked_fill(~keep, -100)

        def objective(x: Dual, w: Tensor) -> Tensor:
            keep, labels = counting(x.shape[-2], w.device)
            penalty, loss = aligned_penalty(
                *(lambda d: d, x.primal, x.tangent),
                head=LMHead(w),
                labels=labels,
                mask=keep,
                return_primal=True,
                penalty_weight=1.0,
            )
            total: Tensor = loss + penalty
            return total

        def exact(x: Tensor, w: Tensor) -> Tensor:
            keep, labels = counting(x.shape[-2], w.device)
            z, z_tan = (F.linear(rows[keep], w) for rows in x)
            return fisher(z, z_tan).mean() + F.cross_entropy(z, labels[keep])

        op = Op(inputs, selection.part, selection.device)
        costs = _costs(dtype, -(-length // every), HIDDEN, VOCABULARY, selection.part, 1)
        sizes = (HIDDEN, VOCABULARY, selection.device, selection.part)
        return Variant(
            name, op.dual(objective), op.stacked_truth(exact), key=("ignored", name, sizes), **costs
        )

    every_nth = [
        _bounded(variant(f"fisher and loss, one in {n}", n), dtype, length, selection, at=1024, ratio=ratio)
        for n, ratio in IGNORED.items()
    ]
    return selection.case(
        *("head", "ignored", dtype, length, [variant("fisher and loss, all", 1), *every_nth]),
        base=("fisher and loss, all",),
        config={"V": VOCABULARY, "C": HIDDEN, "metric": "fisher"},
        repeats=10,
        why="loss and penalty on some tokens ÷ on all",
    )


def _kl(dtype: str, length: int, selection: Selection, attack: bool = False) -> Case:
    """KL of two outputs of one head, streamed and of logits in memory; an attack has gradients of q only."""

    def inputs(n: int) -> tuple[list[Tensor], list[Tensor], None]:
        weight = draw(VOCABULARY, HIDDEN, dtype="float32", seed=1) * HIDDEN**-0.5
        p, q = draw(2, 2, 1, n, HIDDEN, dtype=dtype)
        return [p, q], [weight.to(p.dtype)], None

    def operands(p: Tensor, q: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (p.detach(), q, weight.detach()) if attack else (p, q, weight)

    def formed(p: Tensor, q: Tensor, weight: Tensor) -> Tensor:
        p, q, weight = operands(p, q, weight)
        z_p, z_q = F.linear(p, weight).flatten(0, 1), F.linear(q, weight).flatten(0, 1)
        wide = torch.promote_types(z_p.dtype, torch.float32)
        log_p, log_q = (F.log_softmax(z, -1, dtype=wide) for z in (z_p, z_q))
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    def streamed(p: Tensor, q: Tensor, weight: Tensor) -> Tensor:
        p, q, weight = operands(p, q, weight)
        per_token: Tensor = lm_kl(p, q, head=LMHead(weight))
        return per_token.mean()

    op = Op(inputs, selection.part, selection.device)
    item = getattr(torch, dtype).itemsize
    leaves = item * HIDDEN * (length if attack else VOCABULARY + 2 * length)
    costs: dict[str, Any] = {"gradient_bytes": leaves}
    sizes = (HIDDEN, VOCABULARY, selection.device, selection.part, attack)
    ours = Variant("streamed", op.plain(streamed), op.truth(formed), key=("kl", "streamed", sizes), **costs)
    ways = [
        Variant("logits in memory", op.plain(formed), op.truth(formed), key=("kl", "formed", sizes), **costs),
        _bounded(ours, dtype, length, selection, peak_ratio=KL_PEAK),
    ]
    return selection.case(
        *("head", "kl-attack" if attack else "kl", dtype, length, ways),
        base=("logits in memory",),
        config={"V": VOCABULARY, "C": HIDDEN, "gradients": "q" if attack else "p, q, weight"},
        repeats=10,
        peak=selection.part == "both",
        why="streamed KL ÷ KL of logits in memory",
    )


def _bounded(
    variant: Variant, dtype: str, length: int, selection: Selection, at: int = 512, **bounds: float
) -> Variant:
    here = selection.bounded and (dtype, length) == ("float32", at)
    return dataclasses.replace(variant, bounds=bounds) if here else variant


SUITE = Suite(
    *("head", "streamed Fisher head, 512 tokens x 32000 words x hidden 384"),
    *(("fisher", "shared", "ignored", "kl", "kl-attack"), cases),
)
