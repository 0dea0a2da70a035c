"""Rooflines: the rates that a device reaches, arithmetic and traffic of the ops, and the time predicted from both.

Counted is the work of the kernels (docs/triton.md), not the least that would do: the backward of attention
recomputes scores in each of its kernels. A prediction is, summed over the kernels, the longer of arithmetic at the rate
assumed for its kind and traffic at the bandwidth assumed. It leaves out launches, tails and everything between kernels.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

#: of the peak, for fused attention: 480 of an H100's 989 TFLOP/s; published plain kernels reach 350 to 650
#: forward and less backward. The same share is assumed of every device.
ATTENTION_SHARE = 0.485
#: of the peak, for large products of a vendor's library
PRODUCT_SHARE = 0.7
#: of the bandwidth, for a copy kernel
COPY_SHARE = 0.9


@dataclass(frozen=True)
class Device:
    """A processor as its data sheet has it, which is the source of both numbers.

    Attributes:
        name: of the product.
        tflops: dense bfloat16 products with float32 sums, 10¹² operations a second, at boost clock.
        bandwidth: of the memory, bytes a second.
    """

    name: str
    tflops: float
    bandwidth: float

    def rate(self, kind: str) -> float:
        """Operations a second assumed for ``"attention"`` or ``"product"``."""
        return 1e12 * self.tflops * (ATTENTION_SHARE if kind == "attention" else PRODUCT_SHARE)


DEVICES = {
    "a100": Device("A100 SXM 80 GB", 312.0, 2.039e12),
    "h100": Device("H100 SXM", 989.4, 3.35e12),
    "h200": Device("H200 SXM", 989.4, 4.8e12),
    "b200": Device("B200 SXM", 2250.0, 8.0e12),  # half of the sheet's number, which is with sparsity
    "mi300x": Device("Instinct MI300X", 1307.4, 5.3e12),
    "rtx4090": Device("GeForce RTX 4090", 165.2, 1.008e12),
    "rtx5090": Device("GeForce RTX 5090", 209.5, 1.792e12),
}


@dataclass(frozen=True)
class Work:
    """Arithmetic and traffic of one kernel.

    Attributes:
        kind: ``"attention"``, ``"product"``, or ``"stream"`` where only the memory counts.
        flops: multiplications and additions of matrix products.
        bytes: read and written once each.
    """

    kind: str
    flops: float
    bytes: float

    def seconds(self, device: Device) -> float:
        """The longer of both on a device."""
        arithmetic = self.flops / device.rate(self.kind) if self.flops else 0.0
        return max(arithmetic, self.bytes / (COPY_SHARE * device.bandwidth))


def seconds(work: Iterable[Work], device: Device) -> float:
    """The time of kernels that run one after another on a device."""
    return sum(one.seconds(device) for one in work)


def flops_of(work: Iterable[Work]) -> float:
    """Multiplications and additions of kernels."""
    return sum(one.flops for one in work)


# ------------------------------------------------------------------------------------------------------ attention
@dataclass(frozen=True)
class Attention:
    """Sizes of an attention: B batches, H query heads on HK key heads, N queries on M keys, D features, K tangents
    (0: the plain one), and keys of a context before, which have no tangents and which all queries see."""

    B: int
    H: int
    HK: int
    N: int
    M: int
    D: int
    causal: bool = False
    K: int = 1
    item: int = 2
    context: int = 0

    @property
    def product(self) -> float:
        """Operations of one product over the visible pairs; a causal mask leaves half of them."""
        pairs = self.N * (self.N + 1) / 2 if self.causal else self.N * self.M
        return 2.0 * self.B * self.H * pairs * self.D

    @property
    def context_product(self) -> float:
        """Operations of one product of the queries and the keys of the context."""
        return 2.0 * self.B * self.H * self.N * self.context * self.D

    @property
    def queries(self) -> float:
        """Bytes of one tensor like the queries."""
        return float(self.item * self.B * self.H * self.N * self.D)

    @property
    def keys(self) -> float:
        """Bytes of one tensor like the keys."""
        return float(self.item * self.B * self.HK * self.M * self.D)

    def forward(self) -> list[Work]:
        """S, Ṡ (2 a tangent), O, Ȯ (2 a tangent); of a context one a tangent."""
        traffic = (1 + self.K) * 2 * (self.queries + self.keys) + 2 * self.context_keys
        flops = (2 + 4 * self.K) * self.product + (2 + 2 * self.K) * self.context_product
        return [Work("attention", flops, traffic)]

    @property
    def context_keys(self) -> float:
        """Bytes of the keys of the context."""
        return float(self.item * self.B * self.HK * self.context * self.D)

    def backward(self, to_context: bool = True) -> list[Work]:
        """K = 1: 24 products in three kernels at D = 128 (6 for V, 9 for K, 9 for Q), 21 in two at D = 64; K = 0: 5.

        The least is 5 + 10 K, in a single pass. For every further tangent the kernels run again. Of a context two
        thirds of the products are left; without its own gradients, in an attack, 3 for K = 0.
        """
        stack, part = 1 + self.K, self.context_product
        rows = Work("stream", 0.0, stack * 2 * self.queries)
        if self.K == 0:
            traffic = 4 * self.queries + 4 * self.keys + (4 if to_context else 2) * self.context_keys
            return [rows, Work("attention", 5 * self.product + (5 if to_context else 3) * part, traffic)]
        # reads q, out_bar, k, v; writes k_bar, v_bar
        traffic = stack * (2 * self.queries + 4 * self.keys) + 4 * self.context_keys
        counts = (12, 9) if self.D <= 64 else (6, 9, 9)
        product = self.product + 2 / 3 * part
        return [rows, *(Work("attention", self.K * count * product, traffic) for count in counts)]


# ---------------------------------------------------------------------------------------------------------- rows
#: streams of the size of one input, read and written: (forward, backward); every one is of stacked tensors
STREAMS = {"norm": (2, 3), "add": (4, 4), "activation": (2, 3), "gated": (3, 5), "rotary": (2, 2)}


def stream(kind: str, numbers: float, backward: bool, K: int = 1, item: int = 2) -> Work:
    """A norm, activation or rotary embedding on `numbers` elements of the primal; each stream passes once."""
    count = STREAMS[kind][backward]
    return Work("stream", 0.0, float(count * (1 + K) * item * numbers))


def linear(rows: float, inputs: int, outputs: int, backward: bool, K: int = 1, item: int = 2) -> list[Work]:
    """A linear layer over the stacked rows: one product forward, two backward."""
    flops = 2.0 * (1 + K) * rows * inputs * outputs
    traffic = item * ((1 + K) * rows * (inputs + outputs) + inputs * outputs)
    return [Work("product", flops, float(traffic))] * (2 if backward else 1)


def head(rows: int, features: int, words: int, K: int = 1, item: int = 2, passes: int = 4) -> list[Work]:
    """The Fisher head forward and backward: 1 + K products, the logits again, the gradients of hidden and weight.

    Nothing of the size of the logits moves. Three passes where the gradients are formed in the forward, two without
    that of the weight.
    """
    product = 2.0 * rows * features * words
    traffic = item * ((1 + K) * rows * features + features * words)
    return [Work("product", (1 + K) * product, float(traffic))] * passes


def plain_head(rows: int, features: int, words: int, item: int = 2, passes: int = 3) -> list[Work]:
    """Linear and cross-entropy, forward and backward, eager: the logits move in `item` and in four bytes.

    Two passes without the gradient of the weight.
    """
    product = 2.0 * rows * features * words
    traffic = item * (rows * features + features * words + rows * words)
    logits = float(rows) * words
    # cast to float32; log-softmax read and written; its gradient; cast back
    moved = logits * ((item + 4) + 8 + 12 + (4 + item))
    return [*[Work("product", product, float(traffic))] * passes, Work("stream", 0.0, moved)]


# --------------------------------------------------------------------------------------------------------- a step
@dataclass(frozen=True)
class Decoder:
    """Sizes of a Llama-like model."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    intermediate: int

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    def step(
        self, length: int, K: int, item: int = 2, context: int = 0, to_parameters: bool = True
    ) -> list[Work]:
        """Forward and backward to all parameters of one sequence; K = 0 is the plain step.

        Args:
            length: of the sequence, or of what comes after a context of so many tokens.
            to_parameters: False: backward only to the input, as in an attack.
        """
        C, D = self.hidden, self.head_size
        attention = Attention(1, self.heads, self.key_heads, length, length, D, True, K, item, context)
        inner = self.intermediate
        sizes = [(C, C), (C, 2 * self.key_heads * D), (C, C), (C, 2 * inner), (inner, C)]
        layer: list[Work] = []
        for back in (False, True):
            for inputs, outputs in sizes:
                products = linear(length, inputs, outputs, back, K, item)
                layer += products if to_parameters else products[:1]
            layer += [stream("add", length * C, back, K, item)] * 2
            layer.append(stream("rotary", length * D * (self.heads + self.key_heads), back, K, item))
            layer.append(stream("gated", length * self.intermediate, back, K, item))
        return (layer + attention.forward() + attention.backward(to_parameters)) * self.layers

    def filled(self, length: int, item: int = 2) -> list[Work]:
        """Keys and values of a context, forward and backward: of the last layer nothing else."""
        outputs = 2 * self.key_heads * self.head_size
        last = [w for back in (False, True) for w in linear(length, self.hidden, outputs, back, 0, item)]
        return dataclasses.replace(self, layers=self.layers - 1).step(length, 0, item) + last


