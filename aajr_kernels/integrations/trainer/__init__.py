"""``transformers.Trainer`` with the objective of the method in the place of its loss.

    trainer = AAJRTrainer(model, args, ..., objective=ObjectiveConfig(attack=..., penalty=...))

============  ================================================================================================
module        what is in it
============  ================================================================================================
``mixins``    :class:`AAJRTrainerMixin`, for trainers of language models, and :class:`AAJRPenaltyMixin`, for
              those with another loss
``checks``    models, wrappers and training arguments that do not go with it, in one sentence each
``meter``     means of the objective's parts between two logs
``grpo``      where TRL's GRPO has its tokens and advantages
``dialogue``  dialogues of agents, one of which GRPO trains
============  ================================================================================================

docs/trainer.md has the options and the limits.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from ..transformers.library import trainer_class
from .dialogue import DialogueRollout, dialogue_batch
from .mixins import AAJRPenaltyMixin, AAJRTrainerMixin

__all__ = ["AAJRPenaltyMixin", "AAJRTrainer", "AAJRTrainerMixin", "DialogueRollout", "dialogue_batch"]

if TYPE_CHECKING:
    from transformers import Trainer

    class AAJRTrainer(AAJRTrainerMixin, Trainer):
        """``transformers.Trainer`` with the objective of the method; see :class:`AAJRTrainerMixin`."""


@functools.cache
def _trainer() -> type:
    """The ready class, made when it is first asked for: transformers is not imported before."""
    made = type("AAJRTrainer", (AAJRTrainerMixin, trainer_class()), {"__module__": __name__})
    made.__doc__ = "``transformers.Trainer`` with the objective of the method; see :class:`AAJRTrainerMixin`."
    return made


def __getattr__(name: str) -> Any:
    if name == "AAJRTrainer":
        return _trainer()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
