"""Assertions of the error budgets in aajr_kernels/testing/budgets.py: which tensor failed, and by how much."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from aajr_kernels.testing.budgets import EXACT, Error, Results, error_of, gradient_floors

DRAWS = 4  # further eager computations where one may have been right by luck


def relative_error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """|actual - expected| / max(|expected|, floor); 0 when both are zero, NaN counts as infinite."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}."
    return error_of(actual, expected, floor=floor).relative


def _assert(error: Error, name: str) -> None:
    assert not error.reason, f"{name}: {error.reason}."


def assert_exact(
    actual: Tensor, expected: Tensor, name: str = "result", *, tolerance: float = EXACT, floor: float = 0.0
) -> float:
    """Asserts a relative error of at most ``tolerance`` and returns it."""
    error = error_of(actual, expected, tolerance=tolerance, floor=floor)
    _assert(error, name)
    return error.relative


def assert_within_budget(
    actual: Tensor, eager: Tensor, exact: Tensor, name: str = "result", **limits: float
) -> float:
    """Asserts that the error keeps to its budget and returns the share used.

    Args:
        actual: the result under test, in the low dtype (its eps counts).
        eager: the same computation by eager PyTorch in that dtype.
        exact: the float64 result at the same (rounded) inputs.
        name: of the result, for the message.
        limits: ``factor``, ``ulps`` and ``floor`` of :func:`error_of`.
    """
    error = error_of(actual, exact, eager, dtype=actual.dtype, **limits)
    _assert(error, name)
    return error.share


def _largest(actual: Results, exact: Results, check: Callable[[str, Tensor, Tensor], float]) -> float:
    """The largest result of `check` over all leaves; all failures in one message."""
    assert set(actual) == set(exact), f"gradients of different leaves: {sorted(set(actual) ^ set(exact))}."
    failures, largest = [], 0.0
    for name, expected in exact.items():
        gradient = actual[name]
        try:
            if gradient is None or expected is None:
                assert gradient is not None or expected is None, f"{name}: no gradient."
                _assert(error_of(gradient, expected), name)
            else:
                largest = max(largest, check(name, gradient, expected))
        except AssertionError as failure:
            failures.append(str(failure))
    assert not failures, f"{len(failures)} of {len(exact)} gradients failed:\n  " + "\n  ".join(failures)
    return largest


def assert_exact_gradients(actual: Results, exact: Results, *, tolerance: float = EXACT) -> float:
    """`assert_exact` for every leaf, all failures in one message; returns the largest relative error."""
    floors = gradient_floors(exact)
    return _largest(
        *(actual, exact),
        lambda name, g, expected: assert_exact(g, expected, name, tolerance=tolerance, floor=floors[name]),
    )


def assert_gradients_within_budget(
    actual: Results,
    eager: Results,
    exact: Results,
    *,
    redraw: Callable[[], Results] | None = None,
    **limits: float,
) -> float:
    """`assert_within_budget` for every leaf, all failures in one message; returns the largest share used.

    Args:
        actual, eager, exact: by leaf.
        redraw: the eager gradients at inputs moved by one rounding of the dtype, drawn :data:`DRAWS` times where a
            gradient is over the budget. Their error is what the condition of the problem leaves to any algorithm; the
            first result may have been right by luck, as one of thousands is. The largest error counts.
        limits: ``factor`` and ``ulps`` of :func:`error_of`.
    """
    floors = gradient_floors(exact)
    draws: list[Results] = []

    def check(name: str, gradient: Tensor, expected: Tensor) -> float:
        reference = eager[name]
        assert reference is not None, f"{name}: the eager computation has no gradient."
        own: dict[str, Any] = {**limits, "floor": floors[name]}
        if redraw is not None and error_of(gradient, expected, reference, **own).reason:
            draws.extend(redraw() for _ in range(DRAWS if not draws else 0))
            drawn = [g for draw in draws if (g := draw[name]) is not None]
            reference = max(drawn, key=lambda g: relative_error(g, expected))
        return assert_within_budget(gradient, reference, expected, name, **own)

    return _largest(actual, exact, check)
