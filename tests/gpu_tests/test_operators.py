"""The launchers as operators: schemas, fake implementations and tracing, checked by torch's own opcheck."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from native import cases_products, cases_rows
from native.suite import Case, Target, problem
from torch.utils._python_dispatch import TorchDispatchMode

import aajr_kernels as aajr
from aajr_kernels import gpu, runtime
from aajr_kernels.gpu import operators
from aajr_kernels.ops.reduce import softmax

pytestmark = pytest.mark.skipif(
    Target("triton").why_not("attention") is not None, reason="Triton cannot run here"
)

OPS = ("activation", "attention", "head", "norm", "reduce", "rotary")
CASES = {str(case): case for case in (*cases_rows.CASES, *cases_products.CASES)}


class Calls(TorchDispatchMode):
    """Records the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aajr":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def first_cases() -> list[Case]:
    """The smallest case of every kind: the first and the last of every op, and those with a bias or residual."""
    chosen = []
    for op in OPS:
        mine = [case for case in CASES.values() if case.op == op]
        words = (
            "bias per",
            "residual",
            "add",
            "tables",
            "interleaved",
            "labels, bias",
            "swiglu",
            "softmax",
            "layer",
        )
        chosen += [mine[0], mine[-1], *(c for c in mine[1:-1] if any(word in c.name for word in words))]
    return list({str(case): case for case in chosen}.values())


@pytest.fixture(scope="module")
def calls() -> list[tuple[Any, tuple[Any, ...]]]:
    """One call of every operator with every pattern of missing arguments that the cases bring."""
    found: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
    patch = pytest.MonkeyPatch()
    with aajr.use_backend("triton"), Calls() as mode:
        patch.setattr(
            torch.compiler, "is_compiling", lambda: True
        )  # the launchers then go through the operators
        try:
            for case in first_cases():
                p = problem(case, 1, torch.float32)
                inputs = [case.layout(t.detach()).requires_grad_() for t in p.inputs]
                params = [t.detach().clone().requires_grad_() for t in p.params]
                y = case.ours(inputs, params)
                torch.autograd.grad(y, [*inputs, *params], p.cotangent, allow_unused=True)
            x = torch.randn(2, 3, 8, requires_grad=True)
            y, total = aajr.add_rms_norm(aajr.Dual(x), aajr.Dual(2 * x), 8, torch.ones(8))
            (y.stacked.sum() + softmax(total).stacked.square().sum()).backward()
        finally:
            patch.undo()
    for func, args in mode.calls:
        pattern = tuple("tensor" if isinstance(a, torch.Tensor) else a for a in args)
        found.setdefault((func, pattern), (func, args))
    return list(found.values())


@pytest.mark.slow
def test_every_operator_passes_opcheck(calls):
    for func, args in calls:
        plain = tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)
        # no autograd of their own: the Functions above them own it
        torch.library.opcheck(func, plain, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
def test_every_operator_was_reached(calls):
    reached = {str(func).removesuffix(".default").replace(".", "::") for func, _ in calls}
    assert reached == set(operators.names)


@pytest.mark.slow
def test_fake_results_have_the_strides_of_real_ones_for_permuted_inputs(calls):
    for func, args in calls:
        permuted = tuple(
            a.detach().transpose(-1, -2).contiguous().transpose(-1, -2)
            if isinstance(a, torch.Tensor) and a.dim() > 3
            else a.detach()
            if isinstance(a, torch.Tensor)
            else a
            for a in args
        )
        real = func(*permuted)
        with gpu.dry_run():
            fake = func(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in permuted))
        for r, f in zip(*(x if isinstance(x, (tuple, list)) else (x,) for x in (real, fake))):
            assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype), str(func)


def test_operators_are_not_for_the_transforms_of_torch_func():
    """An opaque operator would give them a tangent of zero: what users call refuses or knows better."""
    x = torch.randn(3, 8)
    with aajr.use_backend("triton"):
        _, y_tan = torch.func.jvp(lambda t: aajr.rms_norm(t, 8), (x,), (torch.ones_like(x),))
    assert y_tan.abs().sum() > 0
    assert runtime.backends()["triton"] is None
