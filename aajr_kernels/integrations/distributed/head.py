"""The streamed head with its vocabulary split over processes.

Process r holds the rows of W of its words. For every token its kernels return, under its own softmax p_r,
    the largest logit, lse_r = log Σ e^z, ż at the largest logit and μ_r = Σ p_r ż less that, q_r = Σ p_r (ż − μ_r)²
    (probs: q_r = Σ p_r²(ż − μ_r)²,    κ_r = Σ p_r²(ż − μ_r),    m_r = Σ p_r²),
and the logit of the label if it is one of its words. These numbers per token are gathered, and every process
merges them in the same order. With w_r = e^(lse_r − lse), μ_r less ż of the likeliest word of all, and d_r = μ_r − μ:
    lse = log Σ e^(lse_r),    μ = Σ w_r μ_r
    fisher   q = Σ w_r (q_r + d_r²)
    probs    q = Σ w_r²(q_r + 2 d_r κ_r + d_r² m_r),    κ = Σ w_r²(κ_r + d_r m_r)
    logits   q = Σ q_r
    nll      lse − z[label]
The backward of a process is that of its words under the statistics of all, with ż of the likeliest word of all as their
reference: its rows of W's gradient are final, the gradient of the hidden states is a sum over processes, which DTensor
forms. Statistics are gathered and merged in float64, which keeps what their differences leave of a confident token.
m_r is e^(lse'_r − 2 lse_r) with lse' that of the doubled logits: one more product in the forward of probs, and no other
kernel.

All processes must have the same tokens. Weights that ``fully_shard`` split look like a split vocabulary, but every
process has other tokens: a projection of each token is gathered and compared.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import sharding
from ...autocast import no_autocast
from ...backends import choice
from ...backends.errors import UnsupportedOperation, first_order
from ...coverage import record, recording
from ...dual import Dual
from ...ops.autograd import Function
from ...ops.head import lm_head_sensitivity
from ...ops.head.counted import counted, on_counted
from ...ops.sensitivity import sensitivity
from ...torch_private import assert_async
from .ops import local, mesh_of

__all__: list[str] = []

_SAME_TOKENS = (
    "lm_head_sensitivity: all processes that share the vocabulary of weight must bring the same tokens, got different "
    "ones: run it inside(model, ...) under fully_shard, and give all ranks of a tensor-parallel group one batch."
)


def _head(
    stacked: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    mask: Tensor | None,
    metric: str,
    scale: float,
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor | None]:
    """q ``[K, T]`` and nll ``[T]`` from a stack ``[1 + K, *batch, C]`` and a weight; at least one is a DTensor."""
    from torch.distributed.tensor import Partial, Replicate

    operands = {"weight": weight, "bias": bias, "hidden": stacked}
    first = "weight" if sharding.is_dtensor(weight) else "hidden"
    mesh = mesh_of("lm_head_sensitivity", **{first: operands.pop(first)}, **operands)
    axis, start = _words("weight", weight, mesh)
    if bias is not None and _words("bias", bias, mesh) != (axis, start):
        raise UnsupportedOperation(
            "lm_head_sensitivity: bias must be split like the rows of weight: distribute both with Shard(0)."
        )
    whole = [Replicate()] * mesh.ndim
    # over the axis that splits the vocabulary the gradient of the hidden states is a sum
    sums = [Partial() if i == axis else Replicate() for i in range(mesh.ndim)]
    w, b = (None if p is None else _shard(p) for p in (weight, bias))
    assert w is not None
    rows = (len(stacked), math.prod(stacked.shape[1:-1]), stacked.shape[-1])
    if axis is None:
        plain = Dual(local(stacked, mesh, whole, whole).reshape(rows))
        result = lm_head_sensitivity(
            plain,
            w,
            b,
            metric=metric,
            scale=scale,
            softcap=softcap,
            labels=labels,
            ignore_index=ignore_index,
            mask=mask,
        )
        return result if isinstance(result, tuple) else (result, None)
    h, q_l2 = local(stacked, mesh, whole, sums).reshape(rows), None
    tokens = counted(mask, labels, ignore_index, rows[0] - 1)
    if metric == "l2" or len(h) == 1:  # of the hidden states, which are local: no sum over processes
        q_l2 = h.new_empty((0, rows[1]), dtype=_wide(h))
        if len(h) > 1:
            q_l2 = sensitivity(Dual(local(stacked, mesh, whole, whole).reshape(rows)), "l2")
        if labels is None:
            return q_l2, None
        h, metric = h[:1], "l2"
    place = (mesh.get_group(axis), start)

    def of_counted(h: Tensor, labels: Tensor | None, count: Tensor | None) -> Any:
        backend = choice.select_backend("head", h, w, b)
        if recording():
            record("lm_head_sensitivity", backend, 2.0 * h.numel() * w.shape[0])
        return SplitHead.apply(h, w, b, labels, count, metric, scale, softcap, ignore_index, backend, place)

    q, nll = on_counted(tokens, h, labels, of_counted)
    return (q if q_l2 is None else q_l2), nll


def _shard(parameter: Tensor) -> Tensor:
    """The local shard, whose gradient is the shard of the gradient."""
    if not sharding.is_dtensor(parameter):
        return parameter
    return parameter.to_local(grad_placements=parameter.placements)  # type: ignore[attr-defined]


def _words(name: str, parameter: Tensor, mesh: Any) -> tuple[int | None, int]:
    """The axis of the mesh that splits the vocabulary, None if none does, and the first local word."""
    from torch.distributed.tensor import Replicate, Shard

    if not sharding.is_dtensor(parameter):
        return None, 0
    placements = parameter.placements  # type: ignore[attr-defined]
    axes = [i for i, p in enumerate(placements) if p == Shard(0)]
    if len(axes) > 1 or any(p not in (Shard(0), Replicate()) for p in placements):
        raise UnsupportedOperation(
            f"lm_head_sensitivity: {name} must be split over the vocabulary on one axis of its mesh, got {placements}: "
            "use ColwiseParallel for the head, and inside(model, ...) where fully_shard splits it too."
        )
    if not axes:
        return None, 0
    size = -(-parameter.shape[0] // mesh.size(axes[0]))  # of all shards but the last ones
    return axes[0], min(size * mesh.get_local_rank(axes[0]), parameter.shape[0])


class SplitHead(Function):
    """``[1 + K, T, C]`` and the local rows of W -> q ``[K, T]`` and nll ``[T]`` of all words."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor | None,
        count: Tensor | None,
        metric: str,
        scale: float,
        softcap: float | None,
        ignore_index: int,
        backend: str,
        place: tuple[Any, int],
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        options = (metric, scale, softcap, ignore_index)
        ctx.options, ctx.backend = options, backend
        group, start = place
        own = None
        if labels is not None:  # the word, beyond the last for a word of another process
            beyond = weight.shape[0] + (ignore_index == weight.shape[0])
            here = (labels >= start) & (labels < start + weight.shape[0]) & (labels != ignore_index)
            own = torch.where(here, labels - start, beyond).masked_fill(labels == ignore_index, ignore_index)
            if 0 <= ignore_index < weight.shape[0]:  # would be taken for a local word
                raise ValueError(
                    "lm_head_sensitivity: ignore_index must be no word where the vocabulary is split, got "
                    f"{ignore_index}."
                )
        with no_autocast(h.device.type):
            numbers, stats = _statistics(h, weight, bias, own, count, *options, backend)
            numbers = torch.cat([_signature(h, labels, count), numbers])
            q, nll = _merge(_gathered(numbers, group, h), stats, h.shape[0] - 1, metric, labels is not None)
            if nll is not None and labels is not None:
                nll = nll.masked_fill(labels == ignore_index, 0.0)
        ctx.save_for_backward(h, weight, bias, own, count, stats)
        return q, nll

    @staticmethod
    @first_order
    def backward(ctx: Any, q_bar: Tensor | None, nll_bar: Tensor | None) -> tuple[Tensor | None, ...]:
        h, weight, bias, own, count, stats = ctx.saved_tensors
        if ctx.options[0] == "l2":  # without tangents; the caller computes q of the hidden states
            q_bar = None
        if q_bar is None and nll_bar is None:
            return (None,) * 11
        needs = ctx.needs_input_grad[:3]
        if weight.shape[0] == 0:
            bars = [torch.zeros_like(t) if need else None for t, need in zip((h, weight, bias), needs)]
            return (*bars, *(None,) * 8)
        with no_autocast(h.device.type):
            h_bar, weight_bar, bias_bar = choice.implementation("head", ctx.backend).head_bwd(
                h, weight, bias, own, count, *ctx.options, q_bar, nll_bar, stats, *needs
            )
        if bias_bar is not None:
            bias_bar = bias_bar.to(bias.dtype)
        return (h_bar, weight_bar, bias_bar, *(None,) * 8)


