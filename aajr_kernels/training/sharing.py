"""Whether the fixed context of a micro-batch is computed once, for the attack, the losses and the penalty.

The objective then works on the suffix (:mod:`aajr_kernels.method.sharing`); losses of the context's own tokens are a
constant of the attack and are added to the sums of their rows.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..backends.errors import UnsupportedOperation
from ..method.batch import Prepared
from ..method.policy import Policy
from ..method.sharing import Shared, check_splittable, shared_of, start_of
from .config import ObjectiveConfig
from .losses import reads_context
from .wrappers import entered, smallest

__all__ = ["Sharing"]


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
        mode = self.config.share_context
        start = start_of(batch, mode)
        if mode is False:
            return None
        if self._is_refused:
            start = 0
        if start:
            try:
                check_splittable(policy, batch)
            except ValueError as error:
                if mode is True:
                    raise
                self.reason, start = str(error), 0
        is_scored = bool(
            start and (batch.masks[0, :, :start].any() or reads_context(self.config, batch, start))
        )
        start, is_unscored = smallest([start, not is_scored], group, x.device)
        if not start:
            return None
        try:
            return shared_of(policy, batch, x, start, not is_unscored, enter or entered(nn.Module()))
        except (UnsupportedOperation, TypeError, ValueError) as error:
            if mode is True:
                raise
            self.reason = str(error)
            # a model refuses always; values are those of a batch, which a training that resumes does not remember
            self._is_refused = not isinstance(error, ValueError)
        return None
