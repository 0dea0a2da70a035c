"""State of a training in several processes, for ``torch.distributed.checkpoint``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["TrainingState"]


class TrainingState:
    """Model, optimizer, scheduler and step as one object that ``torch.distributed.checkpoint`` saves and loads.

    Every process writes its shards and reads the shards it needs, so that a training may continue with another number
    of processes or another mesh. Seed the generator of an attack from seed, step and micro-batch
    (``torch.Generator().manual_seed(...)``): then no state of random generators has to be saved.

    >>> state = TrainingState(model, optimizer)  # doctest: +SKIP
    >>> state.step = 100  # doctest: +SKIP
    >>> torch.distributed.checkpoint.save({"training": state}, checkpoint_id="runs/step-100")  # doctest: +SKIP
    >>> torch.distributed.checkpoint.load({"training": state}, checkpoint_id="runs/step-100")  # doctest: +SKIP

    Args:
        model: the trained model: wrapped by ``fully_shard``, ``parallelize_module`` or DistributedDataParallel, or
            plain. Its parameters and buffers are stored under the names that the unwrapped model has.
        optimizer: of its parameters, or None.
        scheduler: an object with ``state_dict`` and ``load_state_dict``, or None.
        step: number of optimizer steps taken; set it before saving, read it after loading.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any = None,
        step: int = 0,
    ) -> None:
        self.model, self.optimizer, self.scheduler, self.step = model, optimizer, scheduler, step

    def state_dict(self) -> dict[str, Any]:
        """The state, in shards where the model is."""
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.model, self._optimizers())
        state: dict[str, Any] = {"model": model, "step": torch.tensor(self.step)}
        if self.optimizer is not None:
            state["optimizer"] = optimizer
        if self.scheduler is not None:
            state["scheduler"] = self.scheduler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state into model, optimizer and scheduler."""
        from torch.distributed.checkpoint.state_dict import set_state_dict

        set_state_dict(
            self.model,
            self._optimizers(),
            model_state_dict=state["model"],
            optim_state_dict=state.get("optimizer", {}),
        )
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.step = int(state["step"])

    def _optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        return () if self.optimizer is None else (self.optimizer,)
