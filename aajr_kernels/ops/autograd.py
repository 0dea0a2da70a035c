"""The base of the ops' autograd Functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends.errors import refuse_transform
from ..torch_private import alive, bare_apply, transforms_active

__all__ = ["Function"]


class Function(torch.autograd.Function):
    """An autograd Function over stacked tensors: its ``apply`` refuses transforms of torch, and is given no Dual.

    So it needs no guard that looks for Duals, which takes longer than torch's own work for a call.
    """

    _apply: Callable[..., Any]

    def __init_subclass__(cls) -> None:
        cls._apply = staticmethod(bare_apply(cls))

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if transforms_active():
            refuse_transform()
        try:
            return cls._apply(*[alive(x) if isinstance(x, Tensor) else x for x in args])
        except RuntimeError as error:  # torch's message is for the author of the Function
            if "implement the jvp" in str(error):
                refuse_transform(error)
            raise
