"""Less memory for a little time: results of norms and activations are computed again in the backward.

A linear layer keeps its input for the gradient of its weight. Where that input is the result of a norm or an
activation, the node of the graph that made it has what it takes to make it again: its own inputs, which it keeps in any
case, and statistics of a few numbers per row. With recomputation such a consumer keeps a reference to that node and
asks it in its backward. The node answers all its consumers with one computation, the same kernel on the same numbers,
so gradients are bitwise equal.

Only the node keeps tensors, through ``save_for_backward``: hooks on saved tensors (offloading, non-reentrant
checkpointing) see every one of them once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import torch_private

__all__ = [
    "Result",
    "is_recomputed",
    "make_recomputable",
    "recomputable_node",
    "recompute",
    "recomputed",
    "released",
    "save_or_recompute",
    "saved_tensors",
    "snapshot",
]

#: what the open contexts say
_context = {"norms": False, "activations": False}


class recompute:
    """Context in which results of norms and activations are not kept for the backward, but computed again there.

    What is asked again is decided in the forward: the backward may run outside. Of the numbers that a Llama layer keeps
    this leaves out about a third, for two passes over memory; gradients are bitwise equal. It acts on our own ops: the
    norms, activations and gated products of a fused model, ``torch.nn.LayerNorm``, ``RMSNorm`` and plain activations,
    where a linear layer takes their result. Attention keeps what it keeps.

    With activation checkpointing the forward of a block runs again inside the backward and has to keep the same: use
    ``fuse(model, recompute=True)``, which travels with the modules, or have the backward inside this context too. Under
    torch.compile its partitioner decides what is kept, and this context does nothing.

    Args:
        norms: RMS norms and layer norms.
        activations: activations and gated products.
    """

    def __init__(self, norms: bool = True, activations: bool = True) -> None:
        for name, value in (("norms", norms), ("activations", activations)):
            if not isinstance(value, bool):
                raise TypeError(f"recompute: {name} must be True or False, got {value!r}.")
        self._wanted = {"norms": norms, "activations": activations}
        self._before: list[dict[str, bool]] = []

    def __enter__(self) -> recompute:
        self._before.append(dict(_context))
        _context.update(self._wanted)
        return self

    def __exit__(self, *exc: object) -> None:
        _context.update(self._before.pop())


def is_recomputed(kind: str) -> bool:
    """Whether results of a kind of :data:`_context` are to be computed again."""
    return not torch.compiler.is_compiling() and _context[kind]


class Result:
    """The first result of a node, as its consumers find it there.

    Attributes:
        again: from the node to the result.
        version: of the result's memory when it was made: a result that was written to since is kept as it is.
        consumers: how many will ask in a backward.
        asked: how many have.
        value: the result between the first and the last of them.
        saved: what the node had saved, unpacked: hooks may allow that once.
    """

    __slots__ = ("again", "asked", "consumers", "saved", "value", "version")

    def __init__(self, again: Callable[[Any], torch.Tensor], version: int) -> None:
        self.again, self.version = again, version
        self.consumers = self.asked = 0
        self.value: torch.Tensor | None = None
        self.saved: tuple[Any, ...] | None = None


# -- what may be written to -------------------------------------------------------------------------------------------


def snapshot(x: torch.Tensor, needed: bool | None = None) -> torch.Tensor:
    """`x` with its present values, for a backward: what is written to `x` later does not reach it.

    Where torch saves the result of a function, its argument may be written in place afterwards, as in
    ``x.mul_(x.sigmoid())``. The tangent's derivative needs the argument: it takes this copy, which costs memory and
    time only if there is such a write (copy on write).

    Args:
        x: a tensor.
        needed: whether there will be a backward; None: as autograd says here, outside of a Function's forward.
    """
    if needed is None:
        needed = torch.is_grad_enabled() and x.requires_grad
    if not needed:
        return x
    if torch.compiler.is_compiling():  # the compiler leaves out copies of what is never written
        return x.clone()
    return torch_private.lazy_clone(x)


# -- the node that made it --------------------------------------------------------------------------------------------


def make_recomputable(ctx: Any, result: torch.Tensor, again: Callable[[Any], torch.Tensor]) -> None:
    """In a Function's forward: consumers of its first result need not keep it.

    Args:
        ctx: of the Function, which has saved what `again` needs.
        result: what the forward returns.
        again: called with that ctx in a backward; it reads the tensors by :func:`saved_tensors`.
    """
    ctx.result = Result(again, torch_private.version_of(result))


def saved_tensors(ctx: Any) -> tuple[Any, ...]:
    """``ctx.saved_tensors``, which hooks may unpack only once, as often as wanted until :func:`released`."""
    result = _result_of(ctx)
    if result is None:
        return tuple(ctx.saved_tensors)
    if result.saved is None:
        result.saved = ctx.saved_tensors
    return result.saved


def released(ctx: Any) -> tuple[Any, ...]:
    """The same in the Function's backward, which runs after those of all consumers: no consumer asks after it."""
    result = _result_of(ctx)
    if result is None:
        return tuple(ctx.saved_tensors)
    saved = ctx.saved_tensors if result.saved is None else result.saved
    result.saved, result.value, result.asked = None, None, 0
    return saved


def _result_of(ctx: Any) -> Result | None:
    # no result is recomputable while torch.compile traces, and it cannot trace this look-up
    return None if torch.compiler.is_compiling() else getattr(ctx, "result", None)


# -- consumers -------------------------------------------------------------------------------------------------------

_VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")


def recomputable_node(x: torch.Tensor) -> Any:
    """In a Function's forward: the node that makes its input `x` again, or None where `x` has to be kept."""
    if torch.compiler.is_compiling():
        return None
    node, index = x.grad_fn, x.output_nr
    result = getattr(node, "result", None)
    if result is None and node is not None and node.name() in _VIEWS:
        node, index = node.next_functions[0]
        result = getattr(node, "result", None)
    if index != 0 or not isinstance(result, Result) or result.version != torch_private.version_of(x):
        return None
    return node


def save_or_recompute(ctx: Any, x: torch.Tensor) -> torch.Tensor | None:
    """In a Function's forward: `x` if it has to be saved, None where :func:`recomputed` will find it."""
    node = recomputable_node(x)
    if node is None:
        return x
    node.result.consumers += 1
    ctx.source, ctx.shape = node, x.shape
    return None


def recomputed(ctx: Any, x: torch.Tensor | None) -> torch.Tensor | None:
    """In that Function's backward: its input, given what was saved of it."""
    node = None if torch.compiler.is_compiling() else getattr(ctx, "source", None)
    if node is None:
        return x
    result: Result = node.result
    if result.value is None:
        for t in saved_tensors(node):
            if t is not None and t.numel() and not t.untyped_storage().nbytes():
                raise RuntimeError(
                    "recompute: a weight of shape "
                    f"{tuple(t.shape)} was freed before the result it made was computed again: shard the norm "
                    "together with the layers that take its result, or leave norms out with recompute(norms=False)."
                )
        result.value = result.again(node)
    value = result.value.view(ctx.shape)
    result.asked += 1
    if result.asked == result.consumers:
        result.value, result.asked = None, 0
    return value
