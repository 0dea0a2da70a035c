"""A case of the sweep's table in any dtype: values, tangents and gradients by the package and by PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from rules.cases import Case
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from aajr_kernels import Dual, dual, is_dual

Results = dict[str, Tensor]


class Narrowed(TorchFunctionMode):
    """Float64 operands, the constants that a case closes over, in the dtype of the run."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def narrow(x: Any) -> Any:
            return x.to(self.dtype) if isinstance(x, Tensor) and x.dtype == torch.float64 else x

        args, kwargs = pytree.tree_map(narrow, (args, kwargs or {}), is_leaf=is_dual)
        return func(*args, **kwargs)


@dataclass
class Point:
    """A case at values that bfloat16 and float16 hold, with K directions."""

    case: Case
    places: list[int]
    values: list[Tensor]
    directions: list[Tensor]

    @staticmethod
    def of(case: Case, K: int) -> Point:
        generator = torch.Generator().manual_seed(K)
        places = [i for i, x in enumerate(case.inputs) if isinstance(x, Tensor) and x.dtype == torch.float64]
        directions = [torch.randn(K, *case.inputs[i].shape, generator=generator) for i in case.duals]
        round_ = lambda x: x.bfloat16().double()
        return Point(case, places, [round_(case.inputs[i]) for i in places], [round_(v) for v in directions])

    def plain(self, dtype: torch.dtype) -> list[Any]:
        """The outputs of ordinary tensors; raises what torch raises for the dtype."""
        return self._called(dtype, {i: x.to(dtype) for i, x in zip(self.places, self.values)})

    def ours(self, dtype: torch.dtype, rounded: torch.dtype | None = None) -> Results:
        """By the rules for Duals; outputs, and with them their cotangents, `rounded` once to a lower dtype."""
        values, directions = self._leaves(dtype)
        outputs = self._called(dtype, self._lifted(values, directions))
        if rounded is not None:
            outputs = [y.to(rounded) for y in outputs]
        primals, tangents = [y.primal for y in outputs], [y.tangents for y in outputs]
        return _results([*values, *directions], primals, tangents)

    def upstream(self, dtype: torch.dtype) -> Results:
        """By torch.func.jvp, one direction at a time."""
        values, directions = self._leaves(dtype)

        def of_duals(*duals: Tensor) -> tuple[Tensor, ...]:
            filled = {**dict(zip(self.places, values)), **dict(zip(self.case.duals, duals))}
            return tuple(self._called(dtype, filled))

        at = tuple(values[self.places.index(i)] for i in self.case.duals)
        runs = [torch.func.jvp(of_duals, at, v) for v in zip(*(v.unbind(0) for v in directions))]
        tangents = [torch.stack(parts) for parts in zip(*(run[1] for run in runs))]
        return _results([*values, *directions], list(runs[0][0]), tangents)

    def lifted(self, dtype: torch.dtype) -> list[Any]:
        """The outputs of Duals, without gradients."""
        return self._called(dtype, self._lifted(*self._leaves(dtype)))

    def _lifted(self, values: list[Tensor], directions: list[Tensor]) -> dict[int, Any]:
        filled: dict[int, Any] = dict(zip(self.places, (x * 1 for x in values)))
        for place, v in zip(self.case.duals, directions):
            filled[place] = dual(filled[place], v * 1)
        return filled

    def _leaves(self, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        leaf = lambda x: x.to(dtype).requires_grad_()
        return [leaf(x) for x in self.values], [leaf(v) for v in self.directions]

    def _called(self, dtype: torch.dtype, filled: dict[int, Any]) -> list[Any]:
        arguments = [filled.get(i, x) for i, x in enumerate(self.case.inputs)]
        with Narrowed(dtype), sdpa_kernel(SDPBackend.MATH):
            leaves = pytree.tree_leaves(self.case.fn(*arguments), is_leaf=is_dual)
        return [y for y in leaves if isinstance(y, (Tensor, Dual)) and y.is_floating_point()]


def _results(leaves: list[Tensor], primals: list[Tensor], tangents: list[Tensor]) -> Results:
    """All outputs and, of Φ = Σ c·y + Σ c_k·ẏ_k + ½ Σ ẏ_k² with random c, all gradients."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros((), dtype=torch.float64)
    for y, t in zip(primals, tangents):
        c, ck = (torch.randn(z.shape, generator=generator, dtype=torch.float64) for z in (y, t))
        total = total + (c * y.double()).sum() + (ck * t.double()).sum() + 0.5 * t.double().square().sum()
    gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    named = {"value": primals, "tangents": tangents, "gradient": gradients}
    return {f"{name} {i}": x.detach() for name, xs in named.items() for i, x in enumerate(xs)}
