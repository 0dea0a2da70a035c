"""A batch whose fixed context is computed once: what is left of it.

Everything before the first token that may be attacked is the same at every point of an attack and has no tangent
(:func:`~aajr_kernels.integrations.transformers.shared_context`); losses of its own tokens are constants.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..dual import Dual
from .batch import Prepared
from .checks import first_included
from .losses import IGNORED
from .policy import Policy

__all__ = ["Shared", "check_splittable", "shared_of", "start_of"]

#: share of a sequence that has to be context for ``"auto"``, and inputs of a model that can be split at a token
LEAST, SPLITTABLE = 1 / 8, {"attention_mask", "position_ids"}


@dataclass(frozen=True, eq=False)
class Shared:
    """The suffix of a micro-batch.

    Attributes:
        policy: a function of the suffix.
        batch: its tokens.
        x: its embeddings, attached.
        losses: ``[B]``, sums of the cross-entropy of the context's own labels, attached.
        counts: ``[B]``, learnt tokens of the whole rows, at least 1.
        whole: the batch with its context.
        output: what the policy's forward returns for the context, attached; None where nothing is scored there.
    """

    policy: Policy
    batch: Prepared
    x: Tensor
    losses: Tensor
    counts: Tensor
    whole: Prepared
    output: Any = None

    @property
    def start(self) -> int:
        """Tokens of the context."""
        return self.whole.labels.shape[1] - self.batch.labels.shape[1]


def start_of(batch: Prepared, mode: bool | str = True) -> int:
    """Tokens before the first that may be attacked in any row; 0 where all may be, or none.

    Args:
        batch: checked.
        mode: True; ``"auto"``: 0 where they are fewer than an eighth of the sequence; False: 0.
    """
    if batch.attackable is None:
        return 0
    mask = batch.masks[2]
    first, length = first_included(mask), mask.shape[1]
    is_short = first < LEAST * length
    return 0 if first >= length or mode is False or (mode == "auto" and is_short) else first


def check_splittable(policy: Policy, batch: Prepared) -> None:
    """Raise a ValueError unless the policy knows how, and the inputs of the batch can be cut at a token."""
    if policy.context is None:
        raise ValueError(
            "policy must say how a context is shared, got one without: it is a causal decoder of transformers, or "
            "give Policy(..., context=functools.partial(shared_context, body)) or share_context=False."
        )
    if more := sorted(batch.inputs.keys() - SPLITTABLE):
        raise ValueError(
            f"a batch with {', '.join(more)} cannot be split into a context and a suffix: leave it out, or set "
            "share_context=False."
        )


def shared_of(
    policy: Policy,
    batch: Prepared,
    x: Tensor,
    start: int,
    is_scored: bool,
    enter: Callable[[Any], Any] = lambda func: func,
) -> Shared:
    """The batch from `start` on.

    Args:
        policy: with a context.
        batch: the whole.
        x: its embeddings.
        start: tokens of the context, at least 1.
        is_scored: some of them have labels, or a loss reads the output there.
        enter: gathers the parameters of a sharded model for a function.

    Raises:
        TypeError, ValueError, UnsupportedOperation: the model cannot be split, or not for this batch.
    """
    assert policy.context is not None
    learnt = batch.labels != IGNORED
    context = enter(policy.context)(x, start=start, output=is_scored, **batch.inputs)
    losses = torch.zeros(len(x), device=x.device)
    if is_scored:
        labels = batch.labels[:, :start]
        if policy.head is None:
            losses = policy.token_losses(context.output, labels).sum(-1)
        else:
            scored = replace(policy, forward=lambda _: Dual(context.output.unsqueeze(0)))
            losses = enter(scored.loss_fn({}, labels, "sum"))(x[:, :start])
    suffix = replace(policy, forward=lambda x, **_: context(x), context=None)
    counts, output = learnt.sum(-1).clamp(min=1), context.output if is_scored else None
    return Shared(suffix, batch.suffix(start), context.x, losses, counts, batch, output)
