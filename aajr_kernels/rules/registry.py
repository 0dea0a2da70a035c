"""The tables that rules and guards of torch enter themselves in, and in which the number looks them up.

It lies below :mod:`aajr_kernels.dual` and knows neither the number nor any rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F

from ..backends.errors import UnsupportedOperation, unsupported
from ..coverage import function_name
from ..torch_private import NN, VARIABLE_FUNCTIONS, is_tested, separate_outputs
from ..torch_private import mark_constant as constant
from .leaving import as_number, is_numpy

#: torch function -> rule, called with the function's own arguments (some of them Duals)
RULES: dict[Callable[..., Any], Callable[..., Any]] = {}
#: torch function -> "view" | "torch" | "op" | "fallback": what coverage() calls it ("op" records itself)
KINDS: dict[Callable[..., Any], str] = {}

#: torch function -> rule where an argument is complex: of ``rules/complex.py``, or the same where that is right
COMPLEX: dict[Callable[..., Any], Callable[..., Any]] = {}

#: name -> rule of what torch.compile calls in place of a function, and does not find in a table by itself
TRACED: dict[str, Callable[..., Any]] = {}

#: method name -> rule: torch.compile cannot look up the methods that torch writes in Python by themselves
METHODS: dict[str, Callable[..., Any]] = {}

_NAMESPACES = (torch, torch.Tensor, F, NN, torch.special, torch.linalg, VARIABLE_FUNCTIONS)


def functions_named(name: str) -> list[Callable[..., Any]]:
    """Every torch callable of that name: function, method, functional wrapper and the builtin behind it."""
    named = [getattr(namespace, name, None) for namespace in _NAMESPACES]
    return list(dict.fromkeys(f for f in named if callable(f) and not isinstance(f, type)))


def register(func: Callable[..., Any], rule: Callable[..., Any], kind: str) -> None:
    """Enter the rule of one torch callable; :func:`rule` is the form for users."""
    RULES[func], KINDS[func] = rule, kind
    name = getattr(func, "__name__", "")
    if getattr(torch.Tensor, name, None) is func:
        METHODS[name] = rule


def rule(*targets: str | Callable[..., Any], kind: str = "torch") -> Callable[[Callable[..., Any]], Any]:
    """Register a derivative rule.

    Args:
        targets: torch callables, or names that are looked up in torch, torch.Tensor, torch.nn.functional,
            torch.special and torch.linalg (all matches are registered).
        kind: what :func:`coverage` reports: ``"torch"``, ``"view"``, ``"fallback"``, or ``"op"`` for rules that call
            an op which records itself.

    Returns:
        A decorator. The rule is called with the function's own arguments, of which at least one is or contains a Dual.

    Raises:
        LookupError: a name matches no torch function, on a version of torch that the suite has run on.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for target in targets:
            matches = functions_named(target) if isinstance(target, str) else [target]
            if not matches and is_tested():  # a newer torch may have dropped the function
                raise LookupError(f"no torch function is called {target!r}.")
            for match in matches:
                register(match, function, kind)
        return function

    return decorate


#: names by which torch takes NumPy's keywords, and the operands after the first in the order of their positions
_ALIASES = {"axis": "dim", "keepdims": "keepdim", "self": "input"}
_OPERANDS = "mat1 mat batch1 tensor1 vec1 other exponent mat2 batch2 tensor2 vec vec2 tensor".split()


def positional(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Operands that were named moved to their places, and NumPy's keywords under torch's names.

    Rules name their operands as the mathematics does; torch's builtins accept ``input=``, ``other=``, ``mat2=``...
    """
    if "condition" in kwargs or "sorted_sequence" in kwargs:
        return args, kwargs  # torch.where and searchsorted, whose ``input`` is the second operand
    kwargs = {_ALIASES.get(name, name): value for name, value in kwargs.items()}
    if not args and "input" in kwargs:
        args = (kwargs.pop("input"),)
    if "input" not in kwargs:
        args = (*args, *(kwargs.pop(name) for name in _OPERANDS if name in kwargs))
    return args, kwargs


def holds_complex(values: Iterable[Any]) -> bool:
    """Whether a complex Dual, tensor or number is among the arguments of a call, or in a list of them."""
    for value in values:
        if isinstance(value, (list, tuple)):
            if holds_complex(value):
                return True
        elif isinstance(value, complex):
            return True
        else:
            value = getattr(value, "stacked", value)  # of a Dual
            if isinstance(value, torch.Tensor) and value.is_complex():
                return True
    return False


def settled(
    func: Callable[..., Any], rule: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The rule and the arguments for it: operands at their places, NumPy's numbers as Python's, complex or not."""
    if holds_complex([*args, *kwargs.values()]):
        rule = COMPLEX.get(func)
        if rule is None:
            unsupported(
                f"{function_name(func)} has no derivative rule for complex numbers: take their parts with "
                "torch.view_as_real, or register one in aajr_kernels.rules.registry.COMPLEX."
            )
    if kwargs.get("out") is not None:
        raise UnsupportedOperation(
            f"{function_name(func)}(out=...) cannot write a Dual: assign the result to a name instead."
        )
    if kwargs:
        args, kwargs = positional(args, kwargs)
    if not torch.compiler.is_compiling() and any(map(is_numpy, args)):
        args = tuple(map(as_number, args))
    return rule, args, kwargs


# -- guards -----------------------------------------------------------------------------------------------------------

#: patches of torch that make a lost derivative loud; installed at the first dual(), never at import
GUARDS: list[Callable[[], None]] = [separate_outputs]
#: the same of compiled code: functions that return a message where they found a fault
COMPILED_GUARDS: list[Callable[[], str | None]] = []
_compiled_fault: str | None = None


def install_guards() -> None:
    """Install the registered guards, each once; one that refuses does so again."""
    # before a look at the list, which would become a guard of compiled code
    if torch.compiler.is_compiling():
        return
    while GUARDS:
        guard = GUARDS.pop()
        try:
            guard()
        except BaseException:
            GUARDS.append(guard)
            raise


def guard_compiled() -> None:
    """While torch.compile traces a Dual: run the guards of compiled code, once, and raise what they found."""
    fault = _traced_fault()
    if fault is not None:
        unsupported(fault)


@constant
def _traced_fault() -> str | None:
    global _compiled_fault
    while COMPILED_GUARDS and _compiled_fault is None:
        _compiled_fault = COMPILED_GUARDS.pop()()
    return _compiled_fault
