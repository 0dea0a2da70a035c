"""Rules of losses and distances.

The Python wrappers of ``torch.nn.functional`` run again without their gate; these are the builtins that they call,
whose reduction is 0 (none), 1 (mean) or 2 (sum).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..backends.errors import UnsupportedOperation
from ..torch_private import NN
from .common import Dual, any_low, elementwise, is_dual, once_rounded, per_slice, primal_of
from .registry import rule


def _reduced(values: Any, reduction: int) -> Any:
    if reduction == 0:
        return values
    return values.mean() if reduction == 1 else values.sum()


# -- cross-entropy ----------------------------------------------------------------------------------------------------


def _class_axis(logits: Any) -> int:
    return 0 if logits.dim() == 1 else 1


def _plain_weight(name: str, weight: Any, target: Any = None) -> None:
    if is_dual(weight) or (is_dual(target) and name == "nll_loss"):
        raise UnsupportedOperation(
            f"{name} has no derivative rule for a Dual weight or class index: pass it plain."
        )


@rule("nll_loss_nd")
def _nll_loss(
    log_p: Dual,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
) -> Dual:
    """Linear in the log-probabilities: the same pick for primal and tangents."""
    _plain_weight("nll_loss", weight, target)
    return per_slice(lambda part: NN.nll_loss_nd(part, target, weight, reduction, ignore_index), log_p)


@once_rounded
def _smoothed(
    logits: Any,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: int,
    ignore_index: int,
    smoothing: float,
) -> Any:
    """Class indices with label smoothing ε: (1−ε) of the picked class plus ε/C of all, ignored positions left out."""
    axis = _class_axis(logits)
    log_p: Any = torch.log_softmax(logits, axis)
    picked = _nll_loss(log_p, target, weight, reduction, ignore_index)
    classes = log_p.shape[axis]
    channel = None if weight is None else weight.reshape(-1, *(1,) * (log_p.dim() - 1 - axis))
    spread = -(log_p if channel is None else log_p * channel).sum(axis)
    counted = target != ignore_index
    spread = spread.masked_fill(~counted, 0.0)
    if reduction == 1:
        weights = counted if weight is None else weight[target.masked_fill(~counted, 0)] * counted
        spread = spread.sum() / weights.sum().to(log_p.dtype)
    else:
        spread = _reduced(spread, reduction)
    return picked * (1 - smoothing) + spread * (smoothing / classes)


@rule("cross_entropy_loss", kind="op")
def _cross_entropy(
    logits: Any,
    target: Any,
    weight: torch.Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Any:
    _plain_weight("cross_entropy", weight)
    if is_dual(target) or target.is_floating_point():
        return _against_probabilities(logits, target, weight, reduction, label_smoothing)
    if not is_dual(logits):
        return NN.cross_entropy_loss(logits, target, weight, reduction, ignore_index, label_smoothing)
    if label_smoothing:
        return _smoothed(logits, target, weight, reduction, ignore_index, label_smoothing)
    log_p = torch.log_softmax(logits, _class_axis(logits))
    return _nll_loss(log_p, target, weight, reduction, ignore_index)


@once_rounded
def _against_probabilities(
    logits: Any, target: Any, weight: torch.Tensor | None, reduction: int, smoothing: float
) -> Any:
    """Torch's mean is over the batch only: all axes but that of classes."""
    axis = _class_axis(logits)
    if smoothing:
        target = target * (1 - smoothing) + smoothing / logits.shape[axis]
    if weight is not None:
        target = target * weight.reshape(-1, *(1,) * (logits.dim() - 1 - axis))
    return _reduced(-(torch.log_softmax(logits, axis) * target).sum(axis), reduction)


# -- pointwise losses -------------------------------------------------------------------------------------------------


def _pointwise(name: str, function: Callable[..., Any], namespace: Any = NN) -> None:
    """A loss ``function(input, target, *options)`` whose builtin takes (input, target, reduction, *options)."""

    def loss(input: Any, target: Any, reduction: int = 1, *options: Any, **named: Any) -> Any:
        return _reduced(function(input, target, *options, **named), reduction)

    rule(getattr(namespace, name), kind="op")(once_rounded(loss))


