"""Rules that move values without arithmetic: views, shapes, joins.

All are linear, so they act on the stacked tensor with every axis moved one to the right. Where torch returns a view
the rule returns a view of the stack, so that in-place writes through it reach the original.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .common import (
    Dual,
    align,
    axes,
    axis,
    by_slices,
    is_dual,
    join,
    lift,
    ndim_of,
    num_tangents,
    parts,
    per_slice,
    primal_of,
    settled,
    sizes_of,
    split,
    stacks,
)
from .registry import rule

# -- views ------------------------------------------------------------------------------------------------------------


@rule("view", kind="view")
def _view(x: Dual, *size: Any, dtype: torch.dtype | None = None) -> Any:
    if dtype is not None or (size and isinstance(size[0], torch.dtype)):
        raise TypeError("view(dtype) of a Dual reinterprets bits, which has no derivative.")
    return Dual(x.stacked.view(x.stacked.shape[0], *sizes_of(size)))


@rule("reshape", kind="view")
def _reshape(x: Dual, *shape: Any, **kwargs: Any) -> Dual:
    shape = sizes_of(shape) if shape else sizes_of((kwargs["shape"],))
    if -1 in shape and x.numel() == 0:
        shape = tuple(x.primal.reshape(shape).shape)
    return Dual(x.stacked.reshape(x.stacked.shape[0], *shape))


rule("view_as", "reshape_as", kind="view")(lambda x, other: x.reshape(tuple(other.shape)))
rule("expand_as", kind="view")(lambda x, other: x.expand(tuple(other.shape)))


@rule("expand", "broadcast_to", kind="view")
def _expand(x: Dual, *size: Any, implicit: bool = False, **kwargs: Any) -> Dual:
    size = sizes_of(size) if size else sizes_of((kwargs["size"],))
    if len(size) < x.dim():
        raise ValueError(f"size must have at least {x.dim()} entries, got {len(size)}.")
    if any(n < 0 for n in size[: len(size) - x.dim()]):
        raise ValueError(f"size must not be negative for an axis that x {tuple(x.shape)} lacks, got {size}.")
    return Dual(align(x.stacked, len(size)).expand(x.stacked.shape[0], *size))


@rule("broadcast_tensors", kind="view")
def _broadcast_tensors(*tensors: Any) -> list[Any]:
    tensors = sizes_of(tensors)
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    return [t.expand(shape) for t in tensors]


@rule("permute", kind="view")
def _permute(x: Dual, *dims: Any, **kwargs: Any) -> Dual:
    dims = sizes_of(dims) if dims else tuple(kwargs["dims"])
    if len(dims) != x.dim():
        raise ValueError(f"dims of permute must name all {x.dim()} axes, got {dims}.")
    return Dual(x.stacked.permute(0, *axes(x, dims)))


@rule("transpose", "swapaxes", "swapdims", kind="view")
def _transpose(x: Dual, *args: int, **kwargs: int) -> Dual:
    dim0, dim1 = (*args, *kwargs.values())
    moved = axis(x, dim0), axis(x, dim1)
    return Dual(x.stacked.transpose(*moved) if x.dim() else x.stacked)


@rule("t", torch.Tensor.H.__get__, kind="view")  # type: ignore[attr-defined]
def _t(x: Dual) -> Dual:
    if x.dim() > 2:
        raise ValueError(f"t() takes at most two axes, got {tuple(x.shape)}: use mT or transpose.")
    return _reversed(x)


@rule(torch.Tensor.T.__get__, kind="view")  # type: ignore[attr-defined]
def _reversed(x: Dual) -> Dual:
    return Dual(x.stacked.permute(0, *range(x.dim(), 0, -1)))


@rule("adjoint", torch.Tensor.mT.__get__, torch.Tensor.mH.__get__, kind="view")  # type: ignore[attr-defined]
def _mt(x: Dual) -> Dual:
    return x.transpose(-1, -2) if x.dim() else Dual(x.stacked)


@rule("movedim", "moveaxis", kind="view")
def _movedim(x: Dual, source: Any, destination: Any) -> Dual:
    return Dual(x.stacked.movedim(axes(x, source), axes(x, destination)))


@rule("unsqueeze", kind="view")
def _unsqueeze(x: Dual, dim: int) -> Dual:
    if not -x.dim() - 1 <= dim <= x.dim():
        raise IndexError(f"dim must be in [{-x.dim() - 1}, {x.dim()}], got {dim}.")
    return Dual(x.stacked.unsqueeze(dim + 1 if dim >= 0 else dim))


@rule("squeeze", kind="view")
def _squeeze(x: Dual, dim: Any = None) -> Dual:
    # K >= 1: the stack axis holds at least two slices and is never squeezed away
    return Dual(x.stacked.squeeze() if dim is None else x.stacked.squeeze(axes(x, dim)))


@rule("flatten", kind="view")
def _flatten(x: Dual, start_dim: int = 0, end_dim: int = -1) -> Dual:
    start, end = axis(x, start_dim), axis(x, end_dim)
    return Dual(x.stacked.flatten(start, end)) if x.dim() else x.reshape(1)


rule("ravel", kind="view")(lambda x: x.reshape(-1))


@rule("unflatten", kind="view")
def _unflatten(x: Dual, dim: int, sizes: Sequence[int]) -> Dual:
    # not the method, which torch writes in Python: under a mode torch.compile cannot trace its super()
    return Dual(torch.unflatten(x.stacked, axis(x, dim), tuple(sizes)))


rule("narrow", kind="view")(lambda x, dim, start, length: Dual(x.stacked.narrow(axis(x, dim), start, length)))
rule("select", kind="view")(lambda x, dim, index: Dual(x.stacked.select(axis(x, dim), index)))
rule("unbind", kind="view")(lambda x, dim=0: tuple(Dual(piece) for piece in x.stacked.unbind(axis(x, dim))))


@rule("diagonal", kind="view")
def _diagonal(x: Dual, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Dual:
    return Dual(x.stacked.diagonal(offset, axis(x, dim1), axis(x, dim2)))


rule(torch.linalg.diagonal, kind="view")(
    lambda A, *, offset=0, dim1=-2, dim2=-1: _diagonal(A, offset, dim1, dim2)
)


@rule(torch.Tensor.unfold, kind="view")
def _unfold(x: Dual, dimension: int, size: int, step: int) -> Dual:
    if x.dim() == 0:
        return x.reshape(1).unfold(dimension, size, step)[0]
    return Dual(x.stacked.unfold(axis(x, dimension), size, step))


def _pieces(method: Callable[..., Any]) -> Callable[..., Any]:
    def split_rule(x: Dual, *args: Any, dim: int | None = None, **kwargs: Any) -> tuple[Dual, ...]:
        args = (*args, *kwargs.values())
        if dim is None:
            args, dim = (args[:1], args[1]) if len(args) > 1 else (args, 0)
        return tuple(Dual(piece) for piece in method(x.stacked, *args, dim=axis(x, dim)))

    return split_rule


for _name in ("chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split"):
    rule(_name, kind="view")(_pieces(getattr(torch.Tensor, _name)))


# -- copies -----------------------------------------------------------------------------------------------------------


@rule("clone", "positive", "alias_copy", torch.Tensor.__pos__, kind="view")
def _clone(x: Dual, *, memory_format: Any = None) -> Dual:
    # channels-last layouts describe four or five axes; the stack has one more, so the layout stays
    return Dual(x.stacked.clone())


@rule("contiguous", kind="view")
def _contiguous(x: Dual, memory_format: Any = None) -> Dual:
    # a contiguous primal is returned itself, like a tensor: writes through the result must reach it
    stacked = x.stacked
    return x if stacked.is_contiguous() or stacked[0].is_contiguous() else Dual(stacked.contiguous())


rule("detach", kind="view")(lambda x: x.detach())


@rule("flip", kind="view")
def _flip(x: Dual, *dims: Any, **kwargs: Any) -> Dual:
    dims = sizes_of(dims) if dims else sizes_of((kwargs["dims"],))
    return Dual(x.stacked.flip(axes(x, dims)))


@rule("roll", kind="view")
def _roll(x: Dual, shifts: Any, dims: Any = None) -> Dual:
    if dims is None or dims in ((), []):
        return x.reshape(-1).roll(shifts, 0).reshape(x.shape)
    if x.dim() == 0:
        raise IndexError(f"dims of roll of a 0-dimensional Dual must be left out, got {dims}.")
    return Dual(x.stacked.roll(shifts, axes(x, dims)))


@rule("repeat", kind="view")
def _repeat(x: Dual, *sizes: Any, **kwargs: Any) -> Dual:
    sizes = sizes_of(sizes) if sizes else tuple(kwargs["repeats"])
    if len(sizes) < x.dim():
        raise ValueError(f"repeats must have at least {x.dim()} entries, got {len(sizes)}.")
    return Dual(align(x.stacked, len(sizes)).repeat(1, *sizes))


@rule("tile", kind="view")
def _tile(x: Dual, *dims: Any, **kwargs: Any) -> Dual:
    dims = sizes_of(dims) if dims else tuple(kwargs["dims"])
    return x.repeat((*(1,) * (x.dim() - len(dims)), *dims))


@rule("repeat_interleave", kind="view")
def _repeat_interleave(x: Dual, repeats: Any, dim: int | None = None, **kwargs: Any) -> Dual:
    if dim is None:
        x, dim = x.reshape(-1), 0
    return Dual(torch.repeat_interleave(x.stacked, repeats, axis(x, dim), **kwargs))


def _on_last_axes(name: str) -> None:
    function = getattr(torch, name)

    @rule(name, kind="view")
    def on_last_axes(x: Dual, diagonal: int = 0) -> Dual:
        if x.dim() < 2:
            raise ValueError(f"input of {name} must have at least two axes, got {tuple(x.shape)}.")
        return Dual(function(x.stacked, diagonal))


for _name in ("tril", "triu"):
    _on_last_axes(_name)
for _name in ("diag", "diag_embed", "fliplr", "flipud", "rot90", "diagflat"):
    rule(_name, kind="view")(by_slices(getattr(torch, _name)))


@rule("pad", kind="view")
def _pad(x: Dual, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Dual:
    if mode != "constant":
        return per_slice(lambda part: F.pad(part, pad, mode), x)
    if len(pad) // 2 > x.dim():
        raise ValueError(f"pad must have at most {2 * x.dim()} entries, got {len(pad)}.")
    if not value:
        return Dual(F.pad(x.stacked, pad))
    primal, tangents = split(x)
    return join(F.pad(primal, pad, value=value), F.pad(tangents, pad))


# -- joins ------------------------------------------------------------------------------------------------------------


@rule("cat", "concat", "concatenate", kind="view")
def _cat(tensors: Sequence[Any], dim: int = 0) -> Dual:
    # torch ignores the shapeless empty tensor that key-value caches start from
    k = num_tangents(*tensors)
    kept = [t for t in tensors if tuple(t.shape) != (0,)] or list(tensors)[:1]
    joined = [t.stacked if is_dual(t) else lift(t, k).stacked for t in kept]
    if not -joined[0].dim() < dim < joined[0].dim() - 1:
        raise IndexError(f"dim must be in [{1 - joined[0].dim()}, {joined[0].dim() - 2}], got {dim}.")
    return Dual(torch.cat(joined, dim + 1 if dim >= 0 else dim))


@rule("stack", kind="view")
def _stack(tensors: Sequence[Any], dim: int = 0) -> Dual:
    joined = stacks(*tensors)
    if not -joined[0].dim() <= dim < joined[0].dim():
        raise IndexError(f"dim must be in [{-joined[0].dim()}, {joined[0].dim() - 1}], got {dim}.")
    return Dual(torch.stack(joined, dim + 1 if dim >= 0 else dim))


def _with_axes(x: Any, n: int) -> Any:
    return x.reshape(tuple(getattr(torch, f"atleast_{n}d")(primal_of(x).detach()).shape))


def _atleast(n: int) -> Callable[..., Any]:
    def atleast(*tensors: Any) -> Any:
        if len(tensors) == 1 and not isinstance(tensors[0], (list, tuple)):
            return _with_axes(tensors[0], n)
        return tuple(_with_axes(t, n) for t in sizes_of(tensors))

    return atleast


for _n in (1, 2, 3):
    rule(f"atleast_{_n}d", kind="view")(_atleast(_n))


def _join_along(n: int, dim: int) -> Callable[..., Any]:
    def joined(tensors: Sequence[Any]) -> Any:
        values = [_with_axes(t, n) for t in tensors]
        return torch.cat(values, 0 if n == 1 and values[0].dim() == 1 else dim)

    return joined


for _name, _n, _dim in (("hstack", 1, 1), ("vstack", 2, 0), ("dstack", 3, 2)):
    rule(_name, kind="view")(_join_along(_n, _dim))


# -- selection by a mask ----------------------------------------------------------------------------------------------


@rule("where", kind="view")
def _where(condition: Any, input: Any = None, other: Any = None) -> Any:
    condition = primal_of(condition)
    if input is None and other is None:
        return torch.where(condition)
    num_tangents(input, other)
    if not is_dual(input) and not is_dual(other):
        return torch.where(condition, input, other)
    input, other = settled(input, other)
    n = ndim_of(condition, input, other)
    (a, a_tan), (b, b_tan) = parts(input, n), parts(other, n)
    primal = torch.where(condition, a, b)
    tangents = torch.where(condition, 0.0 if a_tan is None else a_tan, 0.0 if b_tan is None else b_tan)
    return join(primal if primal.dim() == n + 1 else primal.unsqueeze(0), tangents)


rule(torch.Tensor.where, kind="view")(lambda self, condition, other: _where(condition, self, other))


@rule("masked_fill", kind="view")
def _masked_fill(x: Any, mask: torch.Tensor, value: Any) -> Dual:
    if is_dual(value) or not is_dual(x):
        if is_dual(value) and value.dim():
            raise ValueError(
                f"value of masked_fill must have no axes, got {tuple(value.shape)}: use torch.where."
            )
        return _where(mask, value, x)
    n = ndim_of(x, mask)
    stacked = align(x.stacked, n)
    if isinstance(value, (int, float)) and value == 0:
        return Dual(stacked.masked_fill(mask, 0))
    primal, tangents = stacked.split([1, x.num_tangents])
    return join(primal.masked_fill(mask, value), tangents.masked_fill(mask, 0))
