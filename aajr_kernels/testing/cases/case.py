"""One problem: tensors, the call of our op, and the same thing by formulas.

For every public op there is a handful of small, awkward ones: odd sizes, several leading axes, one and three tangents,
weights that are not constant, arguments without tangents, memory that is not contiguous, rows that may see nothing,
logits far from zero, and one problem large enough to be cut into blocks or tiles.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import formulas

Outputs = dict[str, Tensor]


@dataclass
class Case:
    """One problem: tensors, the call of our op, and the same thing by formulas.

    Attributes:
        label: what is special about it.
        tensors: float64 leaves by argument name; every one gets a gradient.
        tangents: directions ``[K, *shape]`` of those that are passed as Duals; these get gradients too.
        ours: called with every argument by name, Duals for those with tangents; returns a Dual or named outputs.
        oracle: called with plain tensors and tangents; returns the same named outputs.
        constants: further arguments without gradients: masks, labels. Floating ones take the dtype of the case.
        strided: the Duals' memory is not contiguous.
        vanishing: leaves whose gradients are zero for every input, as sums of terms that cancel: their error is
            relative to the size of the other gradients.
    """

    label: str
    tensors: dict[str, Tensor]
    tangents: dict[str, Tensor]
    ours: Callable[..., Any]
    oracle: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Outputs]
    constants: dict[str, Tensor] = field(default_factory=dict)
    strided: bool = False
    vanishing: tuple[str, ...] = ()


class Draw:
    """Random tensors of one op, determined by the seed only."""

    def __init__(self, op: str, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(op.encode()))

    def __call__(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale + mean

    def angles(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64) * 6.2831853

    def bool(self, *shape: int, share: float = 0.7) -> Tensor:
        return torch.rand(shape, generator=self.generator) < share

    def integers(self, *shape: int, high: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)

    def directions(self, tensors: Mapping[str, Tensor], names: str, k: int) -> dict[str, Tensor]:
        return {name: self(k, *tensors[name].shape) for name in names.split()}


def case(
    draw: Draw,
    label: str,
    op: Callable[..., Any],
    formula: Callable[..., Tensor],
    tensors: dict[str, Tensor],
    *,
    k: int = 1,
    duals: str = "x",
    constants: dict[str, Tensor] | None = None,
    strided: bool = False,
    options: dict[str, Any] | None = None,
    vanishing: str = "",
) -> Case:
    """A case of an op that maps Duals to one Dual, and whose formula maps tensors to one tensor.

    Args:
        draw: source of the directions.
        label: what is special about it; the number of tangents is added.
        op: ours, called with tensors by name and with `options`.
        formula: the oracle, called in the same way.
        tensors: leaves by argument name.
        k: number of tangents.
        duals: names of the tensors that carry tangents, separated by spaces.
        constants: arguments without gradients.
        strided: pass Duals that are not contiguous.
        options: further arguments of both.
        vanishing: names of leaves whose gradients cancel to zero, separated by spaces.
    """
    options = options or {}

    def oracle(primals: Mapping[str, Tensor], tangents: Mapping[str, Tensor]) -> Outputs:
        y, y_tan = formulas.forward_mode(partial(formula, **options), primals, tangents)
        return {"output": y, "output's tangents": y_tan}

    directions = draw.directions(tensors, duals, k)
    return Case(
        f"{label}, K={k}",
        tensors,
        directions,
        partial(op, **options),
        oracle,
        constants or {},
        strided,
        tuple(vanishing.split()),
    )