@dataclass(frozen=True)
class MethodStep:
    """A training step of the method on one sequence, whose last tokens may be attacked and are learnt.

    Attributes:
        model: its sizes.
        words: of the head.
        length: of the sequence.
        open: how many tokens may be attacked and are learnt.
        points: at which the ascent takes a gradient.
    """

    model: Decoder
    words: int
    length: int
    open: int
    points: int
    item: int = 2

    def penalty(self, shared: bool) -> list[Work]:
        """Ascent, and loss and penalty in one forward; with a `shared` context, or all tokens at every point."""
        start = self.length - self.open if shared else 0
        sizes: Any = dict(item=self.item, context=start)
        length = self.length - start
        attack = self.model.step(length, 0, to_parameters=False, **sizes) + self._head(0, passes=2)
        trained = self.model.step(length, 1, **sizes) + self._head(1, passes=3)
        return attack * self.points + trained + (self.model.filled(start, self.item) if start else [])

    def adversarial(self) -> list[Work]:
        """Ascent and loss on our kernels, the head on the open tokens only."""
        attack = self.model.step(self.length, 0, self.item, to_parameters=False) + self._head(0, passes=2)
        return attack * self.points + self.model.step(self.length, 0, self.item) + self._head(0, passes=3)

    def usual(self) -> list[Work]:
        """The same with logits of all tokens, as it is usually written."""
        sizes = (self.length, self.model.hidden, self.words, self.item)
        attack = self.model.step(self.length, 0, self.item, to_parameters=False)
        attack += plain_head(*sizes, passes=2)
        return attack * self.points + self.model.step(self.length, 0, self.item) + plain_head(*sizes)

    def _head(self, K: int, passes: int) -> list[Work]:
        return head(self.open, self.model.hidden, self.words, K, self.item, passes)


