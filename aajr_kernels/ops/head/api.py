"""The public streamed head: checks, backend choice, coverage."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import sharding
from ...autocast import autocast_low
from ...coverage import record_computed, recording
from ...dual import Dual
from ...torch_private import assert_async
from ..checks import check_dtypes, refuse_duals
from ..prepare import SHARDS, prepare
from .counted import Counted, counted, on_counted
from .function import HeadFunction
from .joint import Expected

METRICS = ("l2", "logits", "fisher", "probs")


def lm_head_sensitivity(
    hidden: Dual,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    metric: str = "fisher",
    scale: float = 1.0,
    softcap: float | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    expected: Expected | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sensitivity of a language model's output per token, without ever holding the logits.

    The logits are ``z = cap(scale · (W h + b))`` and their tangents ``ż = cap'(·) ∘ scale · W ḣ``; they are formed in
    chunks of the vocabulary, forward and backward, and memory grows only with the number of tokens.

    Args:
        hidden: Dual ``[*batch, C]``; float64, float32, bfloat16 or float16. Products run in its dtype, everything
            else in float32 (float64). Without tangents q is ``[0, *batch]``, and the loss is what remains.
        weight: ``[V, C]``, dtype of `hidden`.
        bias: ``[V]`` or None, dtype of `hidden`.
        metric: ``fisher``: ``q = Σ p(ż − μ)²`` with ``p = softmax(z)``, ``μ = Σ pż``. ``probs``: ``q = Σ p²(ż − μ)²``.
            ``logits``: ``q = Σ ż²``. ``l2``: ``q = ‖ḣ‖²``, of the hidden states themselves.
        scale: logits multiplier, applied to ``W h + b``.
        softcap: c of ``cap(x) = c·tanh(x/c)``, applied after the scale; None for none.
        labels: int64 ``[*batch]``; also returns the cross-entropy of every token from the same stream.
        ignore_index: label whose token has loss 0 and no gradient from it.
        mask: bool ``[*batch]``, the tokens whose q counts; q of the others is 0. A token with neither mask nor label
            costs no product, and nothing reaches its hidden states. None: q of every token counts, and without
            tangents labels decide.
        expected: from q ``[K, t]`` of some tokens of the flattened batch, and these tokens, a slice or int64 indices,
            to the cotangents of q ``[K, t]`` and of nll ``[t]`` (None for none) which the backward will bring, up to a
            common factor. A backend may then compute the gradients in the forward, chunk by chunk, and never form the
            logits twice: 6 products instead of 8 for K = 1. Others that arrive cost their own pass and get the exact
            result all the same.

    Returns:
        q ``[K, *batch]``, or ``(q, nll)`` with nll ``[*batch]`` when `labels` are given; float32 (float64 for
        float64). Gradients reach hidden (primal and tangents), weight and bias.

    Raises:
        TypeError: `hidden` carries no tangents, `labels` are not integers, or `mask` is not bool.
        UnsupportedOperation: `weight` or `bias` is a Dual.
        ValueError: the metric is unknown, shapes do not agree, or a label is out of range.
        RuntimeError: dtypes do not agree (under autocast all are cast to its low dtype first).
    """
    if metric not in METRICS:
        raise ValueError(f"lm_head_sensitivity: metric must be one of {', '.join(METRICS)}, got {metric!r}.")
    if not isinstance(hidden, Dual):
        raise TypeError(
            f"lm_head_sensitivity: hidden must be a Dual, got {type(hidden).__name__} without tangents: compute it "
            "from aajr_kernels.dual(x, v)."
        )
    refuse_duals(
        "lm_head_sensitivity",
        "compute the logits with torch.matmul and call sensitivity",
        weight=weight,
        bias=bias,
    )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"lm_head_sensitivity: softcap must be positive or None, got {softcap}.")
    _check_shapes(hidden, weight, bias)
    batch, k = tuple(hidden.shape[:-1]), hidden.num_tangents
    if labels is not None:
        _check_labels(labels, batch, weight.shape[0], ignore_index)
        labels = labels.reshape(-1).long()
    if mask is not None:
        _check_mask(mask, batch, hidden.device)
        mask = mask.reshape(-1)
    options = (metric, float(scale), softcap, int(ignore_index))

    def on_shards(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        operands = autocast_low(hidden.stacked, weight, bias)
        _check_dtypes(*operands)
        return sharding.OPS["head"](*operands, labels, mask, *options)

    is_sharded = sharding.is_dtensor(hidden.stacked, weight, bias)
    tokens = None if is_sharded else counted(mask, labels, ignore_index, k)
    whole, computed = math.prod(batch), math.prod(batch) if tokens is None else tokens.number
    joint = expected is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    backend, operands = prepare(
        "head",
        (hidden.stacked,),
        (weight, bias),
        flops=lambda h, w, _: 2.0 * h.shape[0] * computed * w.numel(),
        shards=on_shards,
        cast=autocast_low,
        name="lm_head_sensitivity",
        kind=lambda h, _, bias: (
            (h.shape[0], h.shape[-1]),
            (metric, bias is not None, labels is not None, scale != 1.0, softcap is not None, joint)
            + (tokens is not None and tokens.count is not None,),
        ),
    )
    if backend == SHARDS:
        q, nll = operands
    else:
        _check_dtypes(*operands)
        stacked, weight, bias = operands
        if recording() and not torch.compiler.is_compiling():
            record_computed("tokens", computed, whole, 2.0 * (1 + k) * (whole - computed) * weight.numel())
        cotangents = _cotangents(expected, mask, tokens) if joint and expected is not None else None

        def head(rows: Tensor, targets: Tensor | None, count: Tensor | None) -> tuple[Tensor, Tensor | None]:
            pair: tuple[Tensor, Tensor | None] = HeadFunction.apply(
                rows, weight, bias, targets, count, *options, backend, cotangents
            )
            return pair

        q, nll = on_counted(tokens, stacked.reshape(1 + k, whole, stacked.shape[-1]), labels, head)
    if mask is not None:  # some count for their labels only
        q = torch.where(mask, q, 0.0)
    q = q.reshape(k, *batch)
    return q if nll is None else (q, nll.reshape(batch))


def _cotangents(expected: Expected, mask: Tensor | None, tokens: Counted | None) -> Expected:
    """Cotangents expected for the tokens that are computed, in their order."""

    def of_computed(q: Tensor, rows: slice | Tensor) -> tuple[Tensor, Tensor | None]:
        at = rows if tokens is None else tokens.index[rows]
        q_bar, nll_bar = expected(q, at)
        return q_bar if mask is None else torch.where(mask[at], q_bar, 0.0), nll_bar

    return of_computed


def _check_dtypes(stacked: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_dtypes("lm_head_sensitivity", "hidden", (stacked.dtype,), weight=weight, bias=bias)


def _check_shapes(hidden: Dual, weight: Tensor, bias: Tensor | None) -> None:
    if hidden.dim() == 0 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"lm_head_sensitivity: weight must be [V, C] with V > 0 and C the last axis of hidden "
            f"{tuple(hidden.shape)}, got {tuple(weight.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"lm_head_sensitivity: bias must have shape [{weight.shape[0]}], got {tuple(bias.shape)}."
        )


def _check_mask(mask: object, batch: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"lm_head_sensitivity: mask must be a bool tensor, True for tokens whose q counts, got {kind}: pass "
            "mask != 0."
        )
    if tuple(mask.shape) != batch or mask.device != device:
        raise ValueError(
            f"lm_head_sensitivity: mask must have shape {batch}, hidden without its last axis, on {device}, got "
            f"{tuple(mask.shape)} on {mask.device}."
        )


def _check_labels(labels: Tensor, batch: tuple[int, ...], vocabulary: int, ignore_index: int) -> None:
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"lm_head_sensitivity: labels must be integers, got {labels.dtype}: pass token ids.")
    if tuple(labels.shape) != batch:
        raise ValueError(
            f"lm_head_sensitivity: labels must have shape {batch}, hidden without its last axis, got "
            f"{tuple(labels.shape)}."
        )
    if torch.compiler.is_compiling():
        return
    valid = (labels == ignore_index) | ((labels >= 0) & (labels < vocabulary))
    if labels.device.type == "cpu":
        if not bool(valid.all()):
            worst = labels[~valid].reshape(-1)[0].item()
            raise ValueError(
                f"lm_head_sensitivity: labels must lie in [0, {vocabulary}) or equal ignore_index ({ignore_index}), "
                f"got {worst}."
            )
    else:  # without waiting for the device, as torch's cross-entropy does
        assert_async(valid.all(), "lm_head_sensitivity: labels out of range")
