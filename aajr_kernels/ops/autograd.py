"""The base of the ops' autograd Functions."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends.errors import refuse_transform
from ..torch_private import alive, bare_apply, transforms_active

__all__ = ["Function", "is_taken_down", "taken_down"]


class _State(threading.local):
    """State of `taken_down`, per thread: other threads run other layers."""

    #: takes (Function, arguments) in the place of autograd
    taker: Callable[..., Any] | None = None


_state = _State()


def taken_down(taker: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """Have calls of this thread's Functions go to `taker` from now on, None: to autograd; returns the one before."""
    before, _state.taker = _state.taker, taker
    return before


def is_taken_down() -> bool:
    """Whether calls of this thread's Functions go elsewhere than to autograd."""
    return _state.taker is not None


class Function(torch.autograd.Function):
    """An autograd Function over stacked tensors: its ``apply`` refuses transforms of torch, and is given no Dual.

    So it needs no guard that looks for Duals, which takes longer than torch's own work for a call.
    """

    _apply: Callable[..., Any]

    def __init_subclass__(cls) -> None:
        cls._apply = staticmethod(bare_apply(cls))

    @classmethod
    def apply(cls, *args: Any) -> Any:
        # torch.compile cannot trace a look into the state of a thread
        if not torch.compiler.is_compiling() and _state.taker is not None:
            return _state.taker(cls, args)
        if transforms_active():
            refuse_transform()
        try:
            return cls._apply(*[alive(x) if isinstance(x, Tensor) else x for x in args])
        except RuntimeError as error:  # torch's message is for the author of the Function
            if "implement the jvp" in str(error):
                refuse_transform(error)
            raise
