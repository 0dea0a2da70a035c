"""Rules of autograd Functions defined by models of transformers, by the names of their classes.

Such a Function has a backward of its own, so forward mode cannot differentiate it; these are their formulas.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from .common import elementwise
from .guards import function_rule

_RECURRENT_GEMMA = "transformers.models.recurrent_gemma.modeling_recurrent_gemma"


@function_rule("transformers.models.bloom.modeling_bloom.GeLUFunction")
def _bloom_gelu(apply: Callable[..., Any], x: Any) -> Any:
    """BLOOM's GELU in training, with its own constants; in evaluation BLOOM calls this formula without a Function."""
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


@function_rule(f"{_RECURRENT_GEMMA}.SqrtBoundDerivative")
def _bounded_root(apply: Callable[..., Any], x: Any) -> Any:
    """A square root whose slope is at most a constant: the tangent takes the bounded slope, as its gradient does."""
    largest = sys.modules[_RECURRENT_GEMMA]._MAX_SQRT_GRADIENT
    return elementwise(torch.sqrt, lambda y, p: (4 * p).clamp_min(largest**-2).rsqrt())(x)
