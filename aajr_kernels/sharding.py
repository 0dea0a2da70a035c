"""Tensors that are sharded over processes: how an op recognises them, and the table of ops on shards.

A DTensor is one tensor to its user and a shard in every process. Kernels must not take it for the shard. Ops that
have a meaning on shards ask :func:`is_dtensor` and leave the work to an entry of `OPS`, which
:mod:`aajr_kernels.integrations.distributed` fills; the others raise in ``backends.choice.select_backend``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["OPS", "detach_frozen", "frozen", "frozen_parameters", "is_dtensor", "is_fully_sharded"]

#: name of an op -> its function where a stack or a weight is a DTensor
OPS: dict[str, Callable[..., Any]] = {}


_frozen = False


@contextlib.contextmanager
def frozen_parameters() -> Iterator[None]:
    """Inside, ops compute no gradients of parameters, for speed: they are not needed."""
    global _frozen
    before, _frozen = _frozen, True
    try:
        yield
    finally:
        _frozen = before


def frozen() -> bool:
    """Whether :func:`frozen_parameters` is open."""
    return _frozen


def detach_frozen(*weights: torch.Tensor | None) -> tuple[Any, ...]:
    """`weights`, without gradient inside :func:`frozen_parameters` where they are leaves, which depend on no input."""
    if not _frozen:
        return weights
    return tuple(w.detach() if w is not None and w.is_leaf and w.requires_grad else w for w in weights)


def is_fully_sharded(module: object) -> bool:
    """Whether ``fully_shard`` was applied to this module, whose class is then a subclass of FSDPModule, too."""
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def is_dtensor(*tensors: torch.Tensor | None) -> bool:
    """Whether one of them is a DTensor."""
    for t in tensors:
        # the classes first: looking up an attribute that is not there costs more than small ops have to spare
        if t is not None and type(t) not in (torch.Tensor, torch.nn.Parameter) and hasattr(t, "placements"):
            return True
    return False
