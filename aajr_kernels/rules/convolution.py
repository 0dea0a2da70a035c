"""Rules of convolution, pooling, resampling and patch extraction.

All but max pooling are linear in their input: the stack is folded into the batch and torch's kernel runs once. A
convolution is bilinear, so a Dual weight adds one term per tangent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..autocast import autocasting
from ..backends.errors import UnsupportedOperation
from ..torch_private import NN, UPSAMPLE_BILINEAR_AA
from .common import Dual, is_dual, join, num_tangents, once_rounded_sum, per_slice, primal_of
from .registry import rule

# -- folding ----------------------------------------------------------------------------------------------------------


def folded(
    function: Callable[[torch.Tensor], torch.Tensor], stacked: torch.Tensor, unbatched: bool
) -> torch.Tensor:
    """A `function` of batches, linear in its input, applied to a stack of (un)batched inputs in one call."""
    if unbatched:
        return function(stacked)
    out = function(stacked.flatten(0, 1))
    return out.unflatten(0, stacked.shape[:2])


def _linear_in_input(name: str, spatial: int | None, *functions: Callable[..., Any] | None) -> None:
    """A function linear in its first argument ``[B, C, *spatial]``; `spatial` None: one that is never unbatched."""
    for function in filter(None, functions):

        def apply(x: Any, *args: Any, _function: Callable[..., Any] = function, **kwargs: Any) -> Dual:
            if not is_dual(x):
                raise UnsupportedOperation(
                    f"{name} has no derivative rule for a Dual option, only for a Dual input."
                )
            unbatched = spatial is not None and x.dim() == spatial + 1
            return Dual(folded(lambda part: _function(part, *args, **kwargs), x.stacked, unbatched))

        rule(function)(apply)


# -- convolution ------------------------------------------------------------------------------------------------------


def _convolution(function: Callable[..., torch.Tensor], spatial: int) -> Callable[..., Any]:
    """The bias goes into torch's kernel with the primals, which adds it before rounding."""

    def convolve(x: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Any:
        k = num_tangents(x, weight, bias)
        if bias is not None and bias.dtype != x.dtype and not autocasting(x.device.type):
            raise TypeError(
                f"bias of a convolution must have the dtype of its input ({x.dtype}), got {bias.dtype}."
            )
        unbatched = x.dim() == spatial + 1
        x0, w0 = primal_of(x), primal_of(weight)
        primal = function(x0, w0, primal_of(bias), *args, **kwargs)
        if k == 0:
            return Dual(primal.unsqueeze(0))

        def product(stack: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return folded(lambda part: function(part, w, None, *args, **kwargs), stack, unbatched)

        terms = []
        if is_dual(x):
            terms.append(product(x.tangents, w0))
        if is_dual(weight):
            terms.append(torch.cat([product(x0.unsqueeze(0), part) for part in weight.tangents.unbind(0)]))
        if is_dual(bias):
            terms.append(bias.tangents.reshape(bias.num_tangents, -1, *(1,) * spatial))
            if not unbatched:
                terms[-1] = terms[-1].unsqueeze(1)
        return join(primal.unsqueeze(0), once_rounded_sum(terms, primal.dtype))

    return convolve


for _n in (1, 2, 3):
    for _name in (f"conv{_n}d", f"conv_transpose{_n}d"):
        rule(_name)(_convolution(getattr(torch, _name), _n))

# -- pooling ----------------------------------------------------------------------------------------------------------

for _n in (1, 2, 3):
    for _name in (f"avg_pool{_n}d", f"adaptive_avg_pool{_n}d"):
        _functions = {getattr(F, _name), getattr(torch, _name, None), getattr(NN, _name, None)}
        _linear_in_input(_name, _n, *_functions)


def _max_pool(name: str, spatial: int) -> None:
    """The tangent is read where the primal has its maximum."""
    pool = getattr(F, name)

    def with_indices(x: Dual, *args: Any, **kwargs: Any) -> tuple[Dual, torch.Tensor]:
        kwargs["return_indices"] = True
        with torch.no_grad():
            indices = pool(x.stacked[0], *args, **kwargs)[1]
        values = x.flatten(-spatial).gather(-1, indices.flatten(-spatial))
        return values.unflatten(-1, indices.shape[-spatial:]), indices

    def values(x: Dual, *args: Any, return_indices: bool = False, **kwargs: Any) -> Any:
        result = with_indices(x, *args, **kwargs)
        return result if return_indices else result[0]

    rule(pool)(values)
    rule(getattr(F, f"{name}_with_indices"))(with_indices)
    builtin = getattr(torch, name, None)
    if builtin is not None and not name.startswith("adaptive"):
        rule(builtin)(values)
    elif builtin is not None:
        rule(builtin)(with_indices)


for _n in (1, 2, 3):
    _max_pool(f"max_pool{_n}d", _n)
    _max_pool(f"adaptive_max_pool{_n}d", _n)
for _n in (2, 3):
    _max_pool(f"fractional_max_pool{_n}d", _n)


def _max_unpool(spatial: int) -> Callable[..., Any]:
    function = getattr(NN, f"max_unpool{spatial}d")

    def unpool(x: Dual, indices: torch.Tensor, *args: Any, **kwargs: Any) -> Dual:
        unbatched = x.dim() == spatial + 1
        many = indices.expand(x.stacked.shape[0], *indices.shape)
        many = many.contiguous() if unbatched else many.flatten(0, 1)
        return Dual(folded(lambda part: function(part, many, *args, **kwargs), x.stacked, unbatched))

    return unpool


for _n in (2, 3):
    rule(getattr(NN, f"max_unpool{_n}d"))(_max_unpool(_n))

# -- resampling and patches -------------------------------------------------------------------------------------------

_linear_in_input("interpolate", None, F.interpolate, F.upsample)
_linear_in_input("_upsample_bilinear2d_aa", None, *UPSAMPLE_BILINEAR_AA)
_linear_in_input("channel_shuffle", None, torch.channel_shuffle, torch.native_channel_shuffle)
_linear_in_input("unfold", 2, F.unfold, NN.im2col)
_linear_in_input("fold", 1, F.fold, NN.col2im)
rule(F.affine_grid)(
    lambda theta, *args, **kwargs: per_slice(lambda t: F.affine_grid(t, *args, **kwargs), theta)
)


@rule(F.grid_sample)
def _grid_sample(x: Any, grid: Any, *args: Any, **kwargs: Any) -> Dual:
    if is_dual(grid) or not is_dual(x):
        raise UnsupportedOperation(
            "grid_sample has a derivative rule only for a Dual input: pass a plain grid."
        )
    return per_slice(lambda part: F.grid_sample(part, grid, *args, **kwargs), x)


def _rearranged(name: str) -> Callable[..., Dual]:
    def rearrange(x: Dual, *args: int, **kwargs: int) -> Dual:
        if x.dim() < 3:
            raise ValueError(f"input of {name} must be [..., C, H, W], got {tuple(x.shape)}.")
        return Dual(getattr(torch, name)(x.stacked, *args, **kwargs))

    return rearrange


for _name in ("pixel_shuffle", "pixel_unshuffle"):
    rule(_name)(_rearranged(_name))
