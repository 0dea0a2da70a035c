"""How wrong a result may be.

In float64: a relative error of :data:`EXACT`. In a lower dtype: :data:`FACTOR` times the error of the same formula
computed by eager PyTorch in that dtype, plus :data:`ULPS` units in the last place of the size of the result. Errors
are Euclidean norms of whole tensors, measured against float64 at the same rounded inputs.

:func:`error_of` gives numbers for a table; the assertions say which tensor failed, and by how much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EXACT = 1e-10
FACTOR = 2.0
ULPS = 4.0
DRAWS = 4  # further eager computations where one may have been right by luck
#: a gradient this much smaller than the typical one of its case is rounding, and errors are relative to that size
GRADIENT_FLOOR = 1e-3

Results = Mapping[str, "Tensor | None"]


def norm(x: Tensor) -> float:
    """Euclidean norm in float64."""
    return x.detach().double().norm().item()


def gradient_floors(exact: Results) -> dict[str, float]:
    """The size to which rounding errors of every exact gradient refer, if it is larger than the gradient.

    A thousandth of a tensor with the typical entry of all gradients (their root mean square). Some gradients vanish
    identically (the bias of a key projection shifts every score of a row alike): what is left of them is the rounding
    of terms that cancel, and those are of typical size.
    """
    norms = {name: norm(g) for name, g in exact.items() if g is not None}
    counts = {name: g.numel() for name, g in exact.items() if g is not None}
    typical = math.sqrt(sum(size**2 for size in norms.values()) / max(sum(counts.values()), 1))
    floors = dict.fromkeys(exact, 0.0)
    for name, size in norms.items():
        like_others = typical * math.sqrt(max(counts[name], 1))
        floors[name] = like_others if size < 1e-9 * like_others else GRADIENT_FLOOR * like_others
    return floors


@dataclass(frozen=True)
class Error:
    """Error of one tensor.

    Attributes:
        relative: error over the size of the exact result; infinite for NaN or a missing result.
        share: error over what the budget allows; a failure above 1.
        reason: why it is a failure, empty if it is none.
    """

    relative: float
    share: float
    reason: str = ""


def error_of(
    actual: Tensor | None,
    exact: Tensor | None,
    eager: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    tolerance: float = EXACT,
    factor: float = FACTOR,
    ulps: float = ULPS,
    floor: float = 0.0,
) -> Error:
    """The error of `actual`, and its share of the budget.

    The budget is ``tolerance · size`` without `eager`, otherwise ``factor · |eager - exact| + ulps · eps · size``, with
    size ``max(|exact|, floor)``.

    Args:
        actual: result under test.
        exact: the formula in float64; None where the loss does not depend on the leaf.
        eager: the formula in the low dtype, by eager PyTorch.
        dtype: whose eps counts; by default that of `actual`.
        tolerance: relative error that is allowed without `eager`.
        factor: of the eager error.
        ulps: units in the last place that are allowed beside it.
        floor: smallest size to which errors refer; for results that cancel to zero.
    """
    if exact is None or actual is None:
        if all(t is None or not t.any() for t in (actual, exact)):
            return Error(0.0, 0.0)
        reason = "a gradient where the loss does not depend on it" if exact is None else "no gradient"
        return Error(math.inf, math.inf, reason)
    if actual.shape != exact.shape:
        return Error(math.inf, math.inf, f"shape {tuple(actual.shape)} instead of {tuple(exact.shape)}")

    def distance(x: Tensor) -> float:
        return norm(x.detach().double().cpu() - exact.detach().double().cpu())

    size, error = max(norm(exact), floor), distance(actual)
    if math.isnan(error):
        return Error(math.inf, math.inf, "NaN is above every budget")
    if eager is None:
        allowed = tolerance * size
        reason = f"relative error {_ratio(error, size):.2e} is above {tolerance:.0e} (of size {size:.2e})"
    else:
        rounding = distance(eager)
        rounding = rounding if math.isfinite(rounding) else 0.0  # an overflow excuses nothing
        allowed = factor * rounding + ulps * torch.finfo(dtype or actual.dtype).eps * size
        reason = (
            f"error {error:.2e} is above the budget {allowed:.2e} = {factor:g} x eager error {rounding:.2e} "
            f"+ {ulps:g} ulps of {size:.2e} ({dtype or actual.dtype})"
        )
    return Error(_ratio(error, size), _ratio(error, allowed), "" if error <= allowed else reason)


def _ratio(error: float, scale: float) -> float:
    return 0.0 if error == 0 else error / scale if scale else math.inf


def relative_error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """|actual - expected| / max(|expected|, floor); 0 when both are zero, NaN counts as infinite."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}."
    return error_of(actual, expected, floor=floor).relative


# -- for a test -----------------------------------------------------------------------------------------------------
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
