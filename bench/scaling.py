"""`python -m bench.scaling`: bytes, operations and memory of a step in many processes, counted; seconds, modelled.

Counted is the code's work: FSDP2 gathers a layer before its forward and before its backward and scatters the sum of
its gradient; the parallel styles of torch sum or gather activations; the split head gathers its statistics. Tests
compare these numbers with the collectives of real steps in two and four processes. Seconds and gigabytes of a device
that was not there are modelled, and said to be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import typer
from rich.console import Console

from common import pages
from common.command import run

from .roofline import DEVICES, PRODUCT_SHARE, Device

#: bytes a second that a process sends: to the other seven of its node (NVLink 4, one direction) and to other nodes
#: (a network card of 400 Gbit/s for every device)
NODE, NETWORK, DEVICES_OF_A_NODE = 450e9, 50e9, 8
#: of the peak of a link: the rate of ring collectives of large tensors
LINK_SHARE = 0.8

#: model and processes that share a layer, by numbers of devices
ROWS = (
    ("8B", 1, (8, 64, 512, 4096)),
    ("32B", 4, (8, 64, 512, 4096)),
    ("70B", 8, (8, 64, 512, 4096)),
    ("405B", 8, (64, 512, 4096)),
)


@dataclass(frozen=True)
class Shape:
    """A Llama by its sizes.

    Attributes:
        layers, hidden, heads, kv_heads, head_dim, inner, words: as in its configuration.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    words: int

    def layer(self, tensor: int) -> list[tuple[int, ...]]:
        """Shapes of a layer's parameters where `tensor` processes share them."""
        c, q, kv, f = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim, self.inner
        return [
            *((n // tensor, c) for n in (q, kv, kv, f, f)),
            (c, q // tensor),
            (c, f // tensor),
            (c,),
            (c,),
        ]

    def outer(self, tensor: int) -> list[tuple[int, ...]]:
        """Those outside the layers: embedding, last norm, head; the head is split over the vocabulary."""
        return [(self.words, self.hidden), (self.hidden,), (-(-self.words // tensor), self.hidden)]

    @property
    def parameters(self) -> int:
        return sum(math.prod(s) for s in (*self.layer(1) * self.layers, *self.outer(1)))


MODELS = {
    "8B": Shape("8B", 32, 4096, 32, 8, 128, 14336, 128256),
    "32B": Shape("32B", 64, 5120, 40, 8, 128, 27648, 152064),
    "70B": Shape("70B", 80, 8192, 64, 8, 128, 28672, 128256),
    "405B": Shape("405B", 126, 16384, 128, 8, 128, 53248, 128256),
}


@dataclass(frozen=True)
class Layout:
    """The processes of a step and its parts.

    Attributes:
        data: processes with rows of their own, over which ``fully_shard`` splits the parameters.
        tensor: processes that share every layer and the vocabulary.
        batch, length: rows of a data-parallel process and their tokens.
        tangents: K of the penalty, 0 for the adversarial loss only.
        attack: gradients of an attack before it, followed by one loss; 0 for a plain step.
        sequence: norms and residuals are split along the sequence over `tensor`.
        recompute: every layer is checkpointed.
        width: bytes of parameters and activations in computations.
        reduced: bytes of an element of gradients when they are summed, and of parameters, gradients and the two moments
            of Adam at rest.
        metric: of the penalty.
        labelled: share of the tokens with a label; the head computes no others where there is no tangent.
    """

    data: int = 1
    tensor: int = 1
    batch: int = 1
    length: int = 4096
    tangents: int = 1
    attack: int = 3
    sequence: bool = True
    recompute: bool = True
    width: int = 2
    reduced: int = 4
    metric: str = "fisher"
    labelled: float = 1.0

    @property
    def processes(self) -> int:
        return self.data * self.tensor

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def in_head(self, stacks: int) -> int:
        """Tokens of a process that the head computes."""
        return round(self.tokens * self.labelled) if stacks == 1 else self.tokens


@dataclass(frozen=True)
class Collective:
    """Equal collectives of one process.

    Attributes:
        kind: ``all_gather``, ``reduce_scatter`` or ``all_reduce``.
        group: ``data`` or ``tensor``.
        name: of the tensor that is moved.
        count: calls.
        size: bytes of the whole tensor that one call gathers, scatters or sums.
    """

    kind: str
    group: str
    name: str
    count: int
    size: int


def collectives(shape: Shape, layout: Layout) -> list[Collective]:
    """All of a step: attack, then forward and backward of loss and penalty."""
    both = (*_parameters(shape, layout), *_activations(shape, layout))
    return [c for c in both if c.count and c.size and getattr(layout, c.group) > 1]


def sent(moves: list[Collective], layout: Layout, group: str) -> float:
    """Bytes that a process sends in a group, by ring algorithms."""
    n = getattr(layout, group)
    factor = {"all_gather": (n - 1) / n, "reduce_scatter": (n - 1) / n, "all_reduce": 2 * (n - 1) / n}
    return sum(factor[c.kind] * c.count * c.size for c in moves if c.group == group)


def _parameters(shape: Shape, layout: Layout) -> Iterator[Collective]:
    """fully_shard of every layer, then of the model."""
    backwards, losses = layout.attack + 1, int(layout.attack > 0)
    layer, outer = (_padded(s, layout.data) for s in (shape.layer(layout.tensor), shape.outer(layout.tensor)))
    # the last layer's forward and backward follow each other, but it is gathered for both like the others
    passes = (2 * backwards + losses) * shape.layers
    yield Collective("all_gather", "data", "parameters of a layer", passes, layer * layout.width)
    # stay gathered from forward to backward, and from the attack's last loss to the forward after it
    yield Collective("all_gather", "data", "parameters outside", backwards, outer * layout.width)
    yield Collective("reduce_scatter", "data", "gradient of a layer", shape.layers, layer * layout.reduced)
    # the table of embeddings is not called where a step begins at embeddings: no gradient, nothing to be summed
    trained = _padded(shape.outer(layout.tensor)[1:], layout.data)
    yield Collective("reduce_scatter", "data", "gradient outside", 1, trained * layout.reduced)


def _padded(shapes: list[tuple[int, ...]], parts: int) -> int:
    """Elements when the first axis is rounded up to equal parts."""
    return sum(-(-s[0] // parts) * parts * math.prod(s[1:]) for s in shapes)


def _activations(shape: Shape, layout: Layout) -> Iterator[Collective]:
    if layout.sequence and layout.data > 1:
        # weights of norms see a part of the sequence; without fully_shard their sums wait for a reader
        norms = 2 * shape.layers + 1
        yield Collective("all_reduce", "tensor", "gradient of a norm", norms, shape.hidden * layout.width)
    for stacks, forwards, backwards in _passes(layout):
        size = stacks * layout.tokens * shape.hidden * layout.width
        # a layer is computed again up to its last product, without the sum after it
        again = backwards * int(layout.recompute)
        n = shape.layers
        if layout.sequence:
            yield Collective("all_gather", "tensor", "inputs of a layer", 2 * n * (forwards + again), size)
            yield Collective("reduce_scatter", "tensor", "outputs", n * (2 * forwards + again), size)
            yield Collective("all_gather", "tensor", "gradients of outputs", 2 * n * backwards, size)
            yield Collective("reduce_scatter", "tensor", "gradients of inputs", 2 * n * backwards, size)
            yield Collective("all_gather", "tensor", "hidden states", forwards, size)
            yield Collective("reduce_scatter", "tensor", "gradient of hidden states", backwards, size)
            if stacks == 1 and layout.attack:
                yield Collective("all_gather", "tensor", "gradient of the input", backwards, size)
        else:
            yield Collective("all_reduce", "tensor", "outputs", n * (2 * forwards + again), size)
            # q, k, v, gate and up each have an input of their own
            yield Collective("all_reduce", "tensor", "gradients of inputs", 5 * n * backwards, size)
            yield Collective("all_reduce", "tensor", "gradient of hidden states", backwards, size)
        rows = 8 * layout.tensor * layout.in_head(stacks) * _statistics(stacks - 1, layout.metric)
        yield Collective("all_gather", "tensor", "statistics of the head", forwards, rows)


def _passes(layout: Layout) -> Iterator[tuple[int, int, int]]:
    """Stacks, forwards, backwards: of the attack, then of loss and penalty."""
    if layout.attack:
        yield 1, layout.attack + 1, layout.attack
    yield 1 + layout.tangents, 1, 1


def _statistics(tangents: int, metric: str) -> int:
    """Numbers per token that the split head gathers: the process, log Σ e^z, the label's logit, and per tangent."""
    per_tangent = {"l2": 0, "logits": 1, "fisher": 2, "probs": 3}[metric]
    return 3 + 2 + per_tangent * tangents + int(metric == "probs" and tangents > 0)


def operations(shape: Shape, layout: Layout) -> float:
    """Multiplications and additions of a process in matrix products."""
    matrices = sum(math.prod(s) for s in shape.layer(layout.tensor) if len(s) == 2) * shape.layers
    words = math.prod(shape.outer(layout.tensor)[2])
    pairs = layout.length * layout.tokens * shape.heads * shape.head_dim / layout.tensor * shape.layers
    total = 0.0
    passes = list(_passes(layout))
    for i, (stacks, forwards, backwards) in enumerate(passes):
        k = stacks - 1
        again = backwards * int(layout.recompute)
        trained = 2 if i == len(passes) - 1 else 1  # an attack has no weights' part
        products = 2.0 * stacks * layout.tokens * matrices
        total += products * (forwards + again + trained * backwards)
        # the head forms its logits again in its backward, where nothing expects the cotangents
        total += 2.0 * stacks * layout.in_head(stacks) * words * (forwards + (1 + trained) * backwards)
        # causal: half of the pairs; q kᵀ and p v, of which every tangent has two more each
        attention = 2.0 * pairs * (1 + 2 * k)
        total += attention * (forwards + again + 2.5 * backwards)
    return total


def memory(shape: Shape, layout: Layout) -> dict[str, float]:
    """Bytes of a process, modelled: at rest, gathered, and for a backward."""
    at_rest = (_padded(shape.layer(layout.tensor), layout.data) * shape.layers) / layout.data
    at_rest += _padded(shape.outer(layout.tensor), layout.data) / layout.data
    layer, outer = (_padded(s, 1) for s in (shape.layer(layout.tensor), shape.outer(layout.tensor)))
    split = layout.data > 1
    # this layer and the next; a layer's gradient before and while it is summed
    gathered = (2 * layer + outer) * layout.width + (layer + outer) * layout.reduced if split else 0
    stacks = 1 + layout.tangents
    stream = stacks * layout.tokens * shape.hidden * layout.width
    between = stream / (layout.tensor if layout.sequence else 1)
    one = saved_in_a_layer(shape, layout, stacks)
    kept = between * shape.layers + one if layout.recompute else one * shape.layers
    # hidden states whole, their gradient, and its sum in float32
    head = stream * 2 + stream / layout.width * 4
    return {
        "parameters, gradients, Adam": 4.0 * layout.reduced * at_rest,
        "gathered": float(gathered),
        "activations": kept,
        "head": head,
    }


def saved_in_a_layer(shape: Shape, layout: Layout, stacks: int) -> float:
    """Bytes that a fused layer saves for its backward, statistics of rows apart.

    The inputs of two norms and of two products (whole, also where norms are split along the sequence), this process's
    heads and inner features: q, k, v after the rotation, attention's output, which o takes; gate, up, their product.
    """
    norms = 2 * shape.hidden / (layout.tensor if layout.sequence else 1)
    heads = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim / layout.tensor
    return (
        stacks
        * layout.tokens
        * layout.width
        * (norms + 2 * shape.hidden + heads + 3 * shape.inner / layout.tensor)
    )


def seconds(shape: Shape, layout: Layout, device: Device = DEVICES["h100"]) -> float:
    """Modelled: arithmetic and the sums within a layer follow each other, parameters travel meanwhile."""
    tensor_link = NODE if layout.tensor <= DEVICES_OF_A_NODE else NETWORK
    data_link = NODE if layout.processes <= DEVICES_OF_A_NODE else NETWORK
    moves = collectives(shape, layout)
    within = operations(shape, layout) / (1e12 * device.tflops * PRODUCT_SHARE)
    within += sent(moves, layout, "tensor") / (LINK_SHARE * tensor_link)
    return max(within, sent(moves, layout, "data") / (LINK_SHARE * data_link))


def scaling(
    batch: Annotated[int, typer.Option(min=1, help="Rows of a data-parallel process.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = 4096,
    tangents: Annotated[int, typer.Option(min=1, help="Directions of the penalty.")] = 1,
    attack: Annotated[int, typer.Option(min=1, help="Steps of the attack.")] = 3,
) -> None:
    """Communication, operations and memory per device: a plain step, an adversarial one, and one with the penalty.

    All numbers are modelled, for 8B to 405B on 8 to 4,096 H100s: bytes and operations are counted (tests compare the
    bytes with those of real steps in two and four processes), seconds rest on assumed rates.
    """
    head = "model|devices|data × tensor|parameters, GB|tensor, GB|ratio|PFLOP|ratio|memory, GB|seconds"
    lines = [
        _line(
            MODELS[name],
            Layout(count // shared, shared, batch, length, tangents, attack, sequence=shared > 1),
        )
        for name, shared, counts in ROWS
        for count in counts
    ]
    table = pages.table(head.split("|"), lines)
    Console().print(table, markup=False, highlight=False, soft_wrap=True)


def _line(shape: Shape, layout: Layout) -> tuple[object, ...]:
    """Numbers of a plain step, an adversarial one, and one with the penalty."""
    three = lambda values, form: " / ".join(format(value, form) for value in values)
    steps = (replace(layout, attack=0, tangents=0), replace(layout, tangents=0), layout)
    data, over = (
        [sent(collectives(shape, one), one, group) / 1e9 for one in steps] for group in ("data", "tensor")
    )
    work = [operations(shape, one) / 1e15 for one in steps]
    return (
        *(shape.name, layout.processes, f"{layout.data} × {layout.tensor}"),
        three(data, ".0f"),
        three(over, ".0f"),
        f"{over[2] / over[1]:.2f}" if over[1] else "–",
        three(work, ".2f"),
        f"{work[2] / work[1]:.2f}",
        three([sum(memory(shape, one).values()) / 1e9 for one in steps], ".0f"),
        three([seconds(shape, one) for one in steps], ".2f"),
    )


if __name__ == "__main__":
    run(scaling, "bench.scaling", "bench")
