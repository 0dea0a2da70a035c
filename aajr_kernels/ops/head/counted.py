"""The tokens that count, gathered in front of the others or without them.

A token counts where the mask or a label says so. The others cost no product and no pass over the vocabulary: their q,
nll and gradients are zeros, whatever their hidden states hold. On the CPU the tokens that count are all that kernels
see. Elsewhere, and in compiled code, their number is not known without waiting for the device: there all tokens are
kept, those that count first and in their order, and kernels read the number where it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..autograd import Function

__all__ = ["Counted", "counted", "on_counted"]


@dataclass(frozen=True)
class Counted:
    """Which of T tokens are computed.

    Attributes:
        index: int64 ``[n]``, tokens in the order in which kernels see them.
        count: int32 ``[]``, how many of them count, the first ones; None: all n.
    """

    index: Tensor
    count: Tensor | None

    @property
    def number(self) -> int | Tensor:
        """How many count; a tensor where only the device knows."""
        return len(self.index) if self.count is None else self.count

    def gather(self, stacked: Tensor) -> Tensor:
        """``[S, T, C]`` to ``[S, n, C]``, with its gradient."""
        gathered: Tensor = _Gather.apply(stacked, self.index)
        return gathered

    def spread(self, values: Tensor, tokens: int) -> Tensor:
        """``[..., n]`` to ``[..., T]``, zeros at the other tokens; with its gradient."""
        return values.new_zeros(*values.shape[:-1], tokens).index_copy(-1, self.index, values)


def on_counted(
    tokens: Counted | None,
    stacked: Tensor,
    labels: Tensor | None,
    head: Callable[[Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor | None]],
) -> tuple[Tensor, Tensor | None]:
    """q ``[K, T]`` and nll ``[T]`` or None of a head on the tokens that count, zeros at the others.

    Args:
        tokens: those that count; None for all.
        stacked: ``[S, T, C]``.
        labels: ``[T]`` or None.
        head: of stack, labels and count, as kernels see them.
    """
    if tokens is None:
        return head(stacked, labels, None)
    targets = None if labels is None else labels[tokens.index]
    q, nll = head(tokens.gather(stacked), targets, tokens.count)
    whole = stacked.shape[1]
    return tokens.spread(q, whole), None if nll is None else tokens.spread(nll, whole)


def counted(mask: Tensor | None, labels: Tensor | None, ignore_index: int, tangents: int) -> Counted | None:
    """The tokens of which q or nll counts; None for all of them.

    Args:
        mask: bool ``[T]``, the tokens whose q counts; None for all.
        labels: int64 ``[T]`` or None.
        ignore_index: label of a token without a loss.
        tangents: their number; without tangents there is no q, and labels decide.
    """
    keep = mask if tangents else None
    if labels is not None and (keep is not None or tangents == 0):
        labelled = labels != ignore_index
        keep = labelled if keep is None else keep | labelled
    if keep is None:
        return None
    if _is_known(keep.device):
        index = keep.nonzero().squeeze(-1)
        return None if len(index) == len(keep) else Counted(index, None)
    order = torch.argsort((~keep).to(torch.int8), stable=True)
    return Counted(order, keep.sum(dtype=torch.int32))


def _is_known(device: torch.device) -> bool:
    """Whether a number of tokens can be read without waiting."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


class _Gather(Function):
    """Rows ``[S, T, C]`` to ``[S, n, C]``; no row is taken twice, so that gradients are copied and never added."""

    @staticmethod
    def forward(ctx: Any, stacked: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.tokens = stacked.shape[1]
        return stacked.index_select(1, index)

    @staticmethod
    def backward(ctx: Any, gathered_bar: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        stacks, _, size = gathered_bar.shape
        return gathered_bar.new_zeros(stacks, ctx.tokens, size).index_copy_(1, index, gathered_bar), None
