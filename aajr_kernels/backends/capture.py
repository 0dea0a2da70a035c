"""CUDA graphs: whether one is being captured, and the refusal of what it cannot hold.

While a graph is captured nothing is computed, so the host can read no value: checks of values are left out, and what
depends on a value is refused (:func:`refuse`). A rehearsal does the same outside of a capture, so that the kernels that
it will take are compiled, checked and loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from .errors import UnsupportedOperation

__all__ = ["is_capturing", "reads_no_value", "refuse", "rehearsal"]

#: of the process, not of a thread: a backward has threads of its own
_rehearsing = False


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph of what runs on that device is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def reads_no_value(device: torch.device) -> bool:
    """Whether the host may not read values from that device: in a capture, or in its rehearsal."""
    return (_rehearsing and device.type == "cuda") or is_capturing(device)


@contextlib.contextmanager
def rehearsal() -> Iterator[None]:
    """Inside, everything is done as in a capture, on CUDA devices."""
    global _rehearsing
    _rehearsing = True
    try:
        yield
    finally:
        _rehearsing = False


def refuse(device: torch.device, what: str, remedy: str) -> None:
    """Raise :class:`UnsupportedOperation` in a capture or its rehearsal.

    Args:
        device: of the tensors.
        what: names the argument or function, and why a graph cannot hold it.
        remedy: what to do.
    """
    if reads_no_value(device):
        raise UnsupportedOperation(f"{what}, which a captured CUDA graph cannot: {remedy}.")
