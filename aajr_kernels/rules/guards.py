"""Guards at places of torch where a Dual would lose its derivative in silence.

``autograd.Function.apply`` sees no tensor in a Dual and would record no gradient: it raises. The full backward hooks
of modules are attached to tensors and would not run: they warn. Both are installed at the first ``dual()`` and pass
through where no Dual is involved.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.utils
import torch.utils._pytree as pytree
from torch.utils.hooks import BackwardHook

from ..dual import Dual
from ..runtime import GUARDS, UnsupportedOperation
from .common import is_dual

__all__ = [
    "function_rule",
    "guard_backward_hooks",
    "guard_bound_functions",
    "guard_functions",
    "linear_function",
]


_REMEDY = (
    "call it on plain tensors, replace it by differentiable torch functions, or give the function around it a "
    "rule that applies it to x.stacked"
)


#: module and qualified name of an autograd.Function -> what its ``apply`` does with a Dual; called with the real apply
FUNCTION_RULES: dict[str, Callable[..., Any]] = {}


def function_rule(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what ``autograd.Function.apply`` does with Duals, by the name of the class, which need not be loaded."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        FUNCTION_RULES[name] = function
        return function

    return decorate


def linear_function(function: str | type[torch.autograd.Function]) -> Any:
    """Declare that an autograd.Function is linear in its one tensor and knows no axes: a Dual passes it stacked.

    Sums over processes are of this kind. Usable as a decorator of the class.

    Args:
        function: the class, or its module and qualified name joined by a dot.
    """

    def stacked(apply: Callable[..., Any], *args: Any, **kwargs: Any) -> Dual:
        args = tuple(value.stacked if is_dual(value) else value for value in args)
        return Dual(apply(*args, **kwargs))

    FUNCTION_RULES[function if isinstance(function, str) else _qualified(function)] = stacked
    return function


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _holds_dual(values: Any) -> bool:
    return any(is_dual(leaf) for leaf in pytree.tree_leaves(values, is_leaf=is_dual))


def guard_functions() -> None:
    """Make ``autograd.Function.apply`` raise on a Dual. Idempotent."""
    original = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]
    if hasattr(original, "_refuses_duals"):
        return

    @functools.wraps(original)
    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if _holds_dual((args, kwargs)):
            known = FUNCTION_RULES.get(_qualified(cls))
            if known is not None:
                return known(functools.partial(original, cls), *args, **kwargs)
            remedy = (
                "use non-reentrant checkpointing (use_reentrant=False)"
                if cls.__name__ == "CheckpointFunction"
                else _REMEDY
            )
            raise UnsupportedOperation(
                f"{cls.__module__}.{cls.__qualname__}.apply would drop the gradient of a Dual: {remedy}."
            )
        return original(cls, *args, **kwargs)

    apply._refuses_duals = True  # type: ignore[attr-defined]
    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign,assignment]


def guard_bound_functions() -> None:
    """Make an ``apply`` that was bound before the guard raise too: its body unwraps its arguments here. Idempotent."""
    utils = torch._functorch.utils
    original = getattr(utils, "unwrap_dead_wrappers", None)
    if original is None or hasattr(original, "_refuses_duals"):
        return

    @functools.wraps(original)
    def unwrap(args: Any) -> Any:
        if _holds_dual(args):
            raise UnsupportedOperation(f"an autograd.Function would drop the gradient of a Dual: {_REMEDY}.")
        return original(args)

    unwrap._refuses_duals = True  # type: ignore[attr-defined]
    utils.unwrap_dead_wrappers = unwrap


def _warning(original: Callable[..., Any], what: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def setup(self: BackwardHook, values: Any) -> Any:
        if not _holds_dual(values):
            return original(self, values)
        warnings.warn(
            f"the backward hooks of {type(self.module).__name__} do not see its {what}, which is a Dual: put a hook on "
            "y.stacked, whose gradient is [1 + K, *shape].",
            stacklevel=4,
        )
        return values

    setup._warns_of_duals = True  # type: ignore[attr-defined]
    return setup


def guard_backward_hooks() -> None:
    """Make full backward hooks warn when a module takes or returns a Dual. Idempotent."""
    for name, what in (("setup_input_hook", "input"), ("setup_output_hook", "output")):
        original = getattr(BackwardHook, name)
        if not hasattr(original, "_warns_of_duals"):
            setattr(BackwardHook, name, _warning(original, what))


GUARDS += [guard_functions, guard_bound_functions, guard_backward_hooks]
