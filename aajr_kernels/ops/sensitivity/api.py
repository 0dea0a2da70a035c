"""The public sensitivity and softmax: checks, backend choice, coverage."""

from __future__ import annotations

from torch import Tensor

from ... import sharding
from ...autocast import autocast_float32
from ...dual import Dual
from ..prepare import SHARDS, prepare
from .function import SensitivityFunction, SoftmaxFunction

METRICS = ("l2", "logits", "fisher", "probs")


def sensitivity(y: Dual, metric: str = "fisher") -> Tensor:
    """Squared size of the tangents of an output, per tangent and token.

    Args:
        y: Dual ``[*batch, V]``; logits for ``logits``, ``fisher`` and ``probs``, any tensor for ``l2``. Low dtypes are
            computed in float32.
        metric: ``l2`` and ``logits``: ``q = Σ ẏ²``. ``fisher``: ``q = Σ p(ẏ − μ)²`` with ``p = softmax(y)`` and
            ``μ = Σ pẏ``, twice the second-order term of the Kullback-Leibler divergence of the softmax. ``probs``:
            ``q = Σ p²(ẏ − μ)²``, the squared size of the tangent of p.

    Returns:
        q ``[K, *batch]``, float32 (float64 for float64); its gradient reaches primal and tangents of `y`.

    Raises:
        TypeError: `y` is not a Dual.
        ValueError: the metric is unknown, or `y` has no axis or an empty last axis to reduce.
    """
    if metric not in METRICS:
        raise ValueError(f"sensitivity: metric must be one of {', '.join(METRICS)}, got {metric!r}.")
    if not isinstance(y, Dual):
        raise TypeError(
            f"sensitivity: y must be a Dual, got {type(y).__name__} without tangents: build it with "
            "aajr_kernels.dual(x, v)."
        )
    if y.dim() == 0 or (y.shape[-1] == 0 and metric in ("fisher", "probs")):
        raise ValueError(
            f"sensitivity: y must have a non-empty last axis to reduce, got shape {tuple(y.shape)}: unsqueeze it."
        )
    backend, operands = prepare(
        "sensitivity",
        (y.stacked,),
        flops=lambda y: 5.0 * y.numel(),
        shards=lambda: sensitivity(sharding.OPS["whole"](y), metric),
        kind=lambda y: ((y.shape[0], y.shape[-1]), (metric,)),
    )
    return operands if backend == SHARDS else SensitivityFunction.apply(*operands, metric, backend)


def softmax(x: Dual, dim: int = -1) -> Dual:
    """Softmax of a Dual: ``p`` with the tangents ``p∘(ẋ − Σ p ẋ)``.

    Args:
        x: Dual of at least one axis; low dtypes are computed in float32. Under autocast it is cast to float32.
        dim: the axis that sums to one.

    Returns:
        Dual of the shape and dtype of `x`. As in torch, a row without a finite logit is NaN.

    Raises:
        TypeError: `x` is not a Dual.
        IndexError: `x` has no axis `dim`.
    """
    if not isinstance(x, Dual):
        raise TypeError(
            f"softmax: x must be a Dual, got {type(x).__name__}: use torch.softmax for plain tensors."
        )
    if not -x.dim() <= dim < x.dim():
        raise IndexError(f"softmax: dim must be an axis of x with shape {tuple(x.shape)}, got {dim}.")
    backend, operands = prepare(
        "sensitivity",
        (x.stacked,),
        flops=lambda x: 5.0 * x.numel(),
        shards=lambda: sharding.OPS["along"]("softmax", softmax, x, dim % x.dim()),
        cast=autocast_float32,
        name="softmax",
        in_cuda=False,
        kind=lambda x: ((x.shape[0], x.shape[dim % (x.dim() - 1) + 1]), ("",)),
    )
    if backend == SHARDS:
        return operands
    (stack,) = operands
    if 0 in x.shape:
        return Dual(stack.clone())
    axis = dim % x.dim() + 1
    return Dual(SoftmaxFunction.apply(stack.movedim(axis, -1), backend).movedim(-1, axis))
