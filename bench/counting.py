"""Arithmetic of an element-wise op: that of its formula, written out, as PyTorch differentiates it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from aajr_kernels.torch_private import TorchDispatchMode

from .case import Run

#: kernels that move numbers and compute none
MOVES = ("clone", "copy_", "_to_copy", "fill", "zeros", "ones", "empty", "stack", "cat")


class _Counter(TorchDispatchMode):
    """One operation for every number that an element-wise kernel writes or a reduction reads."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if isinstance(out, Tensor) and not func.is_view and not name.startswith(MOVES):
            first = args[0] if args and isinstance(args[0], Tensor) else out
            self.count += max(out.numel(), first.numel())
        return out


def operations(run: Run) -> int:
    """Operations of one call."""
    run.call()  # tables that are made once are no arithmetic of the op
    with _Counter() as counter:
        run.call()
    return counter.count
