"""Errors that users of ops and rules meet, and the functions that raise them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from ..torch_private import break_graph

__all__ = ["BackendUnavailable", "UnsupportedOperation", "first_order", "refuse_transform", "unsupported"]


class UnsupportedOperation(NotImplementedError):
    """A function was called on a Dual for which no exact derivative rule is known.

    Not a TypeError: torch turns those into NotImplemented inside operators, and Python would then rebind the name in
    ``buffer += dual`` instead of raising.
    """


def unsupported(message: str) -> NoReturn:
    """Raise :class:`UnsupportedOperation`, in a way that reaches the user of compiled code too.

    Dynamo hides the text of exceptions in what it traces. Of a graph break it shows it, and without ``fullgraph=True``
    the code then runs as it stands and raises.
    """
    break_graph(message)
    raise UnsupportedOperation(message)


def refuse_transform(error: Exception | None = None) -> NoReturn:
    """Raise :class:`UnsupportedOperation`: an op with a hand-written backward ran inside a transform of torch."""
    raise UnsupportedOperation(
        "the ops of aajr_kernels are no functorch transforms (torch.func, forward_ad): take torch.autograd.grad, or "
        "aajr_kernels.jvp for a derivative along a direction."
    ) from error


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name that cannot run here; the message says why."""


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a ``Function.backward`` that has no derivative of its own: under create_graph=True it raises.

    ``torch.autograd.function.once_differentiable`` raises only in ``.backward()``; ``torch.autograd.grad`` with
    allow_unused=True and ``torch.autograd.functional.hvp`` get None or zeros from it.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        # grad mode is on in a backward exactly when it is to be recorded; tracing says nothing of that
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "the gradient of an aajr_kernels op has no derivative: call backward without create_graph=True."
            )
        return backward(ctx, *grads)

    return checked
