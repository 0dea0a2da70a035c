"""Error budgets: how wrong a result may be, and messages that say by how much it was.

A result in a low dtype is compared with float64. It may be at most ``FACTOR`` times as wrong as PyTorch's eager
computation of the same thing in that dtype, plus a few units in the last place of the size of the result. Errors are
measured in the Euclidean norm of a whole tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

FACTOR = 2.0
ULPS = 4.0
DRAWS = 4  # further eager computations where one may have been right by luck
EXACT = 1e-10  # relative error allowed in float64


def norm(x: Tensor) -> float:
    """Euclidean norm in float64."""
    return x.detach().double().norm().item()


def relative_error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """|actual - expected| / max(|expected|, floor); 0 when both are zero, NaN counts as infinite."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}.")
    error, scale = norm(actual.detach().double() - expected.detach().double()), max(norm(expected), floor)
    if math.isnan(error):
        return math.inf
    return 0.0 if error == 0 else error / scale if scale else math.inf


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


def gradient_floor(gradients: Mapping[str, Tensor | None], gradient: Tensor) -> float:
    """The size to which rounding errors of one exact ``gradient`` among all ``gradients`` refer, if it is larger.

    A thousandth of a tensor with the typical entry of all gradients. Some gradients vanish identically (the bias of a
    key projection shifts every score of a row alike): what is left of them is the rounding of terms that cancel, and
    those are of typical size.
    """
    present = [g for g in gradients.values() if g is not None]
    squares, count = sum(norm(g) ** 2 for g in present), sum(g.numel() for g in present)
    typical = math.sqrt(squares / max(count, 1)) * math.sqrt(max(gradient.numel(), 1))
    return typical if norm(gradient) < 1e-9 * typical else 1e-3 * typical


def _pairs(actual: Mapping[str, Tensor | None], exact: Mapping[str, Tensor | None]):
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


def assert_exact_gradients(
    actual: Mapping[str, Tensor | None], exact: Mapping[str, Tensor | None], *, tolerance: float = EXACT
) -> float:
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
    actual: Mapping[str, Tensor | None],
    eager: Mapping[str, Tensor | None],
    exact: Mapping[str, Tensor | None],
    *,
    factor: float = FACTOR,
    ulps: float = ULPS,
    redraw: Callable[[], Mapping[str, Tensor | None]] | None = None,
) -> float:
    """`assert_within_budget` for every leaf, all failures in one message; returns the largest share used.

    Args:
        redraw: the eager gradients at inputs moved by one rounding of the dtype, drawn :data:`DRAWS` times where a
            gradient is over the budget. Their error is what the condition of the problem leaves to any algorithm; the
            first result may have been right by luck, as one of thousands is. The largest error counts.
    """
    failures, worst = [], 0.0
    draws: list[Mapping[str, Tensor | None]] = []
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
                reference = max(
                    (draw[name] for draw in draws), key=lambda draw: relative_error(draw, expected)
                )
                share = assert_within_budget(got, reference, expected, name, **limits)
            except AssertionError:
                failures.append(str(failure))
                continue
        worst = max(worst, share)
    _report(failures, len(exact))
    return worst
