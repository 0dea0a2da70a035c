"""Growth of memory per step: resident set, bytes that Python allocates, objects that its collector knows."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass

import torch

from common import meter

#: looks at the memory in one measurement
LOOKS = 20


@dataclass(frozen=True)
class Slope:
    """By least squares.

    Attributes:
        per_step: bytes or objects.
        noise: standard error of it.
    """

    per_step: float
    noise: float

    @classmethod
    def of(cls, steps: list[int], values: list[int]) -> Slope:
        x, y = (torch.tensor(z, dtype=torch.float64) for z in (steps, values))
        x, y = x - x.mean(), y - y.mean()
        slope = (x * y).sum() / x.square().sum()
        spread = (y - slope * x).square().sum() / (len(steps) - 2)
        return cls(float(slope), float((spread / x.square().sum()).sqrt()))

    def exceeds(self, limit: float) -> bool:
        """Whether it is larger than a limit by more than its noise explains."""
        return self.per_step - 4 * self.noise > limit


@dataclass(frozen=True)
class Growth:
    """Of one kind of steps.

    Attributes:
        steps: measured.
        resident: bytes of the process.
        traced: bytes of Python's allocator.
        objects: of the collector.
    """

    steps: int
    resident: Slope
    traced: Slope
    objects: Slope

    def faults(self) -> list[str]:
        """A sentence for every kind of memory that grows.

        Pools of memory fill during the first thousands of steps: of few steps the limits of bytes are wider. Whatever
        stays alive is an object, whose limit is the same.
        """
        few = self.steps < 1000
        limits = {"objects": 0.05, "traced": 2048.0 if few else 4.0, "resident": 8192.0 if few else 64.0}
        slopes = {name: getattr(self, name) for name in limits}
        return [
            f"{name}: {slope.per_step:.3g} ± {slope.noise:.2g} per step"
            for name, slope in slopes.items()
            if slope.exceeds(limits[name])
        ]


class Meter:
    """Looks at the memory after every so many calls of :meth:`tick`.

    Args:
        steps: that are measured.
        warm: steps before, which fill caches and pools.
    """

    def __init__(self, steps: int, warm: int) -> None:
        self.steps, self.warm, self._done = steps, warm, 0
        self._at = {warm + 1 + steps * i // LOOKS for i in range(LOOKS + 1)}
        self._looks = torch.zeros(
            len(self._at), 4, dtype=torch.int64
        )  # made before, lest the meter grow itself
        self._looked = 0
        gc.collect()
        gc.freeze()  # what is there before the first step costs no time in later collections
        tracemalloc.start()

    def tick(self) -> None:
        """A step is done."""
        self._done += 1
        if self._done in self._at:
            gc.collect()
            meter._return_freed_memory()
            look = self._done, meter._resident(), tracemalloc.get_traced_memory()[0], len(gc.get_objects())
            self._looks[self._looked] = torch.tensor(look)
            self._looked += 1

    def growth(self) -> Growth:
        """The slopes, after all steps."""
        tracemalloc.stop()
        gc.unfreeze()
        assert self._done > self.warm + self.steps, "the steps ended before the measurement"
        steps, *values = self._looks.t().tolist()
        return Growth(self.steps, *(Slope.of(steps, column) for column in values))


def measured(step: Callable[[int], object], steps: int, warm: int) -> Growth:
    """The growth of so many calls, which get their number."""
    watch = Meter(steps, warm)
    for number in range(steps + warm + 1):
        step(number)
        watch.tick()
    return watch.growth()
