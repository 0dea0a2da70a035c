"""Rules of casts and of tensors made like a Dual: ``to``, ``float``, ``zeros_like``, ``new_zeros``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ..backends.errors import UnsupportedOperation
from .common import Dual, is_dual, lift, recast
from .registry import rule


@rule("to", kind="view")
def _to(x: Any, *args: Any, memory_format: Any = None, **kwargs: Any) -> Any:
    args = tuple(a.stacked if is_dual(a) else a for a in args)
    kwargs = {name: a.stacked if is_dual(a) else a for name, a in kwargs.items()}
    if not is_dual(x):
        return x.to(*args, **kwargs)
    return recast(x.stacked.to(*args, **kwargs))


@rule("type", kind="view")
def _type(x: Dual, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    if dtype is None:
        return x.primal.type()
    return recast(x.stacked.type(dtype))


@rule("type_as", kind="view")
def _type_as(x: Any, other: Any) -> Any:
    return x.to(device=other.device, dtype=other.dtype)


def _cast(name: str) -> Callable[..., Any]:
    def cast(x: Dual, *args: Any, memory_format: Any = None, **kwargs: Any) -> Any:
        return recast(getattr(x.stacked, name)(*args, **kwargs))

    return cast


for _name in "float double half bfloat16 cpu cuda xpu int long bool short byte cfloat cdouble chalf".split():
    rule(getattr(torch.Tensor, _name), kind="view")(_cast(_name))


def _created(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def create(x: Dual, *args: Any, **kwargs: Any) -> Any:
        if not is_dual(x) or any(is_dual(value) for value in (*args, *kwargs.values())):
            raise UnsupportedOperation(
                f"{function.__name__} would fill a tensor with the value of a Dual and drop its tangent: expand it to "
                "the shape instead."
            )
        kwargs = {n: value for n, value in kwargs.items() if value is not None and n != "memory_format"}
        result = function(x.stacked[0].detach(), *args, **kwargs)
        inexact = result.is_floating_point() or result.is_complex()
        return lift(result, x.num_tangents) if inexact else result

    return create


for _name in ("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"):
    rule(_name, kind="view")(_created(getattr(torch, _name)))
for _name in ("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"):
    rule(_name, kind="view")(_created(getattr(torch.Tensor, _name)))
rule("randint_like", kind="view")(
    lambda x, *args, **kwargs: torch.randint_like(x.primal.detach(), *args, **kwargs)
)
rule("stride", kind="view")(lambda x, dim=None: x.stride(dim))
rule("numel", kind="view")(lambda x: math.prod(x.shape))
