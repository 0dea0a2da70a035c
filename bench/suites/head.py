"""Suite `head`: the streamed language-model head against linear + cross-entropy."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aajr_kernels.dual import Dual
from aajr_kernels.ops.head import lm_head_penalty

from ..case import Case, Gradients, Run, Selection, Suite, Variant, draw, has_kernels, portion, true_portion
from .models import fisher

HIDDEN, VOCABULARY = 384, 32000
#: fisher, forward and backward, over plain linear + cross-entropy; bytes beside the gradients
RATIO, EXTRA_BYTES = 2.3, 64e6
#: the same with the loss from one stream, over the penalty alone
SHARED = 1.1
#: matrix products over the vocabulary: plain, fisher
PRODUCTS = {"both": (3, 8), "forward": (1, 2), "backward": (2, 6)}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Features, words, and where the tensors live."""

    hidden: int
    words: int
    device: str = "cpu"


def cases(selection: Selection) -> list[Case]:
    found = []
    for dtype, n in selection.grid(("float32",), (512,)):
        if selection.wants("fisher"):
            found.append(head_case(dtype, n, selection))
        if selection.wants("shared"):
            found.append(_shared(dtype, n, selection))
    return found


def variants(dtype: str, length: int, sizes: Sizes, part: str = "both") -> dict[str, Variant]:
    """Everything that can be compared, by name."""
    make = functools.partial(functools.partial, dtype=dtype, sizes=sizes, part=part)
    plain, dual = PRODUCTS[part]
    product = 2.0 * length * sizes.words * sizes.hidden
    item = getattr(torch, dtype).itemsize
    # read and written once: hidden states and weight; then those and their gradients; no logits
    passes = {"forward": 1, "backward": 2, "both": 3}[part]
    moved = {k: float(passes * item * sizes.hidden * (sizes.words + (1 + k) * length)) for k in (0, 1)}
    gradients = item * sizes.hidden * (sizes.words + 2 * length)
    costs: dict[str, Any] = {"flops": dual * product, "bytes": moved[1], "gradient_bytes": gradients}
    penalty, both = make(_fisher, loss=False), make(_fisher, loss=True)
    found = [
        Variant(
            "plain",
            make(_plain),
            make(_plain_truth),
            flops=plain * product,
            bytes=moved[0],
            gradient_bytes=item * sizes.hidden * (sizes.words + length),
        ),
        Variant("fisher", penalty, make(_truth, loss=False), **costs),
        Variant("fisher and loss", both, make(_truth, loss=True), **costs),
        Variant(
            "fisher, reference", penalty, make(_truth, loss=False), backend="reference", rounds=3, peak=False
        ),
    ]
    return {variant.name: dataclasses.replace(variant, key=(variant.name, sizes, part)) for variant in found}


def _bounded(variant: Variant, dtype: str, length: int, selection: Selection, **bounds: float) -> Variant:
    here = selection.bounded and (dtype, length) == ("float32", 512)
    return dataclasses.replace(variant, bounds=bounds) if here else variant


def head_case(dtype: str, length: int, selection: Selection, words: int | None = None) -> Case:
    """The penalty of a head of so many words, by default 32,000."""
    sizes = Sizes(HIDDEN, VOCABULARY if words is None else words, selection.device)
    found = variants(dtype, length, sizes, selection.part)
    names = ["plain", "fisher"] + ["fisher, reference"] * has_kernels("head", selection.device)
    limits = {"ratio": RATIO, "extra_bytes": EXTRA_BYTES}
    found["fisher"] = _bounded(found["fisher"], dtype, length, selection, **limits)
    return Case(
        "head",
        "fisher",
        dtype,
        length,
        tuple(found[name] for name in names),
        base=("plain",),
        config={"V": sizes.words, "C": sizes.hidden, "metric": "fisher"},
        gate_length=min(length, 67),
        repeats=10,
        peak=selection.part == "both",
        part=selection.part,
        device=selection.device,
        why="Fisher head ÷ plain linear + cross-entropy",
    )


def _shared(dtype: str, length: int, selection: Selection) -> Case:
    found = variants(dtype, length, Sizes(HIDDEN, VOCABULARY, selection.device), selection.part)
    both = _bounded(found["fisher and loss"], dtype, length, selection, ratio=SHARED)
    return Case(
        "head",
        "shared",
        dtype,
        length,
        (found["fisher"], both),
        base=("fisher",),
        config={"V": VOCABULARY, "C": HIDDEN, "metric": "fisher"},
        gate_length=min(length, 67),
        repeats=10,
        part=selection.part,
        device=selection.device,
        why="loss and penalty from one stream ÷ the penalty alone",
    )


def _inputs(length: int, dtype: str, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Stacked hidden states ``[2, 1, N, C]``, weight ``[V, C]``, labels ``[1, N]``."""
    hidden = draw(2, 1, length, sizes.hidden, dtype=dtype)
    weight = draw(sizes.words, sizes.hidden, dtype="float32", seed=1) * sizes.hidden**-0.5
    labels = torch.randint(sizes.words, (1, length), generator=torch.Generator().manual_seed(2))
    return hidden, weight.to(hidden.dtype), labels


def _plain(length: int, dtype: str, sizes: Sizes, part: str) -> Run:
    stacked, weight, labels = (t.to(sizes.device) for t in _inputs(length, dtype, sizes))
    leaves = [stacked[0].clone().requires_grad_(), weight.requires_grad_()]

    def forward() -> Tensor:
        return F.cross_entropy(F.linear(*leaves).flatten(0, 1).float(), labels.flatten())

    return portion(forward, leaves, None, part)


def _fisher(length: int, dtype: str, loss: bool, sizes: Sizes, part: str) -> Run:
    stacked, weight, labels = (t.to(sizes.device) for t in _inputs(length, dtype, sizes))
    leaves = [stacked.requires_grad_(), weight.requires_grad_()]

    def forward() -> Tensor:
        hidden = Dual(leaves[0])
        result = lm_head_penalty(hidden, leaves[1], metric="fisher", labels=labels if loss else None)
        return result[0].mean() + result[1].mean() if isinstance(result, tuple) else result.mean()

    return portion(forward, leaves, None, part)


@functools.lru_cache(maxsize=1)
def _plain_truth(length: int, dtype: str, sizes: Sizes, part: str) -> Gradients:
    stacked, weight, labels = _inputs(length, dtype, sizes)
    leaves = [stacked[0].double().requires_grad_(), weight.double().requires_grad_()]
    loss = F.cross_entropy(F.linear(*leaves).flatten(0, 1), labels.flatten())
    return true_portion(loss, leaves, None, part)


@functools.lru_cache(maxsize=2)
def _truth(length: int, dtype: str, loss: bool, sizes: Sizes, part: str) -> Gradients:
    stacked, weight, labels = _inputs(length, dtype, sizes)
    leaves = [stacked.double().requires_grad_(), weight.double().requires_grad_()]
    z, z_tan = (F.linear(leaves[0][i], leaves[1]) for i in (0, 1))
    total = fisher(z, z_tan).mean()
    if loss:
        total = total + F.cross_entropy(z.flatten(0, 1), labels.flatten())
    return true_portion(total, leaves, None, part)


SUITE = Suite(
    "head", "streamed Fisher head, 512 tokens x 32000 words x hidden 384", ("fisher", "shared"), cases
)
