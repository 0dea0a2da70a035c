"""Rules that read and write by index. Indices are plain; the same index acts on primal and tangents."""

from __future__ import annotations

from typing import Any

import torch

from ..backends.errors import UnsupportedOperation
from .common import Dual, axis, by_slices, is_dual, num_tangents, per_slice
from .registry import rule

_INTO_PLAIN = (
    "{name} writes a Dual into a plain tensor, which has no room for its tangent: allocate the buffer with "
    "x.new_zeros(...) of a Dual x, or use an out-of-place form."
)


def _is_array(item: Any) -> bool:
    return isinstance(item, (torch.Tensor, list, range)) or type(item).__module__ == "numpy"


def _scattered(index: tuple[Any, ...]) -> bool:
    """Whether array indices are separated by slices: torch then moves their axes to the front."""
    places = [i for i, item in enumerate(index) if _is_array(item)]
    return len(places) > 1 and places[-1] - places[0] + 1 != len(places)


@rule(torch.Tensor.__getitem__, kind="view")
def _getitem(x: Any, index: Any) -> Any:
    index = index if isinstance(index, tuple) else (index,)
    if any(is_dual(item) for item in index):
        raise TypeError("a Dual cannot be an index: indices are integers or booleans.")
    if not _scattered(index):
        return Dual(x.stacked[(slice(None), *index)])
    return per_slice(lambda part: part[index], x)


@rule(torch.Tensor.__setitem__, kind="view")
def _setitem(x: Any, index: Any, value: Any) -> None:
    if not is_dual(x):
        raise UnsupportedOperation(_INTO_PLAIN.format(name="x[index] = value"))
    index = index if isinstance(index, tuple) else (index,)
    k = num_tangents(x, value)
    if is_dual(value) and value.stacked is x.stacked:
        value = value.clone()
    for i in range(k + 1):
        x.stacked[i][index] = _slice(value, i)


@rule("index_select", kind="view")
def _index_select(x: Dual, dim: int, index: torch.Tensor) -> Dual:
    if x.dim() == 0:
        return per_slice(lambda part: part.index_select(dim, index), x)
    return Dual(x.stacked.index_select(axis(x, dim), index))


@rule("gather", kind="view")
def _gather(x: Dual, dim: int, index: torch.Tensor, *, sparse_grad: bool = False) -> Dual:
    if x.dim() == 0:
        return per_slice(lambda part: part.gather(dim, index), x)
    return Dual(x.stacked.gather(axis(x, dim), index.unsqueeze(0).expand(x.stacked.shape[0], *index.shape)))


for _name in ("take_along_dim", "take", "masked_select"):
    rule(_name, kind="view")(by_slices(getattr(torch, _name)))


def _slice(value: Any, i: int) -> Any:
    """Slice `i` of the stack of a Dual; a plain value is its own primal and has zero tangents."""
    if is_dual(value):
        return value.stacked[i]
    if i == 0:
        return value
    return torch.zeros_like(value) if isinstance(value, torch.Tensor) else 0


def _scatter_sum(x: Any, dim: int, index: torch.Tensor, src: Any = None, value: Any = None) -> Any:
    """``scatter`` with reduce="add", which has no derivative in torch, as ``scatter_add`` of a tensor."""
    src = value if src is None else src
    if not is_dual(src) and not isinstance(src, torch.Tensor):
        src = torch.full(index.shape, src, dtype=x.dtype, device=x.device)
    return torch.scatter_add(x, dim, index, src)


def _writes(name: str, place: int, *keywords: str) -> None:
    """Register a function linear in (x, source) jointly; the source is argument `place` after x or a keyword."""
    function = getattr(torch, name)

    def write(x: Any, *args: Any, **kwargs: Any) -> Dual:
        if name == "scatter" and kwargs.get("reduce") == "add":
            return _scatter_sum(x, *args, **{k: v for k, v in kwargs.items() if k != "reduce"})
        if kwargs.get("reduce") not in (None, "add", "sum"):
            raise UnsupportedOperation(
                f"{name} with reduce={kwargs['reduce']!r} has no rule for a Dual: use index_add or gather and reduce."
            )
        k = num_tangents(x, *args, *kwargs.values())
        key = next((word for word in keywords if word in kwargs), None)
        source = kwargs[key] if key else args[place]
        places = [x, source, *args, *kwargs.values()]
        if any(is_dual(value) and value is not source for value in places[2:]):
            raise TypeError(f"an index or mask of {name} must be a plain tensor, got a Dual.")

        def write_slice(i: int) -> torch.Tensor:
            if key:
                return function(_slice(x, i), *args, **{**kwargs, key: _slice(source, i)})
            return function(_slice(x, i), *args[:place], _slice(source, i), *args[place + 1 :], **kwargs)

        return Dual(torch.stack([write_slice(i) for i in range(k + 1)]))

    rule(name, kind="view")(write)


for _name, _place, _keywords in (
    ("scatter", 2, ("src", "value")),
    ("scatter_add", 2, ("src",)),
    ("index_add", 2, ("source",)),
    ("index_copy", 2, ("source",)),
    ("index_put", 1, ("values",)),
    ("index_fill", 2, ("value",)),
    ("masked_scatter", 1, ("source",)),
    ("slice_scatter", 0, ("src",)),
    ("select_scatter", 0, ("src",)),
    ("diagonal_scatter", 0, ("src",)),
):
    _writes(_name, _place, *_keywords)
