"""What a device really reaches, measured in the run that compares with it: a large product and a copy."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .case import DTYPES


@dataclass(frozen=True)
class Ceilings:
    """Largest rates of a device.

    Attributes:
        flops: operations a second of a square product in the dtype, by the vendor's library.
        bytes: a second, read and written by a copy.
    """

    flops: float
    bytes: float


@functools.cache
def measured(device: str, dtype: str) -> Ceilings:
    """The ceilings of a device, found once a process.

    Half a second each: a matrix of 8192 squared, and a copy of a gigabyte, which no cache holds. On a CPU a matrix of
    1024 and 256 MB will do; and where it has no instructions for the dtype, float32 is the faster way to compute in it.
    """
    if device != "cpu":
        return measure(device, dtype, size=8192, numbers=2**29, seconds=0.5)
    found = measure(device, dtype, size=1024, numbers=2**27, seconds=0.5)
    if dtype == "float32":
        return found
    return Ceilings(max(found.flops, measured(device, "float32").flops), found.bytes)


def measure(device: str, dtype: str, size: int, numbers: int, seconds: float) -> Ceilings:
    """The same at any size."""
    a, b = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
    out = torch.empty_like(a)
    product = _fastest(lambda: torch.mm(a, b, out=out), device, seconds)
    x = torch.zeros(numbers, dtype=torch.bfloat16, device=device)
    y = torch.empty_like(x)
    copy = _fastest(lambda: y.copy_(x), device, seconds)
    return Ceilings(2.0 * size**3 / product, 2.0 * x.numel() * x.element_size() / copy)


def _fastest(call: Callable[[], object], device: str, seconds: float) -> float:
    """Least seconds of a call; ten at a time, so that starting them costs nothing."""
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    call()
    wait()
    least, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or least == float("inf"):
        start = time.perf_counter()
        for _ in range(10):
            call()
        wait()
        least = min(least, (time.perf_counter() - start) / 10)
    return least
