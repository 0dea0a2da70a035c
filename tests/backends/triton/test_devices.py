"""Faults that neither the interpreter nor a compiler shows: threads, settings, odd strides, scaled gradients."""

from __future__ import annotations

import threading

import pytest
import torch
from assertions import assert_exact
from ops.suite import DEVICES, Target

import aajr_kernels as aajr
from aajr_kernels import BackendUnavailable
from aajr_kernels.backends import choice
from aajr_kernels.backends.triton import launch as gpu
from aajr_kernels.backends.triton.layout import within_reach
from aajr_kernels.ops.attention import reference
from aajr_kernels.ops.attention.options import Options
from aajr_kernels.ops.head import triton as head

DEVICE = DEVICES["triton"]
pytestmark = pytest.mark.skipif(
    Target("triton").why_not("attention") is not None, reason="Triton cannot run here"
)


def test_a_dry_run_in_one_thread_leaves_the_launches_of_another():
    inside, leave, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        with gpu.dry_run("sm_90"):
            inside.set()
            leave.wait(10)
            seen.append(gpu.is_recorded())

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    x = torch.randn(1, 3, 8, device=DEVICE)
    with aajr.use_backend("triton"):
        y = aajr.gelu(aajr.Dual(x)).stacked
    leave.set()
    thread.join()
    assert seen == [True] and not gpu.is_recorded()
    assert_exact(y.cpu(), torch.nn.functional.gelu(x.double().cpu()), tolerance=1e-6)


def test_products_follow_either_way_to_choose_tf32(monkeypatch):
    x = torch.empty(1)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert gpu.float32_products(x) == "tf32x3"  # the interpreter, like processors of data centres
        assert gpu.float32_products(x.bfloat16()) == "ieee"
        for architecture, products in (
            ("sm_80", "tf32x3"),
            ("sm_90", "tf32x3"),
            ("sm_120", "ieee"),
            ("gfx942", "ieee"),
        ):
            with gpu.dry_run(architecture):
                assert gpu.float32_products(x) == products
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert gpu.float32_products(x) == "tf32"
        assert gpu.float32_products(x.bfloat16()) == "ieee"
        monkeypatch.setattr(torch.version, "hip", "6.4")
        assert gpu.float32_products(x) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("options", [{"dropout": 1}, {"scale": 1}, {"softcap": 1}], ids=str)
def test_whole_numbers_are_no_constants_of_the_kernels(options):
    """Triton makes an int of 1 a constant: 1 / (1 - dropout) is then divided by zero while it compiles."""
    from aajr_kernels.ops.attention.triton.problem import Problem

    x = torch.empty(2, 1, 2, 5, 16, device=DEVICE)
    scalars = Problem.of(x, x, x, None, Options(**({"scale": 0.3} | options))).scalars()[:3]
    assert all(isinstance(value, float) for value in scalars)


def test_gradients_of_overlapping_queries():
    from aajr_kernels.ops.attention import triton

    base = torch.randn(2, 1, 2, 23)
    q = base.unfold(-1, 16, 1)  # [2, 1, 2, 8, 16] with strides of 1 along both last axes
    k, v = torch.randn(2, 2, 1, 2, 9, 16).unbind()
    inputs = [x.to(DEVICE) for x in (base, k, v)]
    inputs[0] = inputs[0].unfold(-1, 16, 1)
    got = triton.attention_fwd(*inputs, None, Options(0.3))
    bar, needs = torch.randn(2, 1, 2, 8, 16), (True, True, True, False)
    bars = triton.attention_bwd(bar.to(DEVICE), *inputs, None, *got, options=Options(0.3), needs=needs)
    wide = [x.double() for x in (q, k, v)]
    exact = reference.attention_fwd(*wide, None, Options(0.3))
    expected = reference.attention_bwd(bar.double(), *wide, None, *exact, options=Options(0.3), needs=needs)
    for mine, theirs in zip(bars[:3], expected):
        assert_exact(mine.cpu(), theirs, tolerance=3e-6, floor=1.0)


def test_float16_gradients_are_not_formed_before_their_scale_is_known(monkeypatch):
    monkeypatch.setattr(head, "_JOINT_SIZE", {})
    monkeypatch.setattr(head, "_JOINT_SIZE_LOW", 16)
    asked = lambda dtype: head.head_joint(
        torch.randn(2, 5, 32, device=DEVICE, dtype=dtype), torch.randn(300, 32, device=DEVICE, dtype=dtype),
        None, None, None, "fisher", 1.0, None, -100, lambda q, at: (torch.full_like(q, 1e-4), None), True, True, False,
    )  # fmt: skip
    assert asked(torch.float16) is None
    assert asked(torch.bfloat16) is not None


def test_one_token_of_stacks_apart():
    base = torch.randn(1, 2, 8, device=DEVICE)
    rows = base.transpose(0, 1)  # [2, 1, 8]: contiguous to torch, with a stride of 16 along the tokens
    weight = torch.randn(40, 8, device=DEVICE)
    with aajr.use_backend("triton"):
        q = aajr.lm_head_sensitivity(aajr.Dual(rows), weight)
        expected = aajr.lm_head_sensitivity(aajr.Dual(rows.clone()), weight)
    assert torch.equal(q, expected)


def test_columns_out_of_reach_are_copied():
    x = torch.empty(1, device="meta").as_strided((2, 3, 4097), (1, 1, 1 << 20))
    near = within_reach(x)
    assert near is not None and near.is_contiguous()
    kept = torch.empty(1, device="meta").as_strided((2, 3, 4097), (1, 1, 1 << 10))
    assert within_reach(kept) is kept


def test_subclasses_without_memory_are_refused():
    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, x):
            return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, device=x.device)

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise AssertionError(func)

    with (
        aajr.use_backend("triton"),
        pytest.raises(BackendUnavailable, match="Wrapper, which has no memory"),
    ):
        choice.select_backend("norm", Wrapper(torch.randn(2, 3, device=DEVICE)))
