"""Puts a fault into the functions of a process that has imported the sources already."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType

__all__ = ["live", "swap"]


def live(folder: str) -> list[FunctionType]:
    """Functions of the sources in a folder."""
    functions = [f for f in gc.get_objects() if type(f) is FunctionType]
    return [function for function in functions if function.__code__.co_filename.startswith(folder)]


def swap(functions: list[FunctionType], source: str, faulty: str, path: str) -> bool:
    """Give every live function of a module its code from `faulty`, where that differs from the one of `source`.

    Args:
        functions: of the module, and others.
        source: of the module, as it was imported.
        faulty: another source of the module.
        path: the module was imported from.

    Returns:
        Whether that was all of the difference: False where a statement of the module or of a class differs, which has
        run already.
    """
    try:
        pairs = list(_changes(*(compile(text, path, "exec", dont_inherit=True) for text in (source, faulty))))
    except _AlreadyRun:
        return False
    codes = dict(pairs)
    for function in functions:
        code = codes.get(function.__code__) if function.__code__.co_filename == path else None
        if code is None:
            continue
        if code.co_freevars != function.__code__.co_freevars:
            return False
        function.__code__ = code
    return True


class _AlreadyRun(Exception):
    pass


def _changes(old: CodeType, new: CodeType) -> Iterator[tuple[CodeType, CodeType]]:
    """Functions that differ, outermost first."""
    if old == new:
        return
    if old.co_flags & inspect.CO_OPTIMIZED:
        yield old, new
    elif _statements(old) != _statements(new):
        raise _AlreadyRun
    for pair in zip(_functions(old), _functions(new)):
        yield from _changes(*pair)


def _functions(code: CodeType) -> list[CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def _statements(code: CodeType) -> tuple[object, ...]:
    """Of a module or a class, without its functions."""
    constants = [repr(constant) for constant in code.co_consts if not isinstance(constant, CodeType)]
    return code.co_code, code.co_names, constants, [function.co_name for function in _functions(code)]
