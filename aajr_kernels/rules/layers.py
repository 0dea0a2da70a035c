"""Rules of embedding and dropout, which are linear, and of the activation functions."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..backends.errors import UnsupportedOperation
from ..ops import activation
from ..torch_private import NN
from .common import Dual, as_now, elementwise, is_dual, join, once_rounded, per_slice, primal_of, split
from .registry import KINDS, RULES, rule

# -- embedding --------------------------------------------------------------------------------------------------------


def _refuse_dual_indices(name: str, indices: Any) -> None:
    if is_dual(indices):
        raise TypeError(f"input of {name} must be integer indices, got a Dual: only the weight may be one.")


@rule(F.embedding)
def _embedding(
    indices: torch.Tensor,
    weight: Dual,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Dual:
    if max_norm is not None:
        raise UnsupportedOperation(
            "embedding(max_norm=...) rewrites its table and cannot take a Dual weight: drop it."
        )
    _refuse_dual_indices("embedding", indices)
    # row by row of the stack: the gradient of padding_idx is dropped in each, as torch does
    return per_slice(
        lambda w: F.embedding(indices, w, padding_idx, None, norm_type, scale_grad_by_freq), weight
    )


rule(torch.embedding)(
    lambda weight, indices, padding_idx=-1, scale_grad_by_freq=False, sparse=False: _embedding(
        indices, weight, padding_idx if padding_idx >= 0 else None, scale_grad_by_freq=scale_grad_by_freq
    )
)


@rule(F.embedding_bag)
def _embedding_bag(
    indices: torch.Tensor,
    weight: Any,
    offsets: torch.Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    if max_norm is not None or mode == "max" or is_dual(per_sample_weights) or not is_dual(weight):
        raise UnsupportedOperation(
            "embedding_bag takes a Dual weight only with mode 'sum' or 'mean': use embedding and a reduction."
        )
    _refuse_dual_indices("embedding_bag", indices)

    def bag(w: torch.Tensor) -> torch.Tensor:
        return F.embedding_bag(
            indices, w, offsets, None, norm_type, scale_grad_by_freq, mode, False, per_sample_weights,
            include_last_offset, padding_idx,
        )  # fmt: skip

    return per_slice(bag, weight)


# -- dropout: one mask for primal and tangents ------------------------------------------------------------------------


def _masked(draw: Callable[..., torch.Tensor], x: Dual, p: float, training: bool) -> Dual:
    """`x` times the mask (zeros and 1/(1-p)) that `draw` makes of ones, with the generator torch itself would use."""
    if not training:
        return x
    with torch.no_grad():
        mask = draw(torch.ones_like(x.stacked[0]), p, True)
    return Dual(x.stacked * mask)


@rule(F.dropout)
def _dropout(x: Dual, p: float = 0.5, training: bool = True) -> Dual:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    return _masked(torch.dropout, x, p, training)


rule(torch.dropout)(lambda x, p, train: _dropout(x, p, training=train))
rule(torch.feature_dropout)(lambda x, p, train: _masked(torch.feature_dropout, x, p, train))


@rule(torch.native_dropout)
def _native_dropout(x: Dual, p: float, train: bool | None) -> tuple[Dual, torch.Tensor]:
    if train is False:
        return x, torch.ones_like(x.primal, dtype=torch.bool)
    with torch.no_grad():
        scaled, mask = torch.native_dropout(torch.ones_like(x.stacked[0]), p, True)
    return Dual(x.stacked * scaled), mask


_ALPHA = 1.7580993408473766  # the negative saturation of SELU


def _alpha_masked(draw: Callable[..., torch.Tensor], x: Dual, p: float, training: bool) -> Dual:
    """Alpha dropout is affine, a·m∘x + b(m): the image of zeros gives the mask m; the tangent gets only a·m."""
    if not training or p == 0:
        return x
    if p == 1:
        return Dual(x.stacked * 0)
    with torch.no_grad():
        offset = draw(torch.zeros_like(x.stacked[0]), p, True)
        kept = (offset > 0).to(offset.dtype) * ((_ALPHA**2 * p + 1) * (1 - p)) ** -0.5
    primal, tangents = split(x)
    return join(primal * kept + offset, tangents * kept)


for _draw in (torch.alpha_dropout, torch.feature_alpha_dropout):
    rule(_draw)(lambda x, p, train, _draw=_draw: _alpha_masked(_draw, x, p, train))

# -- activations with a fused op --------------------------------------------------------------------------------------

rule("gelu", kind="op")(lambda x, approximate="none": activation.gelu(x, approximate))
for _name in ("silu", "relu", "tanh", "sigmoid"):
    rule(_name, kind="op")(lambda x, _name=_name: getattr(activation, _name)(x))

# -- activations by their derivative ----------------------------------------------------------------------------------


def _elu_slope(
    x: torch.Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0
) -> torch.Tensor:
    negative = alpha * scale * input_scale * (x.clamp_max(0) * input_scale).exp()
    return torch.where(x > 0, torch.full_like(x, scale), negative)


def _softplus_slope(x: torch.Tensor, beta: float = 1.0, threshold: float = 20.0) -> torch.Tensor:
    return torch.where(x * beta > threshold, torch.ones_like(x), (x * beta).sigmoid())


def _mish_slope(x: torch.Tensor) -> torch.Tensor:
    t = F.softplus(x).tanh()
    return t + x * (1 - t * t) * x.sigmoid()


def _hardswish_slope(x: torch.Tensor) -> torch.Tensor:
    middle = torch.where(x < 3, x / 3 + 0.5, torch.ones_like(x))
    return torch.where(x <= -3, torch.zeros_like(x), middle)


def _between(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return ((x > low) & (x < high)).to(x.dtype)


def _hardtanh_slope(x: torch.Tensor, min_val: float = -1.0, max_val: float = 1.0) -> torch.Tensor:
    if min_val > max_val:
        raise ValueError(f"min_val of hardtanh must not be above max_val ({max_val}), got {min_val}.")
    return _between(x, min_val, max_val)


_SELU_SCALE = 1.0507009873554805
_SLOPES: dict[str, Callable[..., torch.Tensor]] = {
    "celu": lambda x, alpha=1.0: _elu_slope(x, alpha, 1.0, 1.0 / alpha),
    "elu": _elu_slope,
    "hardshrink": lambda x, lambd=0.5: (x.abs() > lambd).to(x.dtype),
    "hardsigmoid": lambda x: _between(x, -3, 3) / 6,
    "hardswish": _hardswish_slope,
    "hardtanh": _hardtanh_slope,
    "leaky_relu": lambda x, negative_slope=0.01: torch.where(x > 0, torch.ones_like(x), negative_slope),
    "mish": _mish_slope,
    "relu6": lambda x: _between(x, 0, 6),
    "selu": lambda x: _elu_slope(x, _ALPHA / _SELU_SCALE, _SELU_SCALE),
    "softplus": _softplus_slope,
    "softshrink": lambda x, lambd=0.5: (x.abs() > lambd).to(x.dtype),
    "softsign": lambda x: (1 + x.abs()).square().reciprocal(),
    "threshold": lambda x, threshold, value: (x > threshold).to(x.dtype),
}
assert math.isclose(_ALPHA, _SELU_SCALE * 1.6732632423543772, rel_tol=1e-12)


def _activation(
    function: Callable[..., torch.Tensor], slope: Callable[..., torch.Tensor]
) -> Callable[..., Dual]:
    def act(x: Dual, *args: Any, **kwargs: Any) -> Dual:
        return elementwise(lambda p: function(p, *args, **kwargs), lambda out, p: slope(p, *args, **kwargs))(
            x
        )

    return act


for _name, _slope in _SLOPES.items():
    # the builtin behind the wrapper has arguments that the wrapper lacks (elu: scale, input_scale)
    _plain = getattr(NN, _name, None) or getattr(torch, _name, None) or getattr(F, _name)
    rule(_name)(_activation(_plain, _slope))


rule("tanhshrink")(
    lambda x: elementwise(torch.nn.functional.tanhshrink, lambda out, p: p.tanh().square())(as_now(x))
)


@rule("glu", kind="op")
@once_rounded
def _glu(x: Any, dim: int = -1) -> Any:
    if x.shape[dim] % 2:
        raise ValueError(f"input of glu must have an even size along dim {dim}, got {tuple(x.shape)}.")
    value, gate = x.chunk(2, dim)
    return value * gate.sigmoid()


@rule("prelu", kind="op")
def _prelu(x: Any, weight: Any) -> Any:
    channels = x.shape[1] if x.dim() > 1 else 1
    if weight.dim() > 1 or weight.numel() not in (1, channels):
        raise ValueError(
            f"weight of prelu must be one number or one per channel ({channels}), got {tuple(weight.shape)}."
        )
    if weight.numel() != 1:
        weight = weight.reshape(-1, *(1,) * (x.dim() - 2))
    else:
        weight = weight.reshape(())
    return torch.where(primal_of(x) > 0, x, x * weight)


@rule(F.rrelu, torch.rrelu)
def _rrelu(
    x: Dual,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    generator: torch.Generator | None = None,
) -> Dual:
    """The slopes are drawn once, where the primal is not positive as torch does, and shared with the tangents."""
    if lower > upper:
        raise RuntimeError(f"lower of rrelu must be at most upper, got {lower} and {upper}.")
    primal = x.stacked[0].detach()
    if training:
        slopes = torch.empty_like(primal, memory_format=torch.contiguous_format)
        torch.ops.aten.rrelu_with_noise(primal, slopes, lower, upper, True, generator)
    else:
        slopes = torch.full_like(primal, (lower + upper) / 2).masked_fill_(primal > 0, 1.0)
    return Dual(x.stacked * slopes)


# -- the argument ``inplace`` -----------------------------------------------------------------------------------------


def _with_inplace(function: Callable[..., Any]) -> None:
    """Let the rule of a function of ``torch.nn.functional`` take its argument ``inplace``, by position too."""
    outside, kind = RULES[function], KINDS[function]
    place = list(inspect.signature(function).parameters).index("inplace") - 1

    def either(x: Dual, *args: Any, inplace: bool = False, **kwargs: Any) -> Dual:
        if len(args) > place:
            args, inplace = args[:place], args[place]
        if not inplace:
            return outside(x, *args, **kwargs)
        # from a clone, because the backward needs the values that are overwritten
        x.stacked.copy_(outside(Dual(x.stacked.clone()), *args, **kwargs).stacked)
        return x

    rule(function, kind=kind)(either)


_INPLACE = """
celu dropout elu hardsigmoid hardswish hardtanh leaky_relu mish relu relu6 rrelu selu silu threshold
""".split()
for _name in _INPLACE:
    _with_inplace(getattr(F, _name))
