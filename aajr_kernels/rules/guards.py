"""Guards at places of torch where a Dual would silently lose its derivative.

``autograd.Function.apply`` sees no tensor in a Dual and would record no gradient: it raises. The full backward hooks
of modules are attached to tensors and would not run: they warn. Multi-head attention does not check its masks for
Duals: a guard does. Parameters and buffers would detach a Dual, and control flow (``torch.cond``) would map over the
stack: they raise. All are installed at the first ``dual()`` and pass through where no Dual is involved.
"""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import BackwardHook

from .. import torch_private
from ..backends.errors import UnsupportedOperation, unsupported
from ..dual import Dual, dispatch
from ..torch_private import pytree
from . import composites
from .common import is_dual
from .registry import GUARDS, rule

_REMEDY = (
    "call it on plain tensors, replace it by differentiable torch functions, or give the function around it a "
    "rule that applies it to x.stacked"
)

#: module and qualified name of an autograd.Function -> what its ``apply`` does with a Dual; called with the real apply
FUNCTION_RULES: dict[str, Callable[..., Any]] = {}


def function_rule(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the rule of ``Function.apply`` for Duals, by the name of the class, which need not be loaded."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        FUNCTION_RULES[name] = function
        return function

    return decorate


def linear_function(function: str | type[torch.autograd.Function]) -> Any:
    """Declare an autograd.Function linear in its one tensor, independent of axes: it is applied to the stack of a Dual.

    Sums over processes are of this kind. Usable as a decorator of the class.

    Args:
        function: the class, or its module and qualified name joined by a dot.
    """

    def stacked(apply: Callable[..., Any], *args: Any, **kwargs: Any) -> Dual:
        args = tuple(value.stacked if is_dual(value) else value for value in args)
        return Dual(apply(*args, **kwargs))

    FUNCTION_RULES[function if isinstance(function, str) else _qualified(function)] = stacked
    return function


@function_rule(torch_private.CHECKPOINT_SAVER)
def _save_arguments(apply: Callable[..., Any], *args: Any) -> torch.Tensor:
    """A checkpoint saves Duals like tensors: by their stacks, which an outer checkpoint may drop."""
    saver: torch.Tensor = apply(*(arg.stacked if is_dual(arg) else arg for arg in args))
    are_duals = [is_dual(arg) for arg in args[1:]]
    torch_private.on_recomputation(
        saver,
        lambda values: [Dual(value) if is_one else value for value, is_one in zip(values, are_duals)],
    )
    return saver


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


#: types of most arguments, which hold no Dual: to look into them as trees takes longer than starting a kernel
_PLAIN = {torch.Tensor, nn.Parameter, type(None), bool, int, float, str, torch.dtype}


def _holds_dual(values: tuple[Any, ...] | list[Any]) -> bool:
    for value in values:
        if type(value) in _PLAIN:
            continue
        if type(value) in (tuple, list):
            if _holds_dual(value):
                return True
        elif any(map(is_dual, pytree.tree_leaves(value, is_leaf=is_dual))):
            return True
    return False


def guard_functions() -> None:
    """Make every ``autograd.Function`` raise on a Dual, also through an ``apply`` bound earlier. Idempotent."""
    torch_private.watch_functions(_apply, _refuse)


def _apply(apply: Callable[..., Any], cls: type, *args: Any, **kwargs: Any) -> Any:
    if not _holds_dual((*args, *kwargs.values())):
        return apply(*args, **kwargs)
    known = FUNCTION_RULES.get(_qualified(cls))
    if known is None:
        return _refuse(cls, (args, kwargs))
    return known(apply, *args, **kwargs)


def _refuse(cls: type, args: tuple[Any, ...]) -> None:
    if not _holds_dual(args):
        return
    reentrant = cls.__name__ == "CheckpointFunction"
    remedy = "use non-reentrant checkpointing (use_reentrant=False)" if reentrant else _REMEDY
    raise UnsupportedOperation(f"{_qualified(cls)}.apply would drop the gradient of a Dual: {remedy}.")


def _warning(original: Callable[..., Any], what: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def setup(self: BackwardHook, values: Any) -> Any:
        if not _holds_dual((values,)):
            return original(self, values)
        warnings.warn(
            f"the backward hooks of {type(self.module).__name__} do not see its {what}, which is a Dual: put a hook on "
            "y.stacked, whose gradient is [1 + K, *shape].",
            stacklevel=4,
        )
        return values

    return setup


def guard_backward_hooks() -> None:
    """Make full backward hooks warn when a module takes or returns a Dual. Idempotent."""
    torch_private.watch_backward_hooks(_warning)


def guard_attention_masks() -> None:
    """Make multi-head attention recognise a Dual among arguments that it does not check, such as masks. Idempotent."""

    def seen(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if any(is_dual(value) for value in (*args, *kwargs.values())):
            return dispatch(original, args, kwargs)
        return original(*args, **kwargs)

    for function in torch_private.watch_multi_head_attention(seen, composites.dtype_of_mask):
        rule(function, kind="op")(composites.multi_head_attention)


def guard_parameters() -> None:
    """Make ``nn.Parameter`` and ``nn.Buffer`` raise on a Dual, which they would detach. Idempotent."""
    for cls in (nn.Parameter, nn.Buffer):
        if not hasattr(cls.__new__, "_aajr_refuses_duals"):
            cls.__new__ = staticmethod(_refusing(cls.__new__))  # type: ignore[method-assign]


def _refusing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def new(cls: type, data: Any = None, *args: Any, **kwargs: Any) -> Any:
        if is_dual(data):
            raise UnsupportedOperation(f"nn.{cls.__name__} would drop the tangent of a Dual: pass y.primal.")
        return original(cls, data, *args, **kwargs)

    new._aajr_refuses_duals = True  # type: ignore[attr-defined]
    return new


#: functions of torch's control flow -> what to write in their place
_CONTROL_FLOW = dict.fromkeys(("cond", "switch"), "torch.where or if") | dict.fromkeys(
    ("while_loop", "scan", "associative_scan", "map"), "a loop in Python"
)


def guard_control_flow() -> None:
    """Make ``torch.cond`` and other control flow raise if a Dual is among their operands, or captured. Idempotent."""

    def refusing(name: str, remedy: str) -> Callable[..., Any]:
        def call(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            is_constant = name == "cond" and args and isinstance(args[0], (bool, int, float))
            if not is_constant and (_reaches_dual(args) or _reaches_dual(tuple(kwargs.values()))):
                unsupported(f"torch.{name} has no derivative rule for a Dual: write {remedy}.")
            return original(*args, **kwargs)

        return call

    torch_private.watch_control_flow({name: refusing(name, remedy) for name, remedy in _CONTROL_FLOW.items()})


def _reaches_dual(value: Any) -> bool:
    """Whether a Dual is in a tree of operands, or captured by a function among them; Dynamo can trace it."""
    if is_dual(value):
        return True
    if isinstance(value, dict):
        return any(_reaches_dual(entry) for entry in value.values())
    if isinstance(value, (tuple, list)):
        return any(_reaches_dual(entry) for entry in value)
    if torch.compiler.is_compiling() or not inspect.isfunction(value):
        return False
    captured = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
    captured += [value.__globals__.get(name) for name in value.__code__.co_names]
    return any(map(is_dual, captured))


GUARDS += [
    guard_functions,
    guard_backward_hooks,
    guard_attention_masks,
    guard_parameters,
    guard_control_flow,
    torch_private.pass_weight_of_l1_loss,
]
