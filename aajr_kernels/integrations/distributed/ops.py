"""Ops on Duals that are sharded over processes: kernels on local shards, communication where a gradient needs it.

Each rule gives, per axis of the mesh, the placements of inputs and result, and those of the gradients of the local
shards: a pending sum (``Partial``) or final. torch redistributes inputs with other placements, and gradients to the
placements of their tensors.

linear y = x Wᵀ + b, with x a stack ``[1 + K, *batch, in]``:

==================  ================  =====  ======================  =========  =========
W                   x                 y      gradient of local x     of W       of b
==================  ================  =====  ======================  =========  =========
rows split          whole             split  a sum                   split      split
columns split       split (features)  a sum  split                   split      whole
whole               split (tokens)    split  split                   a sum      a sum
whole               whole             whole  whole                   whole      whole
==================  ================  =====  ======================  =========  =========
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import sharding
from ...backends.errors import UnsupportedOperation
from ...dual import Dual

__all__ = ["local", "mesh_of"]

Run = Callable[..., Any]


def mesh_of(op: str, **tensors: Tensor | None) -> Any:
    """The mesh that the DTensors among `tensors` share; the first has to be a DTensor.

    Raises:
        UnsupportedOperation: it is not, or there are two meshes.
    """
    (name, first), *others = tensors.items()
    if not sharding.is_dtensor(first):
        other = next(key for key, value in others if sharding.is_dtensor(value))
        raise UnsupportedOperation(
            f"{op}: {other} is a DTensor and {name} is not: call the layer with the hooks that parallelize_module gave "
            f"it, or distribute {name} with DTensor.from_local."
        )
    mesh = first.device_mesh  # type: ignore[union-attr]
    for key, value in others:
        if sharding.is_dtensor(value) and value.device_mesh != mesh:  # type: ignore[union-attr]
            raise UnsupportedOperation(
                f"{op}: {key} is on the mesh {value.device_mesh} and {name} on {mesh}: spread both over the same one."  # type: ignore[union-attr]
            )
    return mesh


def local(x: Tensor, mesh: Any, placements: Sequence[Any], gradient: Sequence[Any]) -> Tensor:
    """The shard of `x` under `placements`; a plain tensor counts as whole in every process.

    Args:
        gradient: placements of the gradient that the shard will get.
    """
    from torch.distributed.tensor import DTensor, Replicate

    if not sharding.is_dtensor(x):
        x = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    if tuple(x.placements) != tuple(placements):  # type: ignore[attr-defined]
        x = x.redistribute(mesh, placements)  # type: ignore[attr-defined]
    return x.to_local(grad_placements=tuple(gradient))  # type: ignore[attr-defined]


def _joined(x: Tensor, mesh: Any, placements: Sequence[Any], shape: Sequence[int]) -> Tensor:
    """The DTensor of `shape` whose shards are `x`, which may differ in size."""
    from torch.distributed.tensor import DTensor

    stride, size = [], 1
    for n in reversed(shape):
        stride.append(size)
        size *= max(n, 1)
    return DTensor.from_local(
        x.contiguous(), mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride[::-1])
    )


def _kept(placements: Sequence[Any], allowed: Callable[[int], bool]) -> tuple[Any, ...]:
    """`placements`, replicated where they are sums or split along an axis that has to be whole."""
    from torch.distributed.tensor import Replicate, Shard

    return tuple(p if type(p) is Shard and allowed(p.dim) else Replicate() for p in placements)


def _of_weights(placements: Sequence[Any]) -> tuple[Any, ...]:
    """Placements of the gradient of a weight that acts on all rows: a sum where the rows are split."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    return tuple(Partial() if type(p) is Shard else Replicate() for p in placements)


# -- linear -----------------------------------------------------------------------------------------------------------


def _linear(run: Run, x: Dual, weight: Tensor, bias: Tensor | None) -> Dual:
    from torch.distributed.tensor import Partial, Replicate, Shard

    mesh = mesh_of("linear", x=x.stacked, weight=weight, bias=bias)
    last = x.stacked.dim() - 1
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"linear: weight must be [out, {x.shape[-1]}] for x of shape {tuple(x.shape)}, got {tuple(weight.shape)}."
        )
    weight_placements = weight.placements if sharding.is_dtensor(weight) else [Replicate()] * mesh.ndim  # type: ignore[attr-defined]
    rows: list[tuple[Any, ...]] = []
    for placement, w in zip(x.stacked.placements, weight_placements):  # type: ignore[attr-defined]
        if w == Shard(0):
            rows.append((Replicate(), Partial(), w, w, w, w, Shard(last)))
        elif w == Shard(1):
            rows.append((Shard(last), Shard(last), w, w, Replicate(), Replicate(), Partial()))
        else:
            (kept,) = _kept([placement], lambda dim: dim != last)
            (grad,) = _of_weights([kept])
            rows.append((kept, kept, Replicate(), grad, Replicate(), grad, kept))
    x_in, x_bar, w_in, w_bar, b_in, b_bar, y_out = zip(*rows)
    b = None if bias is None else local(bias, mesh, b_in, b_bar)
    first = all(mesh.get_local_rank(i) == 0 for i, p in enumerate(y_out) if type(p) is Partial)
    if b is not None and not first:
        b = b - b.detach()  # a sum takes the bias once; its gradient is the same everywhere
    y = run(Dual(local(x.stacked, mesh, x_in, x_bar)), local(weight, mesh, w_in, w_bar), b)
    return Dual(_joined(y.stacked, mesh, y_out, (*x.stacked.shape[:-1], weight.shape[0])))


