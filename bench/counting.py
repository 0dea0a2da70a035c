"""Arithmetic of an element-wise op: what its formula, written out, does as PyTorch differentiates it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from aajr_kernels.torch_private import TorchDispatchMode

from .case import portion

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


def operations(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], cotangent: Tensor, part: str, stacked: bool
) -> int:
    """How many, of a function of `inputs` (and closed-over weights) or of its value and tangent.

    Args:
        function: the formula on plain tensors.
        inputs: leaves; with `stacked` ``[2, ...]``, primal and tangent.
        cotangent: like the output, stacked or not.
        part: of :data:`.case.PARTS`.
        stacked: count the dual.
    """

    def forward() -> Tensor:
        if not stacked:
            return function(*inputs)
        return torch.stack(torch.func.jvp(function, tuple(x[0] for x in inputs), tuple(x[1] for x in inputs)))

    forward()  # tables that are made once are not arithmetic of the op
    run = portion(forward, inputs, cotangent, part)  # the backward's forward is not counted
    with _Counter() as counter:
        run.call()
    return counter.count
