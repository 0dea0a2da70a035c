"""Duals that are sharded over processes: the stack is a DTensor.

The axis of the stack is never split, so a Dual that is split along its axis d has a stack that is split along d + 1.
The styles of ``torch.distributed.tensor.parallel`` make DTensors of what enters a layer (``DTensor.from_local``, which
ends in an autograd.Function), change their placements (``redistribute``) and return the shard (``to_local``): with a
rule for the first and methods for the others they work on a Dual unchanged. Communication is that of plain tensors,
1 + K times as many bytes in as many calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..backends.errors import UnsupportedOperation
from ..dual import Dual
from ..sharding import is_dtensor
from ..torch_private import ALL_REDUCE, FROM_LOCAL
from .guards import function_rule, linear_function
from .registry import rule

__all__ = ["of_the_dual", "of_the_stack"]


def of_the_stack(placements: Sequence[Any] | None, ndim: int) -> tuple[Any, ...] | None:
    """Placements of a Dual with `ndim` axes as placements of its stack."""
    return None if placements is None else tuple(_moved(p, lambda dim: dim % ndim + 1) for p in placements)


def of_the_dual(placements: Sequence[Any]) -> tuple[Any, ...]:
    """Placements of a stack as placements of the Dual."""
    return tuple(_moved(p, lambda dim: dim - 1) for p in placements)


def _moved(placement: Any, move: Callable[[int], int]) -> Any:
    from torch.distributed.tensor import Partial, Replicate, Shard

    if type(placement) is Shard:
        return Shard(move(placement.dim))
    linear = type(placement) is Partial and placement.reduce_op in ("sum", "avg")
    if linear or type(placement) is Replicate:
        return placement
    raise UnsupportedOperation(
        f"a Dual cannot be placed as {placement}, whose derivative is another one: use Shard, Replicate or Partial()."
    )


# DTensor.from_local is public and ends in this class, the only one that gets a Dual
@function_rule(FROM_LOCAL)
def _from_local(
    apply: Callable[..., Any],
    x: Dual,
    mesh: Any,
    placements: Sequence[Any],
    run_check: bool,
    shape: Sequence[int] | None = None,
    stride: Sequence[int] | None = None,
    *grad_placements: Sequence[Any] | None,
) -> Dual:
    if is_dtensor(x.stacked):  # styles do not recognise a sharded Dual and call this again
        return x
    if shape is not None and stride is not None:
        stacks = x.stacked.shape[0]
        shape, stride = torch.Size((stacks, *shape)), (torch.Size(shape).numel(), *stride)
    more = [of_the_stack(p, x.dim()) for p in grad_placements]
    return Dual(apply(x.stacked, mesh, of_the_stack(placements, x.dim()), run_check, shape, stride, *more))


def _placements(self: Dual) -> tuple[Any, ...]:
    """Placements of the Dual on ``device_mesh``; only if it is sharded."""
    return of_the_dual(self.stacked.placements)  # type: ignore[attr-defined]


def _redistribute(
    self: Dual,
    device_mesh: Any = None,
    placements: Sequence[Any] | None = None,
    *,
    async_op: bool = False,
    **more: Any,
) -> Dual:
    """``DTensor.redistribute`` of primal and tangents together; waits for the result also with `async_op`."""
    # the kernels that follow read memory, which an asynchronous result has not filled yet
    return Dual(self.stacked.redistribute(device_mesh, of_the_stack(placements, self.dim()), **more))  # type: ignore[attr-defined]


def _to_local(self: Dual, *, grad_placements: Sequence[Any] | None = None) -> Dual:
    """``DTensor.to_local`` of primal and tangents."""
    placements = of_the_stack(grad_placements, self.dim())
    return Dual(self.stacked.to_local(grad_placements=placements))  # type: ignore[attr-defined]


def _full_tensor(self: Dual, *, grad_placements: Sequence[Any] | None = None) -> Dual:
    """``DTensor.full_tensor`` of primal and tangents."""
    placements = of_the_stack(grad_placements, self.dim())
    return Dual(self.stacked.full_tensor(grad_placements=placements))  # type: ignore[attr-defined]


def _only_spread(function: Callable[..., Any]) -> property:
    """A method that only a spread Dual has, so that ``hasattr`` tells."""

    def get(self: Dual) -> Any:
        if not is_dtensor(self.stacked):
            raise AttributeError(f"a Dual has {function.__name__[1:]} only where its stack is a DTensor.")
        return lambda *args, **kwargs: function(self, *args, **kwargs)

    return property(get, doc=function.__doc__)


Dual.placements = property(_placements)  # type: ignore[attr-defined]
Dual.device_mesh = property(lambda self: self.stacked.device_mesh)  # type: ignore[attr-defined]
for _function in (_redistribute, _to_local, _full_tensor):
    setattr(Dual, _function.__name__[1:], _only_spread(_function))


# sums over processes, which are linear and independent of axes
linear_function(ALL_REDUCE)
linear_function("transformers.distributed.parallel_utils._AllReduceForward")
linear_function("transformers.distributed.parallel_utils._AllReduceBackward")

if torch.distributed.is_available():

    @rule(torch.distributed.all_reduce)
    def _all_reduce(
        tensor: Dual, op: Any = torch.distributed.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        if op not in (torch.distributed.ReduceOp.SUM, torch.distributed.ReduceOp.AVG):
            raise UnsupportedOperation(
                f"all_reduce of a Dual takes sums and averages, got {op}: reduce y.primal."
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise UnsupportedOperation(
                "torch.distributed.all_reduce would drop the gradient of a Dual: use torch.distributed.nn.functional's."
            )
        return torch.distributed.all_reduce(tensor.stacked, op, group, async_op)
