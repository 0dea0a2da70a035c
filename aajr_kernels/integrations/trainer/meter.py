"""Means of what the objective consists of, from one log of a trainer to the next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...method.report import StabilityReport

__all__ = ["Meter"]


class Meter:
    """Collects the parts of micro-batches; nothing waits for the device before it is read.

    A part is a share of its step: shares are added up over micro-batches and processes and averaged over steps. What
    ends in ``_max`` is a maximum.
    """

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps: dict[str, set[int]] = {}
        self.settings: dict[str, float] = {}
        self.stability: dict[str, float] = {}

    def add(self, step: int, parts: Mapping[str, Tensor], settings: Mapping[str, float]) -> None:
        """Of one micro-batch: its shares, and numbers that hold for the whole step, of which the last are kept."""
        for name, value in parts.items():
            wide = value.detach().double()
            if name not in self.sums:
                self.sums[name] = wide
            elif name.endswith("_max"):
                self.sums[name] = torch.maximum(self.sums[name], wide)
            else:
                self.sums[name] = self.sums[name] + wide
            self.steps.setdefault(name, set()).add(step)
        self.settings.update(settings)

    def report(self, report: StabilityReport) -> None:
        """A report's summary; the last before a log is kept."""
        summary = {f"stability/{name}": value for name, value in report.summary().items()}
        self.stability = {name: value for name, value in summary.items() if math.isfinite(value)}

    def taken(self, accelerator: Any, across: bool = True) -> dict[str, float]:
        """The numbers since the last call; all processes call this.

        Args:
            accelerator: of accelerate.
            across: shares are of all processes; False: of every process by itself, and averaged.
        """
        names = sorted(self.sums)
        largest = [name for name in names if name.endswith("_max")]
        added = [name for name in names if name not in largest]
        means: dict[str, float] = {}
        if added:
            sums = torch.stack([self.sums[name] / len(self.steps[name]) for name in added])
            reduced = accelerator.reduce(sums, "sum" if across else "mean")
            means.update(zip(added, reduced.tolist()))
        if largest:
            values = torch.stack([self.sums[name] for name in largest])
            rows = accelerator.gather(values).reshape(-1, len(largest))
            means.update(zip(largest, rows.amax(0).tolist()))
        means |= self.settings | self.stability
        self._clear()
        return means
