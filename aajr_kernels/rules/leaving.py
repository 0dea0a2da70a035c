"""Ways out of torch for a Dual: Python numbers, which leave its tangent behind, and NumPy."""

from __future__ import annotations

import contextlib
import contextvars
import operator
from collections.abc import Callable
from typing import Any, TypeVar

from ..backends.errors import UnsupportedOperation, unsupported
from ..torch_private import mark_constant as constant

__all__ = ["array_ufunc", "as_number", "is_numpy", "leave", "refuse_array", "refuse_shape", "strict"]

_F = TypeVar("_F", bound=Callable[..., Any])

_strict = contextvars.ContextVar("aajr_kernels.strict", default=False)


class strict(contextlib.ContextDecorator):
    """Make it an error to turn a Dual into Python numbers, which leave its tangent behind.

    ``item()``, ``tolist()``, ``float()``, ``int()``, ``bool()`` and a format such as ``f"{y:.3f}"`` give the primal, as
    ``detach()`` does: a model that goes on with such a number has no derivative through it, without a word. In strict
    mode they raise :class:`UnsupportedOperation`. ``detach()``, ``.data``, ``y.primal``, comparisons and ``repr`` say
    what they do, and stay.

    Takes effect when called, in the calling thread (or asyncio task) only; as a context manager or a decorator it
    restores the previous mode at the end. Under torch.compile the mode is that of the time of compilation.

    Args:
        on: False switches the mode off, for a part of the code that means to leave tangents behind.

    Raises:
        TypeError: `on` is no bool.
    """

    def __init__(self, on: bool = True) -> None:
        if not isinstance(on, bool):
            raise TypeError(f"strict: on must be True or False, got {on!r}.")
        self._on = on
        self._before = _strict.get()
        _strict.set(on)

    def _recreate_cm(self) -> strict:  # of ContextDecorator: one for every call of the decorated function
        return strict(self._on)

    def __call__(self, function: _F) -> _F:
        _strict.set(self._before)  # a decorator acts while its function runs
        return super().__call__(function)

    def __enter__(self) -> strict:
        _strict.set(self._on)
        return self

    def __exit__(self, *exc: object) -> None:
        _strict.set(self._before)


@constant
def _is_strict() -> bool:
    return _strict.get()


def leave(form: str) -> None:
    """In strict mode: raise because `form` of a Dual, such as ``item()``, gives its primal as Python numbers.

    Raises:
        UnsupportedOperation: the mode is on.
    """
    if _is_strict():
        unsupported(
            f"{form} of a Dual leaves its tangent behind, which aajr_kernels.strict() forbids: compute with the Dual, "
            "or say y.detach() where no tangent is wanted."
        )


# -- NumPy ------------------------------------------------------------------------------------------------------------

#: ufuncs that NumPy's scalars call when they stand left of an operator -> the operator
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": operator.truediv,
    "true_divide": operator.truediv,
    "floor_divide": operator.floordiv,
    "remainder": operator.mod,
    "power": operator.pow,
    "equal": operator.eq,
    "not_equal": operator.ne,
    "less": operator.lt,
    "less_equal": operator.le,
    "greater": operator.gt,
    "greater_equal": operator.ge,
}


def refuse_array() -> Any:
    """Raise because a NumPy array would be made of a Dual."""
    raise UnsupportedOperation(
        "NumPy cannot hold a Dual, its tangent would be lost: use y.primal.detach().numpy()."
    )


def array_ufunc(ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
    """The operator that NumPy calls `ufunc` for, of a Dual and a NumPy scalar, which counts as a Python number.

    Raises:
        UnsupportedOperation: it is no operator of Python, or writes into an array.
        TypeError: the other operand is an array with axes.
    """
    function = _OPERATORS.get(ufunc.__name__)
    if function is None or method != "__call__" or kwargs or len(inputs) != 2:
        refuse_array()
    assert function is not None
    numbers = [as_number(x) for x in inputs]
    for x in numbers:
        if is_numpy(x):  # with axes: NumPy would ask here again
            refuse_shape(x)
    return function(*numbers)


def is_numpy(x: Any) -> bool:
    """Whether `x` is a scalar or an array of NumPy, which need not be loaded."""
    return type(x).__module__ == "numpy"


def as_number(x: Any) -> Any:
    """`x`, or the Python number that a NumPy scalar or an array without axes holds."""
    return x.item() if is_numpy(x) and getattr(x, "shape", None) == () else x


def refuse_shape(x: Any) -> Any:
    """Raise because an array with axes, which would broadcast against the stack axis, stands beside a Dual."""
    raise TypeError(
        f"an operand beside a Dual must be a tensor, a Dual or a number, got {type(x).__name__} of shape "
        f"{tuple(x.shape)}: convert it with torch.as_tensor."
    )
