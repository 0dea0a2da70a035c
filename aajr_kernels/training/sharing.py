"""A micro-batch whose fixed context is computed once: what is left of it for the attack, the losses and the penalty.

Everything before the first token that may be attacked is the same at every step of an ascent and has no tangent
(:func:`~aajr_kernels.integrations.transformers.shared_context`). The objective then works on the suffix; losses of the
context's own tokens are a constant of the attack and are added to the sums of their rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.errors import UnsupportedOperation
from ..dual import Dual
from ..method.batch import Prepared
from ..method.checks import first_included
from ..method.losses import IGNORED
from ..method.policy import Policy
from .config import ObjectiveConfig
from .wrappers import entered, smallest

__all__ = ["Shared", "Sharing"]

#: share of a sequence that has to be context for ``"auto"``, and inputs of a model that can be split at a token
LEAST, SPLITTABLE = 1 / 8, {"attention_mask", "position_ids"}


@dataclass(frozen=True, eq=False)
class Shared:
    """The suffix of a micro-batch.

    Attributes:
        policy: a function of the suffix.
        batch: its tokens.
        x: its embeddings, attached.
        losses: ``[B]``, sums of the context's own losses, attached.
        counts: ``[B]``, learnt tokens of the whole rows, at least 1.
    """

    policy: Policy
    batch: Prepared
    x: Tensor
    losses: Tensor
    counts: Tensor


class Sharing:
    """Decides for every micro-batch whether its context is shared.

    Args:
        config: of the objective, whose ``share_context`` says how.

    Attributes:
        reason: one sentence why a context was not shared, the last one; None if none was refused.
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config
        self.reason: str | None = None
        self._is_refused = False

    def of(
        self, policy: Policy, batch: Prepared, x: Tensor, enter: Any = None, group: Any = None
    ) -> Shared | None:
        """The micro-batch with a context that is shared; None where there is none to be shared.

        Args:
            policy: how the model is called.
            batch: the whole micro-batch.
            x: its embeddings.
            enter: gathers the parameters of a sharded model for a function (:func:`.wrappers.entered`).
            group: of processes that call the model equally often, and share the smallest of their contexts or none.

        Raises:
            ValueError, TypeError, UnsupportedOperation: ``share_context=True`` and the context cannot be shared.
        """
        mode, start = self.config.share_context, start_of(batch)
        if mode is False:
            return None
        if self._is_refused or (mode == "auto" and start < LEAST * x.shape[1]):
            start = 0
        if start:
            try:
                self._check(policy, batch)
            except ValueError as error:
                if mode is True:
                    raise
                self.reason, start = str(error), 0
        is_scored = bool(start and batch.masks[0, :, :start].any())
        start, is_unscored = smallest([start, not is_scored], group, x.device)
        if not start:
            return None
        try:
            return _shared(policy, batch, x, start, not is_unscored, enter or entered(nn.Module()))
        except (UnsupportedOperation, TypeError, ValueError) as error:
            if mode is True:
                raise
            self.reason = str(error)
            # a model refuses always; values are those of a batch, which a training that resumes does not remember
            self._is_refused = not isinstance(error, ValueError)
        return None

    def _check(self, policy: Policy, batch: Prepared) -> None:
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


def start_of(batch: Prepared) -> int:
    """Tokens before the first that may be attacked in any row; 0 where all may be, or none."""
    if batch.attackable is None:
        return 0
    mask = batch.masks[2]
    first = first_included(mask)
    return first if first < mask.shape[1] else 0


def _shared(policy: Policy, batch: Prepared, x: Tensor, start: int, is_scored: bool, enter: Any) -> Shared:
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
    return Shared(suffix, batch.suffix(start), context.x, losses, learnt.sum(-1).clamp(min=1))
