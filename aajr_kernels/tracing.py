"""What torch.compile has to be told about Duals: that they may stand in tuples, and pass through checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from .dual import Dual, dispatch
from .runtime import TRACED, UnsupportedOperation
from .torch_private import TRACED_CHECKPOINT

__all__ = ["call", "tuple_arguments"]


class tuple_arguments(TorchFunctionMode):
    """Context in which torch functions find the Duals in tuples and lists, as in ``torch.cat((a, b))``.

    Eager torch looks into such arguments by itself. While torch.compile traces it does not, and hands the Dual to
    torch.cat as if it were a tensor. :func:`aajr_kernels.aligned_penalty` and :func:`aajr_kernels.jvp` enter this
    context around what they call; code that builds a Dual by itself and is compiled enters it, inside the compiled
    function. Outside of compiled code it changes nothing.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _in_sequences(args) or _in_sequences(kwargs.values()):
            return dispatch(func, args, kwargs)
        return func(*args, **kwargs)


def call(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, in that context where torch.compile traces it."""
    if torch.compiler.is_compiling():
        with tuple_arguments():
            return function(*args)
    try:
        return function(*args)
    except TypeError as error:
        # Python refuses before torch is asked: the descriptors of torch.Tensor take instances of its class in C
        if "'Dual'" in str(error) and (unbound := re.match(r"descriptor '(\w+)'", str(error))):
            name = unbound.group(1)
            raise UnsupportedOperation(
                f"torch.Tensor.{name} cannot be called unbound with a Dual, of which torch is not told: call the "
                f"method of the Dual, x.{name}(...), or the function of torch of that name."
            ) from error
        raise


def _checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What torch.compile makes of non-reentrant checkpointing: tensors go in, a Dual is made of them inside."""
    are_duals = [isinstance(arg, Dual) for arg in args]

    def inside(*values: Any) -> Any:
        return function(*(Dual(value) if dual else value for value, dual in zip(values, are_duals)))

    return checkpoint(inside, *(arg.stacked if isinstance(arg, Dual) else arg for arg in args), **kwargs)


TRACED[TRACED_CHECKPOINT] = _checkpoint


def _in_sequences(values: Iterable[Any]) -> bool:
    for value in values:
        if isinstance(value, (tuple, list)):
            for item in value:
                if isinstance(item, Dual):
                    return True
    return False
