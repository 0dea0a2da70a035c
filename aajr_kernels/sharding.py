"""Tensors that are spread over processes: how an op recognises them, and who runs it on them.

A DTensor is one tensor to its user and a shard in every process. Kernels must not take it for the shard. Ops that
have a meaning on shards ask :func:`spread` and leave the work to an entry of `OPS`, which
:mod:`aajr_kernels.integrations.distributed` fills; the others raise in ``runtime.select_backend``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["OPS", "spread"]

#: name of an op -> what runs it where a stack or a weight is spread
OPS: dict[str, Callable[..., Any]] = {}


def spread(*tensors: torch.Tensor | None) -> bool:
    """Whether one of them is a DTensor."""
    for t in tensors:
        # the classes first: looking up an attribute that is not there costs more than small ops have to spare
        if t is not None and type(t) not in (torch.Tensor, torch.nn.Parameter) and hasattr(t, "placements"):
            return True
    return False
