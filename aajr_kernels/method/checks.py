"""Checks of numbers among the arguments: one sentence says the argument, what came, what was expected, the remedy."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any, TypeGuard

import torch

from ..dual import Dual

__all__ = [
    "as_mask",
    "check_choices",
    "check_integers",
    "check_iterations",
    "check_number",
    "check_scalar",
    "first_included",
    "included",
    "is_number",
    "kind_of",
]


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a real number of Python or a scalar of NumPy, and no truth value."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_integers(least: int, **values: Any) -> None:
    """Raise unless each is a Python integer that is large enough.

    Raises:
        TypeError: it is an integer of NumPy or a tensor.
        ValueError: it is something else, or too small.
    """
    for name, value in values.items():
        if not isinstance(value, int) and hasattr(value, "__index__"):
            raise TypeError(f"{name} must be a Python integer, got {type(value).__name__}: pass int({name}).")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {value!r}.")


def check_number(name: str, value: Any, least: float | None = None) -> None:
    """Raise unless it is a finite Python number: such numbers are written down, and compiled into graphs.

    Raises:
        TypeError: it is something else.
        ValueError: it is infinite or NaN, or smaller than `least`.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        is_convertible = hasattr(value, "__float__") and not isinstance(value, bool)
        remedy = f": pass float({name})" if is_convertible else ""
        raise TypeError(f"{name} must be a Python number, got {type(value).__name__}{remedy}.")
    if not math.isfinite(value) or (least is not None and value < least):
        bound = "" if least is None else f" >= {least}"
        raise ValueError(f"{name} must be a finite number{bound}, got {value}.")


def check_scalar(name: str, value: Any) -> None:
    """Raise unless it is a finite number of Python or NumPy, or a tensor of one element (whose value is not read).

    Raises:
        TypeError: it is something else.
        ValueError: it is infinite or NaN, or a tensor of more or fewer elements.
    """
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{name} must be a number or a tensor of one element, got shape {tuple(value.shape)}."
            )
    elif not is_number(value):
        remedy = ": pass y.primal" if isinstance(value, Dual) else ""
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}{remedy}.")
    elif (
        not -math.inf < value < math.inf
    ):  # not math.isfinite: the number may be symbolic, under torch.compile
        raise ValueError(f"{name} must be a finite number, got {value}.")


def check_choices(choices: Iterable[str], **values: Any) -> None:
    """Raise a ValueError unless each value is one of `choices`."""
    for name, value in values.items():
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")


def as_mask(mask: object, name: str, meaning: str = "included") -> torch.Tensor:
    """`mask` as bool: True (or nonzero) has the `meaning`.

    Raises:
        TypeError: the mask is floating point (it might be additive, with the opposite meaning).
    """
    if not isinstance(mask, torch.Tensor) or mask.is_floating_point() or mask.is_complex():
        raise TypeError(
            f"{name} must be a bool or integer tensor (nonzero = {meaning}), got {kind_of(mask)}."
        )
    return mask != 0


def included(mask: object, shape: tuple[int, ...], name: str) -> torch.Tensor:
    """:func:`as_mask` of this shape.

    Raises:
        TypeError, ValueError: its kind or its shape is another one.
    """
    included = as_mask(mask, name)
    if tuple(included.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(included.shape)}.")
    return included


def check_iterations(**values: Any) -> None:
    """Raise unless every value is ``"exact"`` or a number of iterations, at least 0."""
    for name, value in values.items():
        if isinstance(value, str):
            check_choices(("exact",), **{name: value})
        else:
            check_integers(0, **{name: value})


def first_included(mask: torch.Tensor) -> int:
    """Places before the first that any row of a mask ``[B, S]`` includes, S where none does; one read on the host."""
    return int((mask.any(0).cumsum(0) == 0).sum())


def kind_of(value: object) -> str:
    """Description of an argument of a wrong kind, for errors: the dtype of a tensor, else the type."""
    return str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__