# -- rows by themselves -----------------------------------------------------------------------------------------------


def _rowwise(op: str, run: Run, x: Dual, axes: int, **weights: Tensor | None) -> Dual:
    """An op that acts along the last `axes` axes, with weights that are the same for all rows."""
    mesh = mesh_of(op, x=x.stacked, **weights)
    placements = _kept(x.stacked.placements, lambda dim: dim < x.stacked.dim() - axes)  # type: ignore[attr-defined]
    whole, gradient = _kept(placements, lambda dim: False), _of_weights(placements)
    shards = {name: None if w is None else local(w, mesh, whole, gradient) for name, w in weights.items()}
    y = run(Dual(local(x.stacked, mesh, placements, placements)), **shards)
    return Dual(_joined(y.stacked, mesh, placements, x.stacked.shape))


def _along(op: str, run: Run, x: Dual, axis: int) -> Dual:
    """An op along one axis of the Dual."""
    mesh = mesh_of(op, x=x.stacked)
    placements = _kept(x.stacked.placements, lambda dim: dim != axis + 1)  # type: ignore[attr-defined]
    y = run(Dual(local(x.stacked, mesh, placements, placements)), axis)
    return Dual(_joined(y.stacked, mesh, placements, x.stacked.shape))


def _gated(op: str, run: Run, gate: Dual, up: Dual) -> Dual:
    mesh_of(op, up=up.stacked, gate=gate.stacked)  # neither may be plain
    mesh = mesh_of(op, gate=gate.stacked, up=up.stacked)
    placements = _kept(gate.stacked.placements, lambda dim: True)  # type: ignore[attr-defined]
    y = run(*(Dual(local(z.stacked, mesh, placements, placements)) for z in (gate, up)))
    stacks = max(gate.stacked.shape[0], up.stacked.shape[0])
    return Dual(_joined(y.stacked, mesh, placements, (stacks, *gate.shape)))


def _rotary(run: Run, x: Dual, cos: Tensor, sin: Tensor) -> Dual:
    mesh = mesh_of("rotary", x=x.stacked, cos=cos, sin=sin)
    aligned = (1,) * (x.stacked.dim() - cos.dim()) + tuple(cos.shape)
    # tables are replicated, so the axes that they distinguish (positions, sequences) have to be whole
    placements = _kept(x.stacked.placements, lambda dim: aligned[dim] == 1)  # type: ignore[attr-defined]
    whole, gradient = _kept(placements, lambda dim: False), _of_weights(placements)
    tables = (local(t, mesh, whole, gradient) for t in (cos, sin))
    y = run(Dual(local(x.stacked, mesh, placements, placements)), *tables)
    return Dual(_joined(y.stacked, mesh, placements, x.stacked.shape))


# -- attention --------------------------------------------------------------------------------------------------------


def _attention(run: Run, q: Any, k: Any, v: Any, mask: Any) -> Any:
    """Heads and sequences separately, if the mask does not distinguish them."""
    stacks: dict[str, Any] = {
        name: z.stacked if isinstance(z, Dual) else z.unsqueeze(0) for name, z in zip("qkv", (q, k, v))
    }
    mesh = mesh_of("attention", **stacks)
    axes = stacks["q"].dim()
    aligned = (1,) * axes
    if mask is not None:
        if isinstance(mask, Dual) or mask.requires_grad or sharding.is_dtensor(mask):
            raise UnsupportedOperation(
                "attention: the mask of DTensors must be a plain tensor without gradient: pass local shards."
            )
        aligned = (1,) * (axes - mask.dim()) + tuple(mask.shape)

    def apart(dim: int) -> bool:  # every split by the mesh keeps groups of heads together
        even = all(stack.shape[dim] % mesh.size() == 0 for stack in stacks.values())
        return dim < axes - 2 and aligned[dim] == 1 and even

    placements = _kept(stacks["q"].placements, apart)
    parts = []
    for z, stack in zip((q, k, v), stacks.values()):
        mesh_of("attention", **{"an input": stack})
        shard = local(stack, mesh, placements, placements)
        parts.append(Dual(shard) if isinstance(z, Dual) else shard[0])
    y = run(*parts, mask=mask)
    return Dual(_joined(y.stacked, mesh, placements, (y.stacked.shape[0], *q.shape[:-1], v.shape[-1])))


def _whole(x: Dual) -> Dual:
    """All of a Dual in every process, as a plain stack."""
    from torch.distributed.tensor import Replicate

    mesh = mesh_of("sensitivity", y=x.stacked)
    placements = [Replicate()] * mesh.ndim
    return Dual(local(x.stacked, mesh, placements, placements))


sharding.OPS |= {
    "along": _along,
    "attention": _attention,
    "gated": _gated,
    "linear": _linear,
    "rotary": _rotary,
    "rowwise": _rowwise,
    "whole": _whole,
}
