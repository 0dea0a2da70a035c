"""The public rotary embedding: checks, backend choice, coverage."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ... import sharding
from ...dual import Dual
from ..checks import refuse_duals
from ..prepare import SHARDS, prepare
from . import reference
from .function import RotaryFunction

_T = TypeVar("_T", Tensor, Dual)


def rotary(
    x: _T, cos: Tensor, sin: Tensor, *, interleaved: bool = False, unsqueeze_dim: int | None = 1
) -> _T:
    """Rotary position embedding ``y = x∘cos + rot(x)∘sin`` of the first ``cos.shape[-1]`` features.

    ``rot(x) = [−x₂, x₁]`` on the two halves of those features (Llama), or on neighbouring pairs (GPT-J, Cohere).
    The map is linear, so primal and tangents are rotated alike; the other features pass unchanged.

    Args:
        x: ``[*batch, D]``, usually ``[B, H, N, D]``, Tensor or Dual; low dtypes are computed in float32.
        cos: plain tensor as Hugging Face builds it, usually ``[B, N, R]`` with R ≤ D even; after the unsqueeze it
            broadcasts to ``[*batch, R]``. Any floating dtype; may require a gradient.
        sin: likewise, shape of `cos`.
        interleaved: pairs are neighbours instead of halves.
        unsqueeze_dim: where `cos` and `sin` get the axis of the heads; None if they have it already.

    Returns:
        Shape and dtype of `x`, a Dual if `x` is one.

    Raises:
        UnsupportedOperation: `cos` or `sin` is a Dual.
        ValueError: R is odd or larger than D, or the tables do not broadcast to `x`.
    """
    return rotaries((x,), cos, sin, interleaved=interleaved, unsqueeze_dim=unsqueeze_dim)[0]


def rotaries(
    xs: Sequence[Any], cos: Tensor, sin: Tensor, *, interleaved: bool = False, unsqueeze_dim: int | None = 1
) -> list[Any]:
    """Several of :func:`rotary` by the same tables, such as queries and keys, as one step of autograd where they can.

    Args:
        xs: each as for :func:`rotary`.
        cos, sin, interleaved, unsqueeze_dim: as for :func:`rotary`.

    Returns:
        What :func:`rotary` gives for each. Its errors are the same.
    """
    refuse_duals("rotary", "write x * cos + rotate(x) * sin", cos=cos, sin=sin)
    if unsqueeze_dim is not None:
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    for x in xs:
        _check(x, cos, sin)
    # one form: Duals without and with tangents, or of two dtypes, have kernels of their own
    if len(xs) > 1 and (torch.compiler.is_compiling() or len(set(map(_form, xs))) > 1):
        return [rotaries((x,), cos, sin, interleaved=interleaved, unsqueeze_dim=None)[0] for x in xs]
    if not isinstance(xs[0], Dual):
        return [reference.rotate(x, cos, sin, interleaved, False) for x in xs]
    first, *more = [x.stacked for x in xs]
    one = functools.partial(rotary, interleaved=interleaved, unsqueeze_dim=None)
    backend, operands = prepare(
        "rotary",
        (first, cos, sin, *more),
        flops=lambda x, cos, sin, *more: 3.0 * sum([t.numel() for t in (x, *more)]),
        shards=lambda: [sharding.OPS["rotary"](one, x, cos, sin) for x in xs],
        kind=lambda x, cos, *_: ((x.shape[0], x.shape[-1], cos.shape[-1]), (interleaved,)),
    )
    if backend == SHARDS:
        return operands
    first, cos, sin, *more = operands
    results = RotaryFunction.apply(cos, sin, interleaved, backend, first, *more)
    return [Dual(y) for y in (results if more else (results,))]


def _form(x: Tensor | Dual) -> tuple[Any, ...]:
    """All that decides on the kernels of x; what is equal here may be turned together."""
    stacked = x.stacked if isinstance(x, Dual) else x
    return (
        isinstance(x, Dual),
        type(stacked),
        stacked.dtype,
        stacked.device,
        stacked.shape[0],
        stacked.shape[-1],
    )


def _check(x: Tensor | Dual, cos: Tensor, sin: Tensor) -> None:
    shape, table = x.shape, cos.shape
    size = table[-1]
    if table != sin.shape:
        raise ValueError(
            f"rotary: sin must have the shape of cos {tuple(cos.shape)}, got {tuple(sin.shape)}."
        )
    if size % 2 or not shape or size > shape[-1]:
        raise ValueError(
            f"rotary: cos must have an even last axis of at most the features of x {tuple(x.shape)}, got {size}."
        )
    aligned = zip(table[-2::-1], shape[-2::-1])
    if len(table) > len(shape) or False in [a == b or a == 1 for a, b in aligned]:
        raise ValueError(
            f"rotary: cos must broadcast to {(*shape[:-1], size)} for x of shape {tuple(shape)}, got {tuple(table)} "
            "after unsqueeze_dim: choose unsqueeze_dim so that its new axis is the one of the heads."
        )
