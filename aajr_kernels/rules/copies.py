"""Rules of rarer forms of views: splits by axis, ``as_strided``, copies of views, and single ATen operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..backends.errors import UnsupportedOperation
from ..torch_private import MASKED_INDEX, MASKED_INDEX_PUT
from .common import Dual, axis, is_dual, join, lift, num_tangents, per_slice, primal_of, split, stacks
from .registry import KINDS, RULES, functions_named, rule

# -- splits by axis ---------------------------------------------------------------------------------------------------


def _split_along(name: str, place: Callable[[int], int], least: int) -> None:
    @rule(name, kind="view")
    def split_rule(x: Dual, *args: Any, **kwargs: Any) -> Any:
        if x.dim() < least:
            raise ValueError(f"input of {name} must have at least {least} axes, got {x.dim()}.")
        dim = place(x.dim())
        (sections,) = (*args, *kwargs.values())
        if isinstance(sections, int) and (sections <= 0 or x.shape[dim] % sections):
            raise ValueError(f"{name} cannot divide an axis of {x.shape[dim]} into {sections} equal parts.")
        return x.tensor_split(sections, dim)


_split_along("hsplit", lambda n: 0 if n == 1 else 1, 1)
_split_along("vsplit", lambda n: 0, 2)
_split_along("dsplit", lambda n: 2, 3)

# -- as_strided -------------------------------------------------------------------------------------------------------


def _strides(x: Dual, size: Any, stride: Any, offset: int | None) -> tuple[Any, Any, Any]:
    """Size, stride and offset of the whole stack; `size` and `stride` are those of the primal, as ``x.stride()``."""
    size, stride = tuple(size), tuple(stride)
    if len(size) != len(stride):
        raise RuntimeError(f"size and stride of as_strided must be of one length, got {size} and {stride}.")
    if any(n < 0 for n in (*size, *stride)):
        raise RuntimeError(f"size and stride of as_strided must not be negative, got {size} and {stride}.")
    room = x.stacked.stride(0)
    inside = x.stacked.storage_offset() if offset is None else offset
    last = inside + sum((n - 1) * s for n, s in zip(size, stride)) if 0 not in size else 0
    within = sum((n - 1) * s for n, s in zip(x.shape, x.stacked.stride()[1:])) + x.stacked.storage_offset()
    if x.numel() and within >= room:
        raise UnsupportedOperation(
            f"as_strided of a Dual with strides {x.stride()} needs its primal in one piece: call contiguous() first."
        )
    if last >= max(room, 1) or inside < 0:
        raise RuntimeError(
            f"as_strided of size {size}, stride {stride} and offset {inside} leaves the {room} values of the primal."
        )
    return (x.stacked.shape[0], *size), (room, *stride), inside


@rule("as_strided", kind="view")
def _as_strided(x: Dual, size: Any, stride: Any, storage_offset: int | None = None) -> Dual:
    return Dual(x.stacked.as_strided(*_strides(x, size, stride, storage_offset)))


@rule("as_strided_scatter", kind="view")
def _as_strided_scatter(x: Any, src: Any, size: Any, stride: Any, storage_offset: int | None = None) -> Dual:
    """Written by position: torch's own gradient of it is wrong for a part of a larger storage."""
    x, src = (Dual(stack) for stack in stacks(x, src))
    if tuple(src.shape) != tuple(size):
        raise RuntimeError(
            f"src of as_strided_scatter must be of shape {tuple(size)}, got {tuple(src.shape)}."
        )
    if not x.stacked.is_contiguous():
        raise UnsupportedOperation(
            "as_strided_scatter of a Dual takes a contiguous one: call contiguous() first."
        )
    offset = storage_offset or 0
    _strides(Dual(x.stacked.detach().clone()), size, stride, offset)  # raises for elements beyond the primal
    places = torch.arange(max(x.numel(), 1), device=x.device).as_strided(tuple(size), tuple(stride), offset)
    count = len(x.stacked)
    flat = x.stacked.reshape(count, -1)
    written = flat.index_copy(1, places.reshape(-1), src.stacked.clone().reshape(count, -1))
    return Dual(written.reshape(x.stacked.shape))


# -- copies of views --------------------------------------------------------------------------------------------------


def _copy_of(view: Callable[..., Any]) -> Callable[..., Any]:
    def copied(*args: Any, **kwargs: Any) -> Any:
        result = view(*args, **kwargs)
        if is_dual(result):
            return Dual(result.stacked.clone())
        return type(result)(Dual(piece.stacked.clone()) for piece in result)

    return copied


