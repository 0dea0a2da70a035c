"""How wrong a result may be.

In float64: a relative error of :data:`EXACT`. In a lower dtype: :data:`FACTOR` times the error of the same formula
computed by eager PyTorch in that dtype, plus :data:`ULPS` units in the last place of the size of the result. Errors
are Euclidean norms of whole tensors, measured against float64 at the same rounded inputs.

:func:`error_of` gives the numbers, and a sentence where they are too large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

EXACT = 1e-10
FACTOR = 2.0
ULPS = 4.0
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
