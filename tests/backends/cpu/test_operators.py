"""The native launchers as operators of torch, which compiled code calls: torch's own opcheck, and strides."""

from __future__ import annotations

import pytest
import torch
from backends import operator_calls
from torch._subclasses.fake_tensor import FakeTensorMode

import aajr_kernels as aajr
from aajr_kernels.backends import choice
from aajr_kernels.backends import cpu as native

pytestmark = pytest.mark.skipif(
    choice.backends()["native"] is not None, reason=f"native: {choice.backends()['native']}"
)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def calls(request) -> list[operator_calls.Call]:
    return operator_calls.calls_on("native", request.param)


def test_every_operator_was_reached(calls):
    assert {operator_calls.name_of(func) for func, _ in calls} == set(native.operator.names)


SOME = ("test_schema", "test_faketensor")
ALL = (*SOME, "test_autograd_registration", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("checks", [SOME, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "all"])
def test_every_operator_passes_opcheck(calls, checks):
    """Schemas and fake results; all: and the same results from what torch.compile makes of one call, with symbols for
    sizes."""
    for func, args in calls:
        outcome = torch.library.opcheck(
            func, operator_calls.plain(args), test_utils=checks, raise_exception=False
        )
        assert outcome == dict.fromkeys(checks, "SUCCESS"), (str(func), outcome)


@pytest.mark.parametrize("layout", [operator_calls.plain, operator_calls.permuted])
def test_fake_results_have_the_strides_of_real_ones(calls, layout):
    for func, args in calls:
        arguments = layout(args)
        real = func(*arguments)
        with FakeTensorMode() as mode:
            fake = func(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
        for r, f in zip(operator_calls.results(real), operator_calls.results(fake)):
            assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype), str(func)


def test_results_share_no_memory(calls):
    """Neither with what went in nor with each other: an operator of torch that says so must keep it."""
    for func, args in calls:
        arguments = operator_calls.plain(args)
        tensors = [
            t for t in (*arguments, *operator_calls.results(func(*arguments))) if isinstance(t, torch.Tensor)
        ]
        owners = [t.untyped_storage().data_ptr() for t in tensors if t.numel()]
        assert len(owners) == len(set(owners)), str(func)


def test_an_eager_call_is_no_operator():
    x = torch.randn(2, 3, 8)
    with torch.autograd.profiler.profile() as profile:
        torch.add(x, x)
        aajr.rms_norm(aajr.Dual(x), 8)
    names = {event.name for event in profile.function_events}
    assert "aten::add" in names and not [name for name in names if name.startswith("aajr::")]


def test_modes_of_torch_see_the_operator():
    x = torch.randn(2, 3, 8)
    with operator_calls.Recorder() as recorder:
        y = aajr.rms_norm(aajr.Dual(x), 8)
    assert [str(func) for func, _ in recorder.calls] == ["aajr.native_norm_fwd.default"]
    assert torch.equal(y.primal, aajr.rms_norm(aajr.Dual(x), 8).primal)
