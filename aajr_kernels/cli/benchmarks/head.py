"""Suite `head`: the streamed language-model head against linear + cross-entropy."""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ...dual import Dual
from ...ops.head import lm_head_penalty
from .case import Case, Gradients, Run, Selection, Suite, Variant, draw, has_native
from .models import fisher

HIDDEN, VOCABULARY = 384, 32000
#: fisher, forward and backward, over plain linear + cross-entropy; bytes beside the gradients
RATIO, EXTRA_BYTES = 2.3, 64e6
#: the same with the loss from one stream, over the penalty alone
SHARED = 1.1


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
            found.append(head_case(dtype, n))
        if selection.wants("shared"):
            found.append(_shared(dtype, n))
    return found


def variants(dtype: str, length: int, sizes: Sizes | None = None) -> dict[str, Variant]:
    """Everything that can be compared, by name."""
    sizes = sizes or Sizes(HIDDEN, VOCABULARY)
    make = functools.partial(functools.partial, dtype=dtype, sizes=sizes)
    product = 2.0 * length * sizes.words * sizes.hidden
    item = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    gradients = item * sizes.hidden * (sizes.words + 2 * length)
    penalty, both = make(_fisher, loss=False), make(_fisher, loss=True)
    found = [
        Variant(
            "plain",
            make(_plain),
            make(_plain_truth),
            flops=3 * product,
            gradient_bytes=item * sizes.hidden * (sizes.words + length),
        ),
        Variant("fisher", penalty, make(_truth, loss=False), flops=8 * product, gradient_bytes=gradients),
        Variant(
            "fisher and loss", both, make(_truth, loss=True), flops=8 * product, gradient_bytes=gradients
        ),
        Variant(
            "fisher, reference", penalty, make(_truth, loss=False), backend="reference", rounds=3, peak=False
        ),
    ]
    return {variant.name: dataclasses.replace(variant, key=(variant.name, sizes)) for variant in found}


def _bounded(variant: Variant, dtype: str, length: int, **bounds: float) -> Variant:
    return dataclasses.replace(variant, bounds=bounds) if (dtype, length) == ("float32", 512) else variant


def head_case(dtype: str, length: int, words: int | None = None) -> Case:
    """The penalty of a head of so many words, by default 32,000."""
    sizes = Sizes(HIDDEN, VOCABULARY if words is None else words)
    found = variants(dtype, length, sizes)
    names = ["plain", "fisher"] + ["fisher, reference"] * has_native("head")
    found["fisher"] = _bounded(found["fisher"], dtype, length, ratio=RATIO, extra_bytes=EXTRA_BYTES)
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
        peak=True,
        why="Fisher head, forward + backward ÷ plain linear + cross-entropy",
    )


def _shared(dtype: str, length: int) -> Case:
    found = variants(dtype, length)
    both = _bounded(found["fisher and loss"], dtype, length, ratio=SHARED)
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
        why="loss and penalty from one stream ÷ the penalty alone",
    )


def _inputs(length: int, dtype: str, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Stacked hidden states ``[2, 1, N, C]``, weight ``[V, C]``, labels ``[1, N]``."""
    hidden = draw(2, 1, length, sizes.hidden, dtype=dtype)
    weight = draw(sizes.words, sizes.hidden, dtype="float32", seed=1) * sizes.hidden**-0.5
    labels = torch.randint(sizes.words, (1, length), generator=torch.Generator().manual_seed(2))
    return hidden, weight.to(hidden.dtype), labels


def _plain(length: int, dtype: str, sizes: Sizes) -> Run:
    stacked, weight, labels = (t.to(sizes.device) for t in _inputs(length, dtype, sizes))
    leaves = [stacked[0].clone().requires_grad_(), weight.requires_grad_()]

    def call() -> Gradients:
        loss = F.cross_entropy(F.linear(*leaves).flatten(0, 1).float(), labels.flatten())
        return torch.autograd.grad(loss, leaves)

    return Run(call)


def _fisher(length: int, dtype: str, loss: bool, sizes: Sizes) -> Run:
    stacked, weight, labels = (t.to(sizes.device) for t in _inputs(length, dtype, sizes))
    leaves = [stacked.requires_grad_(), weight.requires_grad_()]

    def call() -> Gradients:
        hidden = Dual(leaves[0])
        result = lm_head_penalty(hidden, leaves[1], metric="fisher", labels=labels if loss else None)
        total = result[0].mean() + result[1].mean() if isinstance(result, tuple) else result.mean()
        return torch.autograd.grad(total, leaves)

    return Run(call)


@functools.lru_cache(maxsize=1)
def _plain_truth(length: int, dtype: str, sizes: Sizes) -> Gradients:
    stacked, weight, labels = _inputs(length, dtype, sizes)
    leaves = [stacked[0].double().requires_grad_(), weight.double().requires_grad_()]
    return torch.autograd.grad(F.cross_entropy(F.linear(*leaves).flatten(0, 1), labels.flatten()), leaves)


@functools.lru_cache(maxsize=2)
def _truth(length: int, dtype: str, loss: bool, sizes: Sizes) -> Gradients:
    stacked, weight, labels = _inputs(length, dtype, sizes)
    leaves = [stacked.double().requires_grad_(), weight.double().requires_grad_()]
    z, z_tan = (F.linear(leaves[0][i], leaves[1]) for i in (0, 1))
    total = fisher(z, z_tan).mean()
    if loss:
        total = total + F.cross_entropy(z.flatten(0, 1), labels.flatten())
    return torch.autograd.grad(total, leaves)


SUITE = Suite(
    "head", "streamed Fisher head, 512 tokens x 32000 words x hidden 384", ("fisher", "shared"), cases
)
