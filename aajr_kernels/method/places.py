"""Places of a model that an adversary may perturb: the protocol between the method and what hooks a model.

A perturbation of several places is one tensor: ``δ [B, P·N, C]``, the tokens of the first place before those of the
second. So a trajectory, its groups, masks and agents are those of a longer sequence, and the model with its places open
is a function of δ, whose clean input is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..dual import is_dual

__all__ = ["EMBEDDING", "At", "Opened", "changed", "entries_of", "first_of"]

#: places by name: ``"embedding"``, a module, a list of modules, the number of a layer; one or several
At = str | int | tuple[str | int, ...] | list[str | int]
EMBEDDING = "embedding"


class Opened(Protocol):
    """A model as a function of what is added at its P places, for one micro-batch.

    Attributes:
        x: zeros ``[B, P·N, C]`` in the dtype of the embeddings, the clean input; C is the largest width of a place.
        index: ``[B, P·N]``, the number of the place of every entry. As ``agents`` it gives every place a ball of its
            own (``scope="agent"``) and tangents of their own (``per_agent``).
        widths: of the places. Channels beyond them are ignored.
        units: ``[P]``, attached, the size of one unit of δ at every place.
    """

    x: Tensor
    index: Tensor
    widths: tuple[int, ...]
    units: Tensor

    def __call__(self, delta: Any, **inputs: Any) -> Any:
        """What the policy's forward returns with `delta` ``[n·B, P·N, C]``, a tensor or a Dual, added at its places."""
        ...

    def spread(self, values: Tensor) -> Tensor:
        """``[B, P·N]`` from values ``[B, N]`` of the tokens: the same at every place."""
        ...

    def attackable(self, mask: Tensor | None) -> Tensor | None:
        """A mask for ``ascend``, from that of the tokens ``[B, N]`` or None: without channels that no place has."""
        ...

    def of_rows(self, rows: Tensor) -> Opened:
        """The same for some rows of the batch, by index, in the same units."""
        ...


def entries_of(at: Any) -> tuple[str | int, ...]:
    """The names and numbers in `at`.

    Raises:
        TypeError: it is no name, no number and no sequence of these.
        ValueError: it is empty.
    """
    entries = tuple(at) if isinstance(at, (list, tuple)) else (at,)
    if not entries:
        raise ValueError(
            f"at must name at least one place, got an empty {type(at).__name__}: {EMBEDDING!r} is the default."
        )
    for entry in entries:
        if not isinstance(entry, (str, int)) or isinstance(entry, bool):
            raise TypeError(
                f"at must be {EMBEDDING!r}, the name of a module, the number of a layer or a sequence of these, got "
                f"{type(entry).__name__}."
            )
    return entries


def first_of(output: Any, name: str) -> Any:
    """The tensor, or Dual, that a module returned, by itself or first in a tuple.

    Raises:
        TypeError: it returned something else.
    """
    first = output[0] if isinstance(output, tuple) and output else output
    if is_dual(first) or (isinstance(first, Tensor) and first.is_floating_point()):
        return first
    got = f"a tuple that starts with {_kind(first)}" if first is not output else _kind(output)
    raise TypeError(
        f"{name} must return a floating point tensor, or a tuple that starts with one, got {got}: name a module inside "
        "it that does."
    )


def changed(output: Any, change: Callable[[Any], Any], name: str) -> Any:
    """`output` of a module with ``change`` of its first tensor in the place of that.

    Raises:
        TypeError: see :func:`first_of`.
    """
    value = change(first_of(output, name))
    if not isinstance(output, tuple):
        return value
    rest = output[1:]
    return type(output)(value, *rest) if hasattr(output, "_fields") else (value, *rest)


def _kind(value: Any) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