# ------------------------------------------------------------------------------------------------------ ceilings
@dataclass(frozen=True)
class Ceilings:
    """Largest rates of a device.

    Attributes:
        flops: operations a second of a square product in the dtype, by the vendor's library.
        bytes: a second, read and written by a copy.
    """

    flops: float
    bytes: float


@functools.cache
def measured(device: str, dtype: str) -> Ceilings:
    """The ceilings of a device, measured once per process.

    Half a second each: a matrix of 8192 squared, and a copy of a gigabyte, which no cache holds. On a CPU a matrix of
    1024 and 256 MB will do; and where it has no instructions for the dtype, float32 is the faster way to compute in it.
    """
    if device != "cpu":
        return measure(device, dtype, size=8192, numbers=2**29, seconds=0.5)
    ceilings = measure(device, dtype, size=1024, numbers=2**27, seconds=0.5)
    if dtype == "float32":
        return ceilings
    return Ceilings(max(ceilings.flops, measured(device, "float32").flops), ceilings.bytes)


def measure(device: str, dtype: str, size: int, numbers: int, seconds: float) -> Ceilings:
    """The ceilings by a square product of `size` and a copy of so many 16-bit numbers, each for some seconds."""
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(a)
    product = _fastest(lambda: torch.mm(a, b, out=out), device, seconds)
    x = torch.zeros(numbers, dtype=torch.bfloat16, device=device)
    y = torch.empty_like(x)
    copy = _fastest(lambda: y.copy_(x), device, seconds)
    return Ceilings(2.0 * size**3 / product, 2.0 * x.numel() * x.element_size() / copy)


def _fastest(call: Callable[[], object], device: str, seconds: float) -> float:
    """Least seconds of a call; ten at a time, so that starting them costs nothing."""
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    call()
    wait()
    least, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or least == float("inf"):
        start = time.perf_counter()
        for _ in range(10):
            call()
        wait()
        least = min(least, (time.perf_counter() - start) / 10)
    return least
