"""How wrong a result may be.

In float64: a relative error of :data:`EXACT`. In a lower dtype: :data:`FACTOR` times the error of the same formula
computed by eager PyTorch in that dtype, plus :data:`ULPS` units in the last place of the size of the result. Errors
are Euclidean norms of whole tensors, measured against float64 at the same rounded inputs.

:func:`error_of` gives a number for a table; the assertions say which tensor failed, and by how much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

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


def typical_size(exact: Results) -> float:
    """Root mean square of the entries of all these tensors together."""
    present = [t for t in exact.values() if t is not None]
    squares, count = sum(norm(t) ** 2 for t in present), sum(t.numel() for t in present)
    return math.sqrt(squares / max(count, 1))


def gradient_floor(gradients: Results, gradient: Tensor) -> float:
    """The size to which rounding errors of one exact ``gradient`` among all ``gradients`` refer, if it is larger.

    A thousandth of a tensor with the typical entry of all gradients. Some gradients vanish identically (the bias of a
    key projection shifts every score of a row alike): what is left of them is the rounding of terms that cancel, and
    those are of typical size.
    """
    typical = typical_size(gradients) * math.sqrt(max(gradient.numel(), 1))
    return typical if norm(gradient) < 1e-9 * typical else GRADIENT_FLOOR * typical


def _ratio(error: float, scale: float) -> float:
    return 0.0 if error == 0 else error / scale if scale else math.inf


def relative_error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """|actual - expected| / max(|expected|, floor); 0 when both are zero, NaN counts as infinite."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}.")
    error = norm(actual.detach().double() - expected.detach().double())
    return math.inf if math.isnan(error) else _ratio(error, max(norm(expected), floor))


# -- for a table ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Error:
    """Error of one tensor.

    Attributes:
        relative: error over the size of the exact result; infinite for NaN or a missing result.
        share: error over what the budget allows; a failure above 1.
        reason: what is wrong where a number cannot say it.
    """

    relative: float
    share: float
    reason: str = ""


def error_of(
    actual: Tensor | None,
    eager: Tensor | None,
    exact: Tensor | None,
    dtype: torch.dtype,
    floor: float = 0.0,
    ulps: float = ULPS,
) -> Error:
    """The error of `actual`, and its share of the budget.

    Args:
        actual: result under test.
        eager: the formula in the low dtype; unused in float64.
        exact: the formula in float64; None where the loss does not depend on the leaf.
        dtype: what was computed in; its eps counts.
        floor: smallest root mean square to which the error is relative; 0 for outputs.
        ulps: units in the last place that are allowed beside the eager error.
    """
    if exact is None:
        stray = actual is not None and bool(actual.any())
        return Error(math.inf, math.inf, "a gradient where none is due") if stray else Error(0.0, 0.0)
    if actual is None:
        if not exact.any():
            return Error(0.0, 0.0)
        return Error(math.inf, math.inf, "nothing arrived")
    if actual.shape != exact.shape:
        return Error(math.inf, math.inf, f"shape {tuple(actual.shape)} instead of {tuple(exact.shape)}")
    size = max(norm(exact), floor * math.sqrt(exact.numel()))
    error = norm(actual.detach().double().cpu() - exact.detach())
    if math.isnan(error):
        return Error(math.inf, math.inf, "NaN")
    if dtype == torch.float64:
        allowed = EXACT * size
    else:
        eager_error = 0.0 if eager is None else norm(eager.detach().double().cpu() - exact.detach())
        # a formula that overflows in the low dtype excuses nothing
        eager_error = eager_error if math.isfinite(eager_error) else 0.0
        allowed = FACTOR * eager_error + ulps * torch.finfo(dtype).eps * size
    return Error(_ratio(error, size), _ratio(error, allowed))


# -- for a test -----------------------------------------------------------------------------------------------------
def assert_exact(
    actual: Tensor, expected: Tensor, name: str = "result", *, tolerance: float = EXACT, floor: float = 0.0
) -> float:
    """Asserts a relative error of at most ``tolerance`` and returns it."""
    error = relative_error(actual, expected, floor)
    assert error <= tolerance, (
        f"{name}: relative error {error:.2e} is above {tolerance:.0e} "
        f"(norm {norm(actual):.6e}, expected {norm(expected):.6e})."
    )
    return error


