"""How wrong a result may be.

In float64: a relative error of :data:`EXACT`. In a lower dtype: :data:`FACTOR` times the error of the same formula
computed by eager PyTorch in that dtype, plus :data:`ULPS` units in the last place of the size of the result. Errors
are Euclidean norms of whole tensors, measured against float64 at the same rounded inputs.
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
#: and one that is zero for every input is a sum of terms that may be this much larger
VANISHING_FLOOR = 4.0

Results = Mapping[str, "Tensor | None"]


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


def norm(x: Tensor) -> float:
    return x.detach().double().norm().item()


def typical_size(exact: Results) -> float:
    """Root mean square of the entries of all these tensors together."""
    present = [t for t in exact.values() if t is not None]
    squares, count = sum(norm(t) ** 2 for t in present), sum(t.numel() for t in present)
    return math.sqrt(squares / max(count, 1))


def error_of(
    actual: Tensor | None, eager: Tensor | None, exact: Tensor | None, dtype: torch.dtype, floor: float = 0.0
) -> Error:
    """The error of `actual`, and its share of the budget.

    Args:
        actual: result under test.
        eager: the formula in the low dtype; unused in float64.
        exact: the formula in float64; None where the loss does not depend on the leaf.
        dtype: what was computed in; its eps counts.
        floor: smallest root mean square to which the error is relative; 0 for outputs.
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
        allowed = FACTOR * eager_error + ULPS * torch.finfo(dtype).eps * size
    return Error(_ratio(error, size), _ratio(error, allowed))


def _ratio(error: float, scale: float) -> float:
    return 0.0 if error == 0 else error / scale if scale else math.inf
