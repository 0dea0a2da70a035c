"""The runs and the exact gradients of an op follow from how its inputs are drawn and from a function of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from aajr_kernels.dual import Dual
from aajr_kernels.testing.cases.case import forward_mode

from ..case import Gradients, Run, portion, true_portion

Function = Callable[..., Any]


@dataclass(frozen=True)
class Op:
    """An op at some sizes.

    Attributes:
        draw: length -> stacked inputs ``[2, ...]``, parameters, and the stacked cotangent (None where the op gives a
            scalar), rounded to the dtype, on the device that ``with torch.device`` says.
        part: of :data:`..case.PARTS`.
        device: where it runs.
    """

    draw: Callable[[int], tuple[list[Tensor], list[Tensor], Tensor | None]]
    part: str = "both"
    device: str = "cpu"

    def plain(self, function: Function) -> Callable[[int], Run]:
        """Runs a function of primals and parameters."""
        return lambda length: self._run(lambda inputs, rest: function(*inputs, *rest), length, stacked=False)

    def dual(self, function: Function) -> Callable[[int], Run]:
        """Runs a function of Duals and parameters."""

        def on_duals(inputs: list[Tensor], rest: list[Tensor]) -> Tensor:
            y = function(*map(Dual, inputs), *rest)
            return y.stacked if isinstance(y, Dual) else y

        return lambda length: self._run(on_duals, length, stacked=True)

    def forward_mode(self, function: Function) -> Callable[[int], Run]:
        """Runs a function of primals and parameters under PyTorch's forward mode."""
        return lambda length: self._run(_jvp(function), length, stacked=True)

    def truth(self, function: Function) -> Callable[[int], Gradients]:
        """Exact gradients of a function of primals and parameters."""
        return lambda length: self._true(lambda inputs, rest: function(*inputs, *rest), length, stacked=False)

    def dual_truth(self, function: Function) -> Callable[[int], Gradients]:
        """Exact gradients of its value and tangent by PyTorch's forward mode, stacked."""
        return lambda length: self._true(_jvp(function), length, stacked=True)

    def stacked_truth(self, function: Function) -> Callable[[int], Gradients]:
        """Exact gradients of a function of stacked inputs and parameters."""
        return lambda length: self._true(lambda inputs, rest: function(*inputs, *rest), length, stacked=True)

    def _run(self, function: Function, length: int, stacked: bool) -> Run:
        inputs, rest, cotangent = self.leaves(length, stacked)
        return portion(lambda: function(inputs, rest), [*inputs, *rest], cotangent, self.part)

    def _true(self, function: Function, length: int, stacked: bool) -> Gradients:
        inputs, rest, cotangent = self.leaves(length, stacked, double=True)
        return true_portion(function(inputs, rest), [*inputs, *rest], cotangent, self.part)

    def leaves(
        self, length: int, stacked: bool, double: bool = False
    ) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        """Inputs, parameters and the cotangent, on the device or in float64 on the CPU: the same numbers."""
        with torch.device(self.device):
            inputs, rest, cotangent = self.draw(length)
        place: Callable[[Tensor], Tensor] = lambda t: t.cpu().double() if double else t.to(self.device)
        cut: Callable[[Tensor], Tensor] = lambda t: t if stacked else t[0].clone()
        return (
            [place(cut(x)).requires_grad_() for x in inputs],
            [place(w).requires_grad_() for w in rest],
            None if cotangent is None else place(cotangent if stacked else cotangent[0]),
        )


def _jvp(function: Function) -> Callable[[list[Tensor], list[Tensor]], Tensor]:
    def both(inputs: list[Tensor], rest: list[Tensor]) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # no fused attention has a JVP
            return forward_mode(function, inputs, rest)

    return both
