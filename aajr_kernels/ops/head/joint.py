"""Forward and backward of one block of tokens after the other, whose logits are kept in between."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .reference import Problem

_P = TypeVar("_P", bound=Problem)
Optional = Tensor | None

#: from q ``[K, t]`` of the tokens of a slice, or of these indices, to the cotangents of q and of nll
Expected = Callable[[Tensor, slice | Tensor], tuple[Tensor, Optional]]
#: results of the forward: q, nll and statistics; of the joint form also the cotangents of q, nll, h, weight and bias
Forward = tuple[Tensor, Optional, Tensor]
Joint = tuple[Forward, tuple[Optional, ...]]


def blockwise(
    p: _P,
    step: int,
    expected: Expected,
    forward: Callable[[_P], Forward],
    backward: Callable[[_P, slice, Tensor, Optional, Optional], None],
) -> tuple[Forward, list[Optional]]:
    """Both passes over blocks of `step` tokens.

    Args:
        backward: takes a block, its tokens, the statistics and the cotangents of q and nll, and keeps the results.

    Returns:
        Results of the forward, and the cotangents of q and nll, of all tokens.
    """
    results: list[Forward] = []
    cotangents: list[tuple[Optional, Optional]] = []
    for start in range(0, p.tokens, step):
        rows = slice(start, min(start + step, p.tokens))
        block = p.block(rows)
        results.append(forward(block))
        cotangents.append(expected(results[-1][0], rows))
        backward(block, rows, results[-1][2], *cotangents[-1])
    forwards: Any = tuple(map(_joined, zip(*results)))
    return forwards, [_joined(parts) for parts in zip(*cotangents)]


def _joined(parts: Iterable[Optional]) -> Optional:
    """The blocks along the tokens, None if they are."""
    present = [part for part in parts if part is not None]
    return torch.cat(present, -1) if present else None
