"""Calls of our operators as tracing would make them, for the tests of schemas and fake implementations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import aajr_kernels as aajr
from aajr_kernels.ops.sensitivity import softmax
from aajr_kernels.testing.cases import CASES as EVERY
from aajr_kernels.testing.cases.case import Case, problem
from aajr_kernels.testing.cases.products import CONTEXT

OPS = ("activation", "attention", "head", "norm", "sensitivity", "rotary")
CASES = {str(case): case for case in EVERY}
_WORDS = "bias per,residual,add,tables,interleaved,labels, bias,swiglu,softmax,layer".split(",")

Call = tuple[Any, tuple[Any, ...]]


class Recorder(TorchDispatchMode):
    """Records the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aajr":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def first_cases(ops: Sequence[str] = OPS) -> list[Case]:
    """The smallest case of every kind: the first and the last of every op, and those with a bias or residual."""
    cases = []
    for op in ops:
        mine = [case for case in CASES.values() if case.op == op]
        cases += [mine[0], mine[-1], *(c for c in mine[1:-1] if any(word in c.name for word in _WORDS))]
    return list({str(case): case for case in cases}.values())


def calls_on(backend: str, dtype: torch.dtype = torch.float32, ops: Sequence[str] = OPS) -> list[Call]:
    """One call of every operator with every pattern of missing arguments that the cases of `ops` bring."""
    patch = pytest.MonkeyPatch()
    with aajr.use_backend(backend), Recorder() as recorder:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)  # launchers then go through the operators
        try:
            with_context = [case for case in CONTEXT if "bias per pair" in case.name] * (backend == "native")
            for case in [*first_cases(ops), *with_context]:
                p = problem(case, 1, dtype)
                inputs = [case.layout(t.detach()).requires_grad_() for t in p.inputs]
                params = [t.detach().clone().requires_grad_() for t in p.params]
                y = case.ours(inputs, params)
                torch.autograd.grad(y, [*inputs, *params], p.cotangent, allow_unused=True)
            if "norm" in ops:  # what no case has: a sum and its norm, and a softmax of that
                x = torch.randn(2, 3, 8, dtype=dtype, requires_grad=True)
                y, total = aajr.add_rms_norm(aajr.Dual(x), aajr.Dual(2 * x), 8, torch.ones(8, dtype=dtype))
                (y.stacked.sum() + softmax(total).stacked.square().sum()).backward()
        finally:
            patch.undo()
    calls: dict[Any, Call] = {}
    for func, args in recorder.calls:
        pattern = tuple("tensor" if isinstance(a, torch.Tensor) else a for a in args)
        calls.setdefault((func, pattern), (func, args))
    return list(calls.values())


def name_of(func: Any) -> str:
    """``aajr::name``."""
    return str(func).removesuffix(".default").replace(".", "::", 1)


def plain(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, with tensors of their own that carry no graph: the operators have no derivative."""
    return tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)


def permuted(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same numbers with the last two axes of larger tensors exchanged in memory."""
    return tuple(
        a.detach().mT.contiguous().mT
        if isinstance(a, torch.Tensor) and a.dim() > 3
        else a.detach()
        if isinstance(a, torch.Tensor)
        else a
        for a in args
    )


def results(result: Any) -> tuple[torch.Tensor, ...]:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)