#: copies whose names differ from their views'
_VIEWS = {"_conj_copy": "conj", "_neg_view_copy": "neg"}


def register() -> None:
    """Give the ``_copy`` form of every view with a rule its own; called after the views are registered."""
    for name in dir(torch):
        if not name.endswith("_copy") or name == "_sparse_broadcast_to_copy":
            continue
        view = next(iter(functions_named(_VIEWS.get(name, name.removesuffix("_copy")))), None)
        if view in RULES and not any(function in RULES for function in functions_named(name)):
            rule(name, kind=KINDS[view])(_copy_of(RULES[view]))


@rule(torch.ops.aten.slice, torch.ops.aten.slice.Tensor, torch.slice_copy, kind="view")
def _slice(x: Dual, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Dual:
    index = (slice(None),) * axis(x, dim)
    return Dual(x.stacked[(*index, slice(start, end, step))])


@rule("constant_pad_nd", kind="view")
def _constant_pad(x: Any, pad: Any, value: Any = 0) -> Any:
    if isinstance(value, complex):  # which the wrapper refuses
        primal, tangents = split(x)
        return join(torch.constant_pad_nd(primal, pad, value), torch.constant_pad_nd(tangents, pad, 0))
    return F.pad(x, tuple(pad), "constant", value)


@rule(torch.Tensor.fill_diagonal_, kind="view")
def _fill_diagonal(x: Dual, fill_value: Any, wrap: bool = False) -> Dual:
    with torch.no_grad():
        mask = torch.zeros_like(x.stacked[0], dtype=torch.bool).fill_diagonal_(True, wrap)
    return x.masked_fill_(mask, fill_value)


# -- values taken apart -----------------------------------------------------------------------------------------------


def _power_of_two(exponent: Any, like: Any) -> Any:
    # torch's own gradient of ldexp takes integer powers, in which 2⁻¹ is 0
    return torch.exp2(exponent.to(like.dtype))


@rule("ldexp")
def _ldexp(x: Any, other: Any) -> Any:
    # torch saves no operand, so both may be written afterwards
    x, other = x.clone(), other.clone()
    return x * _power_of_two(other, x if x.is_floating_point() or x.is_complex() else other)


@rule("frexp")
def _frexp(x: Dual) -> Any:
    """Mantissa x 2⁻ᵉ; the exponent e is an integer."""
    primal, tangents = split(x)
    mantissa, exponent = torch.frexp(primal)
    result: Any = (join(mantissa, tangents * _power_of_two(-exponent, tangents)), exponent[0])
    return torch.return_types.frexp(result)


@rule(MASKED_INDEX)
def _masked_index(x: Dual, mask: torch.Tensor, indices: Any, fill: Any) -> Dual:
    fills = [fill] + [0] * x.num_tangents
    return Dual(torch.stack([MASKED_INDEX(p, mask, indices, f) for p, f in zip(x.stacked, fills)]))


@rule(MASKED_INDEX_PUT)
def _masked_index_put(x: Any, mask: torch.Tensor, indices: Any, values: Any) -> Dual:
    pairs = zip(*(stack.unbind(0) for stack in stacks(x, values)))
    return Dual(torch.stack([MASKED_INDEX_PUT(p, mask, indices, v) for p, v in pairs]))


# -- ATen operators that Python reaches ---------------------------------------------------------------------------


def _aten(name: str) -> tuple[Callable[..., Any], ...]:
    packet = getattr(torch.ops.aten, name)
    return packet, packet.default


@rule(*_aten("_softmax_backward_data"))
def _softmax_backward(grad_output: Any, output: Any, dim: int, input_dtype: torch.dtype) -> Any:
    weighted = grad_output * output
    return (weighted - output * weighted.sum(dim, keepdim=True)).to(input_dtype)


@rule(*_aten("max_pool2d_with_indices_backward"))
def _max_pool_backward(grad_output: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Linear in `grad_output`; the input only gives the positions of the maxima."""
    backward = torch.ops.aten.max_pool2d_with_indices_backward.default
    if not is_dual(grad_output):
        return lift(backward(grad_output, primal_of(x), *args, **kwargs), num_tangents(x))
    return per_slice(lambda part: backward(part, primal_of(x), *args, **kwargs), grad_output)
