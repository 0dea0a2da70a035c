"""The launchers as operators: schemas, fake implementations and tracing, checked by torch's own opcheck."""

from __future__ import annotations

import functools

import pytest
import torch
from backends import operator_calls
from ops.suite import Target

import aajr_kernels as aajr
from aajr_kernels.backends import choice
from aajr_kernels.backends.triton import launch as gpu

pytestmark = pytest.mark.skipif(
    Target("triton").why_not("attention") is not None, reason="Triton cannot run here"
)


@functools.cache
def calls_of(op: str) -> list[operator_calls.Call]:
    return operator_calls.calls_on("triton", ops=(op,))


# in the interpreter all of them together would take minutes: each op is a test of its own
every_op = pytest.mark.parametrize("op", operator_calls.OPS)


@pytest.mark.slow
@every_op
def test_every_operator_passes_opcheck(op):
    for func, args in calls_of(op):
        # no autograd of their own: the Functions above them own it
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(func, operator_calls.plain(args), test_utils=tests)


@pytest.mark.slow
def test_every_operator_was_reached():
    from aajr_kernels.backends.triton.replay import operator

    reached = {operator_calls.name_of(func) for op in operator_calls.OPS for func, _ in calls_of(op)}
    assert reached == set(operator.names) and len(reached) > 10


@pytest.mark.slow
@every_op
def test_fake_results_have_the_strides_of_real_ones_for_permuted_inputs(op):
    for func, args in calls_of(op):
        permuted = operator_calls.permuted(args)
        real = func(*permuted)
        with gpu.dry_run():
            fake = func(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in permuted))
        for r, f in zip(operator_calls.results(real), operator_calls.results(fake)):
            assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype), str(func)


def test_operators_are_not_for_the_transforms_of_torch_func():
    """An opaque operator would give them a tangent of zero: what users call refuses or knows better."""
    x = torch.randn(3, 8)
    with aajr.use_backend("triton"):
        _, y_tan = torch.func.jvp(lambda t: aajr.rms_norm(t, 8), (x,), (torch.ones_like(x),))
    assert y_tan.abs().sum() > 0
    assert choice.backends()["triton"] is None
