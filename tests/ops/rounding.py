"""A formula whose every operation rounds at random: the error that the condition of a problem leaves to any algorithm.

Monte Carlo arithmetic: in float64, every result of every operation, forward and backward, is moved at random by at
most one unit in the last place of a dtype, and so is every term of a sum or of a product of matrices. (Correct rounding
is half a unit; exp and tanh of the kernels are right to about one.) A result in which large terms cancel moves by that
much of the terms, any other one by a few units. One eager computation has such errors, too, but may be right by luck,
or by structure: its softmax of one key is exactly one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from aajr_kernels.testing.cases.case import Problem, Result, Run, outcome

#: operations that copy, choose or negate numbers: their results are exact
_EXACT = frozenset(
    "_to_copy abs amax amin cat clamp clone constant_pad_nd copy_ flip full_like gather index index_select masked_fill "
    "max maximum min minimum neg new_full new_ones new_zeros ones_like relu repeat roll scatter select_backward "
    "slice_backward stack tril triu where zero_ zeros_like".split()
)
#: sums, of squares for squared operands
_SUMS = frozenset("addmm baddbmm bmm dot mean mm mv sum".split())


class RoundsAtRandom(TorchDispatchMode):
    """Results of operations inside move by at most one unit in the last place of `dtype`, drawn from `seed`."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        self._unit = torch.finfo(dtype).eps
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if is_view or name in _EXACT or not any(map(_is_real, tree_leaves((args, kwargs)))):
            return results
        for result in filter(_is_real, tree_leaves(results)):
            noise = torch.rand(result.shape, generator=self._generator, dtype=torch.float64)
            result.mul_(1 + self._unit * (2 * noise - 1))
        if name in _SUMS:
            squares = func(*tree_map(lambda t: t.square() if _is_real(t) else t, args), **(kwargs or {}))
            if name == "mean":
                squares = squares * (squares.numel() / args[0].numel())
            # many terms: their roundings, uniform in +-unit, add up to a normal deviate
            noise = torch.randn(results.shape, generator=self._generator, dtype=torch.float64)
            results.add_(noise * squares.sqrt() * (self._unit / math.sqrt(3)))
        return results


def _is_real(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def rounded(run: Run, p: Problem, seed: int) -> Result:
    """Outcome of a formula in float64 with random roundings of the problem's dtype."""
    inputs, params = ([t.double() for t in ts] for ts in (p.inputs, p.params))
    with RoundsAtRandom(p.cotangent.dtype, seed):
        return outcome(run, inputs, params, p.cotangent.double())
