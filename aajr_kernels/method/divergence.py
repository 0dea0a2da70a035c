"""KL of two language-model outputs per token, by the streamed head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import sharding
from ..autocast import autocast_low
from ..backends import capture
from ..backends.errors import UnsupportedOperation
from ..coverage import record, recording
from ..dual import Dual
from ..ops.head.counted import Counted
from ..ops.head.divergence import DivergenceFunction
from ..rules.common import primal_of
from ..transforms import uncompiled
from .checks import as_mask, kind_of
from .head import LMHead, as_head

__all__ = ["kl_of_logits", "lm_kl"]


def lm_kl(
    p: Any,
    q: Any,
    *,
    head: LMHead | nn.Linear,
    q_head: LMHead | nn.Linear | None = None,
    mask: Tensor | None = None,
) -> Any:
    """KL(p‖q) of two language-model outputs per token, without ever holding ``[tokens, V]`` logits.

    Exchange `p` and `q` for the other direction. Values close to 0 keep their digits: nothing of the size of a logit is
    subtracted.

    Args:
        p: hidden states ``[*batch, C]``; a plain tensor or a Dual; float64, float32, bfloat16 or float16. Products run
            in its dtype, everything else in float32 (float64).
        q: hidden states ``[*batch, C']``, of the same batch; its dtype may be another one.
        head: of `p`, in its dtype.
        q_head: of `q`, over the same vocabulary; None: `head`.
        mask: bool or integers ``[*batch]``, nonzero for tokens that count. The others have a KL of 0, cost no product,
            and nothing reaches their hidden states. On a GPU their number is read once, unless `mask` is on the CPU;
            while a CUDA graph is captured, and in compiled code, they are computed all the same.

    Returns:
        KL ``[*batch]``, at least 0 up to rounding; float32 (float64 where an operand is). Gradients reach the hidden
        states, weights and biases of both sides. Where a Dual carries tangents it is a Dual, and the logits of tokens
        that count are formed.

    Raises:
        TypeError: hidden states, a head or the mask have a wrong type.
        ValueError: shapes or vocabularies do not agree.
        RuntimeError: dtypes do not agree (under autocast all are cast to its low dtype first).
        UnsupportedOperation: a weight is a DTensor.
    """
    first = as_head(head)
    second = first if q_head is None else as_head(q_head)
    for name, hidden, described in (("p", p, first), ("q", q, second)):
        _check_hidden(name, hidden, described)
    batch = tuple(p.shape[:-1])
    _check_pair(p, q, first, second)
    keep = None if mask is None else _checked_mask(mask, batch)
    if any(isinstance(x, Dual) and x.num_tangents for x in (p, q)):
        return _formed(p, q, first, second, keep)
    p, q = (x.primal if isinstance(x, Dual) else x for x in (p, q))
    return _streamed(p, q, first, second, keep)


def kl_of_logits(p: Any, q: Any) -> Any:
    """KL(p‖q) ``[*batch]`` of logits in memory, tensors or Duals, in float32 or float64."""
    log_p, log_q = (torch.log_softmax(z if z.dtype == torch.float64 else z.float(), -1) for z in (p, q))
    # a logit of −inf is a probability of 0, which adds nothing
    difference = torch.where(primal_of(log_p) == -torch.inf, 0.0, log_p - log_q)
    return (log_p.exp() * difference).sum(-1)


@uncompiled  # the loop over the vocabulary would be unrolled into the graph
def _streamed(p: Tensor, q: Tensor, first: LMHead, second: LMHead, keep: Tensor | None) -> Tensor:
    batch = p.shape[:-1]
    rows = [x.reshape(-1, x.shape[-1]) for x in (p, q)]
    tokens = None if keep is None else _counted(keep, p.device)
    if tokens is not None:
        rows = [tokens.gather(x.unsqueeze(0))[0] for x in rows]
    elif keep is not None:
        keep = keep.to(p.device)
        rows = [torch.where(keep.reshape(-1, 1), x, 0.0) for x in rows]
    if recording():
        record("lm_kl", "reference", 2.0 * (first.weight.numel() + second.weight.numel()) * len(rows[0]))
    kl = _of_rows(rows[0], rows[1], first, second)
    if keep is None:
        return kl.reshape(batch)
    if tokens is None:
        return torch.where(keep, kl.reshape(batch), 0.0)
    return tokens.spread(kl, keep.numel()).reshape(batch)


def _of_rows(p: Tensor, q: Tensor, first: LMHead, second: LMHead) -> Tensor:
    """KL ``[T]`` of hidden states ``[T, C]``."""
    is_shared = second is first or (
        second.weight is first.weight
        and second.bias is first.bias
        and (first.scale, first.softcap) == (second.scale, second.softcap)
    )
    weights = first.weight, first.bias, *((None, None) if is_shared else (second.weight, second.bias))
    operands = (p, q, *sharding.detach_frozen(*weights))
    if sharding.is_dtensor(*operands):
        raise UnsupportedOperation(
            "lm_kl takes whole weights, got a DTensor: call it inside aajr_kernels.integrations.distributed.inside, or "
            "give weight.full_tensor()."
        )
    p, q, weight, bias, q_weight, q_bias = autocast_low(*operands)
    of_q = (weight, bias) if is_shared else (q_weight, q_bias)
    for name, hidden, tensors in (("p", p, (weight, bias)), ("q", q, of_q)):
        for tensor in tensors:
            if tensor is not None and tensor.dtype != hidden.dtype:
                raise RuntimeError(
                    f"lm_kl: the head of {name} must have the dtype of {name} ({hidden.dtype}), got {tensor.dtype}: "
                    "cast one of them."
                )
    options = [(float(head.scale), head.softcap) for head in (first, second)]
    kl: Tensor = DivergenceFunction.apply(p, q, weight, bias, q_weight, q_bias, *options)
    return kl


def _formed(p: Any, q: Any, first: LMHead, second: LMHead, keep: Tensor | None) -> Any:
    """KL as a Dual, from logits in memory."""
    tokens = None if keep is None else _counted(keep, p.device)
    if keep is None or tokens is None:
        kl = kl_of_logits(first.logits(p), second.logits(q))
        return kl if keep is None else torch.where(keep.to(p.device), kl, 0.0)
    rows = []
    for x in (p, q):
        stacked = x.stacked if isinstance(x, Dual) else x.unsqueeze(0)
        gathered = tokens.gather(stacked.reshape(len(stacked), keep.numel(), x.shape[-1]))
        rows.append(Dual(gathered) if isinstance(x, Dual) else gathered[0])
    kl = kl_of_logits(first.logits(rows[0]), second.logits(rows[1]))
    return Dual(tokens.spread(kl.stacked, keep.numel())).reshape(keep.shape)


def _counted(keep: Tensor, device: torch.device) -> Counted | None:
    """Tokens that count; None where their number cannot be read."""
    if torch.compiler.is_compiling() or (keep.device.type != "cpu" and capture.reads_no_value(device)):
        return None
    return Counted(keep.reshape(-1).nonzero().squeeze(-1).to(device), None)


def _check_hidden(name: str, hidden: Any, head: LMHead) -> None:
    if not isinstance(hidden, (Tensor, Dual)) or not hidden.is_floating_point():
        raise TypeError(
            f"lm_kl: {name} must be hidden states, a floating-point tensor or a Dual, got {kind_of(hidden)}: "
            "return for example model.model(inputs_embeds=x).last_hidden_state."
        )
    if hidden.dim() == 0 or hidden.shape[-1] != head.weight.shape[1]:
        raise ValueError(
            f"lm_kl: {name} must be [*batch, {head.weight.shape[1]}] for a head weight of "
            f"{tuple(head.weight.shape)}, got {tuple(hidden.shape)}: name the head of each side, head= and q_head=."
        )


def _check_pair(p: Any, q: Any, first: LMHead, second: LMHead) -> None:
    if p.shape[:-1] != q.shape[:-1] or p.device != q.device:
        raise ValueError(
            f"lm_kl: p and q must be of the same tokens on one device, got {tuple(p.shape[:-1])} on {p.device} and "
            f"{tuple(q.shape[:-1])} on {q.device}."
        )
    if first.weight.shape[0] != second.weight.shape[0] or not first.weight.shape[0]:
        raise ValueError(
            "lm_kl: both heads must have the same vocabulary of at least one word, got "
            f"{first.weight.shape[0]} and {second.weight.shape[0]}."
        )


def _checked_mask(mask: Any, batch: tuple[int, ...]) -> Tensor:
    keep = as_mask(mask, "mask", "counts")
    if tuple(keep.shape) != batch:
        raise ValueError(
            f"lm_kl: mask must have shape {batch}, that of the hidden states without their last axis, got "
            f"{tuple(keep.shape)}."
        )
    return keep
