"""The position in the data that a checkpoint stores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from . import randomness

__all__ = ["Batches", "Stream"]

Batches = Iterable[Any] | Callable[[int], Iterable[Any]]


class Stream:
    """Micro-batches without end, and where in them a training is.

    What can be iterated again starts again when it is at its end. A checkpoint remembers the random states in which
    that last happened and how many batches came since: going there again, a shuffling ``DataLoader`` brings what it
    would have brought. A function is called with the number of micro-batches that came before instead, and can jump
    there.
    """

    def __init__(self, batches: Batches, device: torch.device) -> None:
        if not callable(batches) and not isinstance(batches, Iterable):
            raise TypeError(
                f"batches must be an iterable or a function from a position to one, got {type(batches).__name__}."
            )
        self.batches, self.device = batches, device
        self.epoch = self.position = self.total = 0
        self._iterator: Iterator[Any] | None = None
        self._start: dict[str, Any] = {}

    def take(self, count: int) -> list[Any]:
        """The next micro-batches.

        Raises:
            ValueError: there are no more.
        """
        return [self._next() for _ in range(count)]

    def state(self) -> dict[str, Any]:
        """For a checkpoint, together with the random states of now."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "total": self.total,
            "start": self._start,
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go where `state` was; random states are left anywhere.

        Raises:
            ValueError: there are fewer batches than had been used.
        """
        self.epoch, self.total, position = state["epoch"], state["total"], state["position"]
        if callable(self.batches):
            self.position = position
            return
        if not position:
            return
        randomness.restore(state["start"], self.device, self._generators())
        self._begin()
        for n in range(position):
            try:
                next(self._iterator)  # type: ignore[arg-type]
            except StopIteration:
                raise ValueError(
                    f"batches ended after {n}, but the checkpoint had used {position}: resume with the same data."
                ) from None
        self.position = position

    def _begin(self) -> None:
        if callable(self.batches):
            self._iterator = iter(self.batches(self.total))
            return
        self._start = randomness.capture(self.device, self._generators())
        self._iterator = iter(self.batches)

    def _generators(self) -> list[torch.Generator]:
        """The generators of a DataLoader and of its sampler."""
        owners = (self.batches, getattr(self.batches, "sampler", None))
        generators = [getattr(owner, "generator", None) for owner in owners]
        return list({id(g): g for g in generators if isinstance(g, torch.Generator)}.values())

    def _next(self) -> Any:
        if self._iterator is None:
            self._begin()
        for again in (True, False):
            try:
                batch = next(self._iterator)  # type: ignore[arg-type]
            except StopIteration:
                if not again or (self._iterator is self.batches and not callable(self.batches)):
                    break
                self.epoch, self.position = self.epoch + (self.position > 0), 0
                self._begin()
            else:
                self.position, self.total = self.position + 1, self.total + 1
                return batch
        raise ValueError(
            f"batches ended after {self.total}, before the training did: give more, or what can be iterated again (a "
            "list, a DataLoader, a function from a position to an iterable)."
        )