def assert_within_budget(
    actual: Tensor,
    eager: Tensor,
    exact: Tensor,
    name: str = "result",
    *,
    factor: float = FACTOR,
    ulps: float = ULPS,
    floor: float = 0.0,
) -> float:
    """Asserts |actual - exact| <= factor |eager - exact| + ulps eps max(|exact|, floor); returns the share used.

    Args:
        actual: the result under test, in the low dtype (its eps counts).
        eager: the same computation by eager PyTorch in that dtype.
        exact: the float64 result at the same (rounded) inputs.
        floor: smallest size to which the units in the last place refer; for results that cancel to zero.
    """
    if actual.shape != exact.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)} instead of {tuple(exact.shape)}.")
    error = norm(actual.detach().double() - exact.detach().double())
    eager_error = norm(eager.detach().double() - exact.detach().double())
    size = max(norm(exact), floor)
    allowed = factor * eager_error + ulps * torch.finfo(actual.dtype).eps * size
    assert error <= allowed, (  # false for NaN as well
        f"{name}: error {error:.2e} is above the budget {allowed:.2e} = {factor:g} x eager error {eager_error:.2e} "
        f"+ {ulps:g} ulps of {size:.2e} ({actual.dtype})."
    )
    return error / allowed if allowed else 0.0


def _pairs(actual: Results, exact: Results) -> Iterator[tuple[str, Tensor, Tensor]]:
    assert set(actual) == set(exact), f"gradients of different leaves: {sorted(set(actual) ^ set(exact))}."
    for name, expected in exact.items():
        got = actual[name]
        if expected is None:
            assert got is None or not got.any(), f"{name}: a gradient where the loss does not depend on it."
            continue
        assert got is not None, f"{name}: no gradient, expected norm {norm(expected):.2e}."
        yield name, got, expected


def _report(failures: list[str], total: int) -> None:
    assert not failures, f"{len(failures)} of {total} gradients failed:\n  " + "\n  ".join(failures)


def assert_exact_gradients(actual: Results, exact: Results, *, tolerance: float = EXACT) -> float:
    """`assert_exact` for every leaf, all failures in one message; returns the largest relative error."""
    failures, worst = [], 0.0
    for name, got, expected in _pairs(actual, exact):
        try:
            floor = gradient_floor(exact, expected)
            worst = max(worst, assert_exact(got, expected, name, tolerance=tolerance, floor=floor))
        except AssertionError as failure:
            failures.append(str(failure))
    _report(failures, len(exact))
    return worst


def assert_gradients_within_budget(
    actual: Results,
    eager: Results,
    exact: Results,
    *,
    factor: float = FACTOR,
    ulps: float = ULPS,
    redraw: Callable[[], Results] | None = None,
) -> float:
    """`assert_within_budget` for every leaf, all failures in one message; returns the largest share used.

    Args:
        redraw: the eager gradients at inputs moved by one rounding of the dtype, drawn :data:`DRAWS` times where a
            gradient is over the budget. Their error is what the condition of the problem leaves to any algorithm; the
            first result may have been right by luck, as one of thousands is. The largest error counts.
    """
    failures, worst = [], 0.0
    draws: list[Results] = []
    for name, got, expected in _pairs(actual, exact):
        reference = eager[name]
        assert reference is not None, f"{name}: the eager computation has no gradient."
        limits = dict(factor=factor, ulps=ulps, floor=gradient_floor(exact, expected))
        try:
            share = assert_within_budget(got, reference, expected, name, **limits)
        except AssertionError as failure:
            try:
                if redraw is None:
                    raise
                draws = draws or [redraw() for _ in range(DRAWS)]
                drawn = [g for draw in draws if (g := draw[name]) is not None]
                reference = max(drawn, key=lambda g: relative_error(g, expected))
                share = assert_within_budget(got, reference, expected, name, **limits)
            except AssertionError:
                failures.append(str(failure))
                continue
        worst = max(worst, share)
    _report(failures, len(exact))
    return worst