def _huber(input: Any, target: Any, delta: float = 1.0) -> Any:
    if delta <= 0:
        raise ValueError(f"delta of huber_loss must be positive, got {delta}.")
    error = input - target
    size = error.abs()
    inner = primal_of(size) <= delta
    return torch.where(inner, 0.5 * error * error, delta * (size - 0.5 * delta))


def _smooth_l1(input: Any, target: Any, beta: float = 1.0) -> Any:
    if beta < 0:
        raise ValueError(f"beta of smooth_l1_loss must not be negative, got {beta}.")
    if beta == 0:
        return (input - target).abs()
    error = input - target
    size = error.abs()
    inner = primal_of(size) < beta
    return torch.where(inner, error * error * (0.5 / beta), size - 0.5 * beta)


def _kl_div(input: Any, target: Any, log_target: bool = False) -> Any:
    if log_target:
        return target.exp() * (target - input)
    return torch.xlogy(target, target) - target * input


_pointwise("mse_loss", lambda input, target: (input - target).square())
_pointwise("l1_loss", lambda input, target: (input - target).abs())
_pointwise("huber_loss", _huber)
_pointwise("smooth_l1_loss", _smooth_l1)
_pointwise("soft_margin_loss", lambda input, target: F.softplus(-(input * target)))
_pointwise("kl_div", _kl_div, torch)

# clamped as torch clamps: logarithms at -100, the denominator of the derivative at 1e-12
_bce = elementwise(
    lambda p, t: NN.binary_cross_entropy(*torch.broadcast_tensors(p, t), None, 0),
    lambda out, p, t: (p - t) / (p * (1 - p)).clamp_min(1e-12),
    lambda out, p, t: (-p).log1p().clamp_min(-100) - p.log().clamp_min(-100),
)


@rule(NN.binary_cross_entropy, kind="op")
@once_rounded
def _binary_cross_entropy(input: Any, target: Any, weight: Any = None, reduction: int = 1) -> Any:
    values = _bce(input, target)
    return _reduced(values if weight is None else values * weight, reduction)


@rule(torch.binary_cross_entropy_with_logits, kind="op")
@once_rounded
def _with_logits(
    input: Any, target: Any, weight: Any = None, pos_weight: Any = None, reduction: int = 1
) -> Any:
    rest = -F.logsigmoid(input)  # log(1 + exp(-input))
    if pos_weight is not None:
        rest = rest * ((pos_weight - 1) * target + 1)
    values = (1 - target) * input + rest
    return _reduced(values if weight is None else values * weight, reduction)


# -- distances --------------------------------------------------------------------------------------------------------


@rule("cosine_similarity", kind="op")
@once_rounded
def _cosine_similarity(x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> Any:
    x1, x2 = torch.broadcast_tensors(x1, x2)
    unit1, unit2 = (x / x.norm(dim=dim, keepdim=True).clamp_min(eps) for x in (x1, x2))
    return (unit1 * unit2).sum(dim)


@rule("pairwise_distance", kind="op")
@once_rounded
def _pairwise_distance(x1: Any, x2: Any, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Any:
    return (x1 - x2 + eps).norm(p, -1, keepdim)


@rule("cdist", kind="op")
def _cdist(x1: Any, x2: Any, p: float = 2.0, compute_mode: str | None = None) -> Any:
    _taken(torch.cdist, x1, x2, p)
    return (x1.unsqueeze(-2) - x2.unsqueeze(-3)).norm(p, -1)


@rule("pdist", kind="op")
def _pdist(x: Any, p: float = 2.0) -> Any:
    _taken(torch.pdist, x, p)
    i, j = torch.triu_indices(x.shape[0], x.shape[0], 1, device=x.device).unbind(0)
    return (x[i] - x[j]).norm(p, -1)


def _taken(function: Callable[..., Any], *args: Any) -> None:
    """Raise torch's own error for an unsupported dtype, by a call on one row of each operand."""
    if any_low(args):
        function(*(primal_of(x)[..., :2, :] if isinstance(x, (torch.Tensor, Dual)) else x for x in args))
