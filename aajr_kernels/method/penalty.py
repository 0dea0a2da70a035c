"""The aligned penalty: the squared size of a policy's derivative along the adversary's direction.

For a policy π, a point x and a direction v the derivative J v is carried forward by the Dual, reduced to one number q
per token by a metric, shaped by a form, and averaged. The gradient flows through the derivative to every parameter.

==========  ================================  =====================================================
metric      q                                 meaning
==========  ================================  =====================================================
``l2``      Σ ẏ²                              hidden states, continuous actions
``logits``  Σ ż²                              logits z
``fisher``  Σ p (ż − Σ p ż)², p = softmax z   twice the second-order term of KL(π(x) ‖ π(x + t v))
``probs``   Σ p² (ż − Σ p ż)²                 ‖J_π v‖² of the probabilities
==========  ================================  =====================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..backends.errors import refuse_transform
from ..dual import Dual, dual
from ..ops.head import lm_head_sensitivity
from ..ops.sensitivity import sensitivity
from ..torch_private import in_transform
from ..transforms import call, primal_tree
from .expected import expected_cotangents
from .head import LMHead, as_head
from .options import METRICS, PenaltyOptions

__all__ = ["aligned_penalty"]


def aligned_penalty(
    func: Callable[[Any], Any],
    x: torch.Tensor,
    v: torch.Tensor,
    *,
    metric: str = "fisher",
    head: LMHead | nn.Linear | None = None,
    labels: torch.Tensor | None = None,
    gamma: float | None = None,
    form: str = "squared",
    mask: torch.Tensor | None = None,
    unit: str = "token",
    reduction: str = "mean",
    denominator: float | torch.Tensor | None = None,
    return_primal: bool = False,
    penalty_weight: float | None = None,
) -> Any:
    """Penalty on the sensitivity of `func` at `x` along `v`, exact, with exact gradients.

    Args:
        func: called once with one Dual shaped like `x`. Without `head` it returns logits ``[*batch, V]`` on the last
            axis (any tensor ``[*batch, D]`` for ``metric="l2"``), or a model output whose ``.logits`` is used; with
            `head` it returns hidden states ``[*batch, C]``.
        x: the point, floating point, any shape, typically embeddings ``[B, T, C]``.
        v: one direction like `x`, or K directions ``[K, *x.shape]``. Used as given: see :func:`normalize`. A zero
            direction gives a penalty and gradient of zero.
        metric: ``"fisher"``, ``"logits"``, ``"probs"`` or ``"l2"``; with `head`, ``"l2"`` measures the hidden states.
        head: the language-model head, streamed over the vocabulary without a ``[tokens, V]`` tensor.
        labels: ``[*batch]`` class indices, −100 = ignored, already aligned: ``labels[..., t]`` is the target of
            position t (shift them yourself for next-token prediction). Needs `head` and ``return_primal=True``.
        gamma: threshold γ ≥ 0 on √q.
        form: ``"squared"``: q, or relu(q − γ²) when gamma is given; ``"hinge"``: relu(√q − γ); ``"hinge2"``: its
            square. √q has derivative 0 at q = 0.
        mask: ``[*batch]``, bool or integer, nonzero = included.
        unit: ``"token"`` (the default, which goes with directions of norm 1 per token, the default of
            :func:`normalize`) applies the form to each q, ``"sequence"`` to the masked sum of q over all axes after
            the first (the ‖J v‖² of a direction of norm 1 over the sequence).
        reduction: ``"mean"``: Σ / (K · number of included units), 0 when there are none; ``"sum"``; ``"none"``:
            ``[K, *units]`` with zeros where masked.
        denominator: replaces the number of included units in the mean: the global count under gradient accumulation
            or data parallelism. With `labels` and ``unit="token"`` it divides the cross-entropy too.
        return_primal: also return what `func` returned with Duals replaced by their primals, attached to the graph;
            with `labels` the mean cross-entropy instead, from the same stream.
        penalty_weight: with `labels`, λ of the objective ``loss + λ · penalty`` where it is known. It changes nothing
            but speed: the head can then compute its gradients while it computes the loss, and does so without
            `labels` in any case.

    Returns:
        The penalty (float32, or float64 for float64 inputs), or ``(penalty, primal)``. Gradients reach `x`, `v` and
        every parameter.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or value; `v` is not finite (checked
            on the CPU; on accelerators, where the check would stall the stream, and in compiled code NaN reaches the
            penalty); the output does not depend on `x`; it is a model output without ``.logits``.
        RuntimeError: the dtypes of hidden states and head do not agree.
        UnsupportedOperation: `func` uses a function without a derivative rule.
    """
    measured = measure(
        func,
        x,
        v,
        PenaltyOptions(
            metric=metric,
            head=head,
            labels=labels,
            gamma=gamma,
            form=form,
            mask=mask,
            unit=unit,
            reduction=reduction,
            denominator=denominator,
            return_primal=return_primal,
            penalty_weight=penalty_weight,
        ),
    )
    return (measured.penalty, measured.primal) if return_primal else measured.penalty


class Measured(NamedTuple):
    """A penalty and what it was made of.

    Attributes:
        penalty: as :func:`aligned_penalty` returns it.
        q: ``[K, *batch]``, before form, mask and reduction.
        primal: the addition of ``return_primal=True``; None without.
    """

    penalty: torch.Tensor
    q: torch.Tensor
    primal: Any


def measure(
    func: Callable[[Any], Any], x: torch.Tensor, v: torch.Tensor, options: PenaltyOptions
) -> Measured:
    """One dual forward of `func` at `x` along `v`, and its penalty."""
    metric = options.metric
    if not isinstance(metric, str):
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}.")
    if options.labels is not None and not options.return_primal:
        raise ValueError("labels are for the loss that return_primal=True returns: pass it, or drop labels.")
    if options.labels is not None and options.head is None:
        raise ValueError("labels need head=: without a head compute the loss from the returned primal.")
    head = None if options.head is None else as_head(options.head)
    x_dual = dual(x, v)
    is_eager = not torch.compiler.is_compiling()
    if is_eager and in_transform(x, v):  # the reduction to q is an op
        refuse_transform()
    if is_eager and v.device.type == "cpu" and not torch.isfinite(v.detach()).all():
        raise ValueError(
            "v holds NaN or infinity: check the gradient it came from, or mask it with normalize(mask=)."
        )
    output = call(func, x_dual)
    y = _output_dual(output, metric, head is not None)
    loss: torch.Tensor | None = None
    if head is None or (metric == "l2" and options.labels is None):
        q = sensitivity(y, metric)
    else:
        q, loss = _through_head(y, head, metric, options)
    primal = None
    if options.return_primal:
        primal = primal_tree(output) if loss is None else loss
    return Measured(options.reduce(q), q, primal)


def _through_head(
    hidden: Dual, head: LMHead, metric: str, options: PenaltyOptions
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """q and, given labels, the mean cross-entropy, from one pass over the vocabulary."""
    labels = options.labels
    count: Any = options.denominator if options.unit == "token" else None
    if labels is not None:
        _check_labels(labels, hidden)
        if count is None:
            count = (labels != -100).sum().clamp(min=1)
    result = lm_head_sensitivity(
        hidden,
        head.weight,
        head.bias,
        metric=metric,
        scale=head.scale,
        softcap=head.softcap,
        labels=labels,
        mask=options.included(tuple(hidden.shape[:-1]), hidden.device),
        expected=expected_cotangents(hidden, options, count),
    )
    if not isinstance(result, tuple):
        return result, None
    q, nll = result
    return q, nll.sum() / count


def _check_labels(labels: Any, hidden: Dual) -> None:
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"labels must be a tensor of class indices, got {type(labels).__name__}.")
    if labels.is_floating_point() or tuple(labels.shape) != tuple(hidden.shape[:-1]):
        raise ValueError(
            f"labels must be integer class indices of shape {tuple(hidden.shape[:-1])}, got {labels.dtype} "
            f"{tuple(labels.shape)}."
        )
    if labels.device != hidden.device:
        raise ValueError(
            f"labels must be on the device of the hidden states ({hidden.device}), got {labels.device}."
        )


def _output_dual(output: Any, metric: str, has_head: bool) -> Dual:
    """The Dual to be measured, in what func returned."""
    y = output
    if not isinstance(y, (Dual, torch.Tensor)):
        if has_head:
            raise TypeError(
                f"func must return hidden states when head= is given, got {type(y).__name__}: return for example "
                "model.model(inputs_embeds=d).last_hidden_state."
            )
        y = getattr(output, "logits", None)
        if y is None:
            raise TypeError(
                f"func must return a tensor or a model output with .logits, got {type(output).__name__}: return the "
                "tensor to be measured, or hidden states with head=."
            )
    if not isinstance(y, Dual):
        raise ValueError(
            "the output of func does not depend on its input x (no tangent arrived): a detach(), a no-grad copy or "
            "token ids instead of embeddings break the path."
        )
    if y.dim() == 0:
        raise ValueError(
            f"the output of func must have at least one axis for metric {metric!r}, got a scalar."
        )
    return y
