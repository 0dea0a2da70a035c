"""Results of a whole model: how wrong they are, and how wrong they may be.

In float64 every number and every gradient may be off by :data:`EXACT`. In a lower dtype the same written-out model in
that dtype sets the budget: :data:`~.budgets.FACTOR` times its error plus :data:`ULPS` units in the last place. Eager
may be right by luck in one gradient, so that its error is the largest one among the same parameter of all layers, and
at least that of all gradients together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...testing.budgets import FACTOR, GRADIENT_FLOOR, error_of, norm, typical_size

__all__ = ["EXACT", "Results", "Verdict", "judged", "together"]

EXACT = 1e-9  # of a deep model; a single op is held to 1e-10
#: what chance adds to the error of a small sum; bfloat16 has only eight bits to hide errors in
ULPS = {torch.float32: 16.0, torch.bfloat16: 1.0, torch.float16: 2.0}

Gradients = Mapping[str, "Tensor | None"]


@dataclass
class Results:
    """Numbers of one way to compute it.

    Attributes:
        penalty, output: value of the penalty, and the output.
        penalty_gradients, task_gradients: by parameter, of the penalty and of a loss of the output.
    """

    penalty: Tensor
    output: Tensor
    penalty_gradients: Gradients
    task_gradients: Gradients


@dataclass(frozen=True)
class Verdict:
    """Errors by name, the largest share of a budget, and whose it is."""

    errors: dict[str, float]
    share: float
    worst: str


def judged(ours: Results, truth: Results, eager: Results | None, dtype: torch.dtype) -> Verdict:
    """Every tensor of `ours` against `truth`; `eager` is the written-out model in the low dtype, None in float64."""
    errors = dict(_errors(ours, truth))
    if eager is None:
        allowed = dict.fromkeys(errors, EXACT)
    else:
        rounding = dict(_errors(eager, truth))
        least = {
            "penalty": together(eager.penalty_gradients, truth.penalty_gradients),
            "output": together(eager.task_gradients, truth.task_gradients),
        }
        among: dict[str, float] = {}
        for name, error in rounding.items():
            # a formula that overflows in the low dtype excuses nothing
            among[_kind(name)] = max(among.get(_kind(name), 0.0), error if math.isfinite(error) else 0.0)
        allowed = {}
        for name in errors:
            floor = least[name.split()[3]] if name.startswith("gradient") else 0.0
            floor = floor if math.isfinite(floor) else 0.0
            allowed[name] = FACTOR * max(among[_kind(name)], floor) + ULPS[dtype] * torch.finfo(dtype).eps
    shares = {name: error / allowed[name] for name, error in errors.items()}
    worst = max(shares, key=lambda name: shares[name])
    return Verdict(errors, shares[worst], worst)


def _kind(name: str) -> str:
    """A name with layer numbers written as ``*``."""
    return re.sub(r"(?<![^.\s])\d+(?![^.])", "*", name)


def _errors(ours: Results, truth: Results) -> Iterator[tuple[str, float]]:
    """Relative error of every tensor; infinite for NaN, or for a gradient that is missing or there for no reason."""
    yield "penalty", _error(ours.penalty, truth.penalty)
    yield "output", _error(ours.output, truth.output)
    for kind, mine, exact in (
        ("penalty", ours.penalty_gradients, truth.penalty_gradients),
        ("output", ours.task_gradients, truth.task_gradients),
    ):
        floor = GRADIENT_FLOOR * typical_size(exact)
        for name, g in exact.items():
            yield f"gradient of the {kind} for {name}", _error(mine[name], g, floor)


def _error(ours: Tensor | None, exact: Tensor | None, floor: float = 0.0) -> float:
    return error_of(ours, None, exact, torch.float64, floor).relative


def together(ours: Gradients, truth: Gradients) -> float:
    """Relative error of all gradients as one vector."""
    errors = sizes = 0.0
    for name, exact in truth.items():
        mine = ours[name]
        sizes += 0.0 if exact is None else norm(exact) ** 2
        if mine is not None or exact is not None:
            a = 0.0 if mine is None else mine.detach().double().cpu()
            difference = a - (0.0 if exact is None else exact)
            assert isinstance(difference, Tensor)
            errors += norm(difference) ** 2
    return math.sqrt(errors / sizes) if sizes else math.sqrt(errors)