def _statistics(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    own: Tensor | None,
    count: Tensor | None,
    metric: str,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Rows to gather ``[F, T]`` (float64), and the statistics of the local words."""
    k, tokens = h.shape[0] - 1, h.shape[1]
    kernels = choice.implementation("head", backend)
    if weight.shape[0] == 0:
        stats = h.new_zeros((2 + 4 * k, tokens), dtype=_wide(h))
        stats[0] = -math.inf
        nll = None if own is None else torch.zeros_like(stats[0])
    else:
        _, nll, stats = kernels.head_fwd(h, weight, bias, own, count, metric, scale, softcap, ignore_index)
    lse = _lse(stats)
    without = lse == -math.inf  # of any weight: no word, or none that can be drawn
    values = stats[2:].double()
    if metric != "logits":
        values = values.masked_fill(without, 0.0)
    reference, mean, q, slope = values.reshape(4, k, tokens)
    numbers = [stats[:1].double(), lse.unsqueeze(0)]
    if own is not None and nll is not None:
        is_local = (own >= 0) & (own < weight.shape[0])
        numbers.append(torch.where(is_local, lse - nll.double(), 0.0).unsqueeze(0))
    if metric in ("fisher", "probs"):
        numbers += [reference, mean]
    if metric != "l2":
        numbers.append(q)
    if metric == "probs":
        mass = torch.zeros_like(lse)
        if weight.shape[0]:
            unlabelled = torch.full((tokens,), ignore_index, device=h.device)
            twice = None if softcap is None else 2.0 * softcap
            doubled = kernels.head_fwd(
                h[:1], weight, bias, unlabelled, count, "l2", 2.0 * scale, twice, ignore_index
            )[2]
            mass = (_lse(doubled) - 2.0 * lse).exp().masked_fill(without, 0.0)
        kappa = -(slope + mean / (1.0 + stats[1].double())).masked_fill(without, 0.0)
        numbers += [kappa, mass.unsqueeze(0)]
    return torch.cat(numbers), stats


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _lse(stats: Tensor) -> Tensor:
    return stats[0].double() + stats[1].double().log1p()


def _merge(
    gathered: Tensor, stats: Tensor, k: int, metric: str, labels: bool
) -> tuple[Tensor, Tensor | None]:
    """q and nll of all words from ``[processes, F, T]``; `stats` of the own words become those under all."""
    dtype = stats.dtype
    fields = iter(gathered.split([1, 1, *([1] if labels else []), *_fields(k, metric)], 1))
    peaks, parts = next(fields), next(fields)
    lse = parts.logsumexp(0)
    nll = lse - next(fields).sum(0) if labels else None
    w = (parts - lse).exp()
    peak, at_peak = peaks.max(0)
    reference, mean, q, slope = stats[2:].view(4, k, stats.shape[1])
    if metric == "logits":
        q.copy_(next(fields).sum(0))
        if not labels:  # no softmax: its placeholder is not used
            return q.to(dtype).clone(), None
    elif metric != "l2":
        origins = next(fields)
        origin = origins.gather(0, at_peak.expand(1, k, -1))
        means = origins - origin + next(fields)
        middle = (w * means).sum(0)
        d, spread = means - middle, next(fields)
        reference.copy_(origin[0])
        mean.copy_(middle)
        if metric == "fisher":
            q.copy_((w * (spread + d * d)).sum(0))
        else:
            skew, mass = next(fields), next(fields)
            q.copy_((w * w * (spread + 2.0 * d * skew + d * d * mass)).sum(0))
            kappa = (w * w * (skew + d * mass)).sum(0)
            slope.copy_(-(kappa + (peak - lse).exp() * middle))
    stats[0] = peak[0]
    stats[1] = (lse - peak).expm1()[0]
    return q.to(dtype).clone(), None if nll is None else nll[0].to(dtype)


def _fields(k: int, metric: str) -> list[int]:
    """Gathered rows after the largest logit, log Σ e^z and the logit of the label."""
    return {"l2": [], "logits": [k], "fisher": [k, k, k], "probs": [k, k, k, k, 1]}[metric]


def _signature(h: Tensor, labels: Tensor | None, count: Tensor | None) -> Tensor:
    """Three numbers per token ``[3, T]`` that identify it: a projection, its tolerance, the label if it counts."""
    wide = h[0].double()
    direction = torch.arange(h.shape[-1], device=h.device, dtype=torch.float64).cos()
    label = torch.zeros_like(wide[:, 0]) if labels is None else labels.double()
    if count is not None:
        label = label.masked_fill(torch.arange(len(label), device=h.device) >= count, -math.inf)
    return torch.stack([wide @ direction, 1e-3 * wide.norm(dim=-1), label])


def _gathered(numbers: Tensor, group: Any, h: Tensor) -> Tensor:
    """``[processes, F, T]`` without the signature, which is compared.

    Raises:
        ValueError: the processes do not have the same tokens.
    """
    count = torch.distributed.get_world_size(group)
    # a GPU's host would have to wait; another number of tokens fails in the gathering
    if h.device.type == "cpu":
        shape = torch.tensor(numbers.shape)
        shapes = shape.new_empty(count * 2)
        _all_gather(shapes, shape, group)
        if not bool((shapes.view(count, 2) == shape).all()):
            raise ValueError(_SAME_TOKENS)
    numbers = numbers.contiguous()
    everything = numbers.new_empty((count * numbers.shape[0], numbers.shape[1]))
    _all_gather(everything, numbers, group)
    everything = everything.view(count, *numbers.shape)
    projection, slack, label = everything[:, :3].unbind(1)
    same = ((projection - projection[0]).abs() <= slack[0]) & (label == label[0])
    same = same | projection.isnan()  # NaN shows in the result
    if h.device.type != "cpu":
        assert_async(same.all(), _SAME_TOKENS)
    elif not bool(same.all()):
        raise ValueError(_SAME_TOKENS)
    return everything[:, 3:]


def _all_gather(output: Tensor, own: Tensor, group: Any) -> None:
    """Concatenated along the first axis; the function has another name since torch 2.13."""
    gather = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor
    gather(output, own, group=group)


sharding.OPS["head"] = _head
