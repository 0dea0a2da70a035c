"""Functions under decorators: the ways to what is inside, and the same decorators around another function.

transformers decorates the ``forward`` of its layers, other ones in every version: renamed arguments, gradient
checkpointing, a choice of kernels, configuration defaults. A replacement takes the place of the function inside; calls
keep every decorator, since what it does to arguments and results has to happen still.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from torch import nn

__all__ = ["around", "chains", "is_bare", "ways"]

_DEPTH = 12  # decorators above each other; transformers 5.24 has four
_COMMON = vars(nn.Module()).keys()


def chains(function: Any) -> Iterator[tuple[Any, ...]]:
    """Every way from `function` inwards, ``(function, what it wraps, ...)``; the shortest is ``(function,)``."""
    seen: set[int] = {id(function)}
    waiting: list[tuple[Any, ...]] = [(function,)]
    while waiting:
        chain = waiting.pop()
        yield chain
        for inner in _inside(chain[-1]) if len(chain) <= _DEPTH else ():
            if id(inner) not in seen:
                seen.add(id(inner))
                waiting.append((*chain, inner))


def ways(function: Any, through: str = "") -> list[tuple[Any, ...]]:
    """The chains to where a replacement may stand, innermost first: never a function that says what it wraps.

    With `through` they go on to the function of that name among the globals of what `function` decorates.
    """
    ends = list(chains(function))
    if through:
        named = ((chain, getattr(chain[-1], "__globals__", {}).get(through)) for chain in ends)
        ends = [(*chain, *way) for chain, called in named if called is not None for way in ways(called)]
    # a module as a whole, too: that of kernels 0.19 does not run what it holds, but the copy that a layer has of it
    ends = [chain for chain in ends if isinstance(chain[-1], types.FunctionType) or is_bare(chain[-1])]
    return sorted((way for way in ends if not hasattr(way[-1], "__wrapped__")), key=len, reverse=True)


def _inside(function: Any) -> list[Any]:
    """The functions that `function` holds, and what it declares as ``__wrapped__`` where it does not hold that."""
    wrapped = getattr(function, "__wrapped__", None)
    held = [value for value in _held(function) if value is wrapped or _is_function(value)]
    return held if wrapped is None else [*held, wrapped]


def _held(function: Any) -> list[Any]:
    if isinstance(function, (functools.partial, functools.partialmethod)):
        return [function.func, *function.args, *function.keywords.values()]
    if isinstance(function, types.MethodType):
        return [function.__func__]
    if is_bare(function):  # the kernels library makes modules of functions
        return [type(function).forward]
    if isinstance(function, types.FunctionType):
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        return [_contents(cell) for cell in function.__closure__ or ()] + defaults
    return list(getattr(function, "__dict__", {}).values())


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def is_bare(value: Any) -> bool:
    """Whether `value` is a module that holds nothing: its class says all that it does."""
    held = ("_parameters", "_buffers", "_modules")
    return (
        isinstance(value, nn.Module) and vars(value).keys() == _COMMON and not any(map(vars(value).get, held))
    )


def _is_function(value: Any) -> bool:
    kinds = (types.FunctionType, types.MethodType, functools.partial, functools.partialmethod)
    return isinstance(value, kinds) or is_bare(value) or (callable(value) and hasattr(value, "__wrapped__"))


@functools.lru_cache(512)  # keys are of callers' classes
def around(chain: tuple[Any, ...], function: Any) -> Any:
    """`function` in the place of the last of `chain`, under new copies of the decorators above it.

    Returns:
        None where a decorator does not hold what it wraps, so that another function cannot take its place. The result
        is the same object for the same arguments: the layers of a model share it.
    """
    for outer, inner in reversed(list(pairwise(chain))):
        function = _holding(outer, inner, function)
        if function is None:
            return None
    return function


def _holding(outer: Any, old: Any, new: Any) -> Any:
    """`outer` with `new` in the place of `old`, or None."""
    held = any(value is old for value in _held(outer))
    namespace: dict[str, Any] = getattr(outer, "__globals__", {})
    if not held and not any(value is old for value in namespace.values()):
        return None

    def swap(value: Any) -> Any:
        return new if value is old else value

    if isinstance(outer, (functools.partial, functools.partialmethod)):
        named = {name: swap(value) for name, value in outer.keywords.items()}
        return type(outer)(swap(outer.func), *map(swap, outer.args), **named)
    if isinstance(outer, types.MethodType):
        return types.MethodType(new, outer.__self__)
    if isinstance(outer, nn.Module):
        return types.MethodType(new, outer)
    if not isinstance(outer, types.FunctionType):
        twin = copy.copy(outer)
        twin.__dict__.update({name: swap(value) for name, value in outer.__dict__.items()})
        return twin
    if not held:  # its module stays as it is
        namespace = {name: swap(value) for name, value in namespace.items()}
        # without a module name torch.compile guards on this namespace and not on the module's, whose entry differs
        del namespace["__name__"]
    closure = [(cell, _contents(cell)) for cell in outer.__closure__ or ()]
    cells = tuple(types.CellType(new) if value is old else cell for cell, value in closure)
    # a decorator that refers to itself refers to its copy
    cells = tuple(types.CellType() if value is outer else cell for cell, (_, value) in zip(cells, closure))
    defaults = tuple(map(swap, outer.__defaults__ or ())) or None
    body = types.FunctionType(outer.__code__, namespace, outer.__name__, defaults, cells)
    for cell, (_, value) in zip(cells, closure):
        if value is outer:
            cell.cell_contents = body
    body.__kwdefaults__ = {name: swap(value) for name, value in (outer.__kwdefaults__ or {}).items()} or None
    body.__qualname__, body.__module__ = outer.__qualname__, outer.__module__
    body.__dict__.update({name: swap(value) for name, value in outer.__dict__.items()})
    return body
