"""Wall time and peak memory of one call, on a CPU or a GPU, and how far several times can be trusted."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_STATM, _STATUS, _CLEAR = (Path("/proc/self") / name for name in ("statm", "status", "clear_refs"))


@dataclass(frozen=True)
class Cost:
    """Time and memory of one call.

    Attributes:
        seconds: wall time.
        peak_bytes: peak memory above that in use before the call; None where the system does not tell.
    """

    seconds: float
    peak_bytes: int | None


def _resident() -> int:
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _return_freed_memory() -> None:
    """Hand freed heap pages back, so that the next call does not live on what the last one left."""
    libc = ctypes.CDLL(ctypes.util.find_library("c"))
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


class _HighWater:
    """The system's own mark of the highest resident memory, set back to what is resident now.

    It misses nothing, however busy the machine is.

    Raises:
        OSError: it cannot be set back here.
    """

    def __init__(self) -> None:
        _CLEAR.write_text("5")
        self.start_bytes = _resident()

    def finish(self) -> int:
        (line,) = [line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
        return max(0, 1024 * int(line.split()[1]) - self.start_bytes)


class _PeakSampler(threading.Thread):
    """Watches the resident memory of this process from the side, every two milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes = self.peak_bytes = _resident()
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.002):
            self.peak_bytes = max(self.peak_bytes, _resident())

    def finish(self) -> int:
        self._done.set()
        self.join()
        return max(self.peak_bytes, _resident()) - self.start_bytes


#: a spread above this is worth a sentence: the minimum itself may be far off then
WIDE = 0.25


def spread(seconds: Sequence[float]) -> float | None:
    """How far the median of several times lies above their minimum, relative to it; None of a single time."""
    return statistics.median(seconds) / min(seconds) - 1 if len(seconds) > 1 else None


def judged(spreads: Sequence[float | None]) -> str:
    """A sentence to put below a table of minimal times."""
    known = [one for one in spreads if one is not None]
    if len(known) < len(spreads):
        return "Single times: a busy moment of the machine changes them and their ratios."
    if max(known) > WIDE:
        return f"The spread is wide, up to {max(known):.0%}: the machine was busy, and times and ratios may be far off."
    return ""


def measure(call: Callable[[], Any], device: torch.device) -> tuple[Any, Cost]:
    """Run `call` once; its result and what it took."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        start = time.perf_counter()
        result = call()
        torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        return result, Cost(seconds, torch.cuda.max_memory_allocated(device) - before)
    sampler: _HighWater | _PeakSampler | None = None
    if _STATM.exists():
        _return_freed_memory()
        try:
            sampler = _HighWater()
        except OSError:  # some containers
            sampler = _PeakSampler()
            sampler.start()
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    return result, Cost(seconds, None if sampler is None else sampler.finish())
