"""Invalid input: a clear error or the documented value, never a crash or a read out of bounds."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from ops.suite import Target, check
from torch import Tensor

import aajr_kernels as aajr
from aajr_kernels import Dual
from aajr_kernels.testing.cases.case import Case, gap, outcome
from aajr_kernels.testing.cases.products import attention, head
from aajr_kernels.testing.cases.rows import gated, layer, linear, pointwise, reduction, rms, rotary

SMALL = [
    rms("small", 37),
    layer("small", 37),
    pointwise("gelu", "small", 2, 3, 37),
    gated("silu", "small", 2, 3, 37),
    rotary("small", (2, 3, 5, 10), (2, 5, 8)),
    linear("small", (2, 3), (13, 21)),
    attention("small", (2, 4, 2, 7, 7, 10, 6), causal=True),
    attention("small with a bias", (2, 4, 2, 7, 9, 10, 6), bias=(2, 4, 7, 9)),
    head("fisher", "small", (2, 5), 13, 37, bias=True, labelled=True),
    reduction("probs", "small", 2, 3, 37),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def skip_unless_native(case: Case) -> None:
    reason = Target("native").why_not(case.op)
    if reason is not None:
        pytest.skip(reason)


# ------------------------------------------------------------------------------------------------------ memory
def misaligned(x: Tensor) -> Tensor:
    """The same numbers one byte away from where their type belongs."""
    memory = torch.frombuffer(
        bytearray(x.numel() * x.element_size() + 16), dtype=x.dtype, offset=1, count=x.numel()
    )
    return memory.view(x.shape).copy_(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_misaligned_memory_is_refused_by_name_or_read(case, dtype):
    """A kernel refuses it; where torch computes, as the products of a linear layer, it is read."""
    skip_unless_native(case)
    inputs, params = case.build(1)
    inputs, params = [t.to(dtype) for t in inputs], [t.to(dtype) for t in params]
    refused = []
    with Target("native").active():
        expected = case.ours(inputs, params)
        for i in range(len(inputs) + len(params)):
            tensors = [misaligned(t) if j == i else t for j, t in enumerate([*inputs, *params])]
            assert tensors[i].data_ptr() % dtype.itemsize == 1 % dtype.itemsize
            try:
                got = case.ours(tensors[: len(inputs)], tensors[len(inputs) :])
            except ValueError as error:
                refused.append(str(error))
            else:
                assert case.op == "linear"
                torch.testing.assert_close(got, expected)
    assert refused or case.op == "linear"  # its products in a low dtype may all be torch's
    assert all(re.search(r"aligned .*clone\(\)", message) for message in refused), refused


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_cotangents_and_inputs_of_expanded_memory(case, capability):
    skip_unless_native(case)

    def build(k):
        inputs, params = case.build(k)
        return [t[:, :1].expand_as(t).contiguous() if t.dim() > 2 else t for t in inputs], params

    layout = lambda x: x[:, :1].contiguous().expand_as(x) if x.dim() > 2 else x
    changed = dataclasses.replace(case, name=f"{case.name}, expanded", build=build, layout=layout)
    check(changed, Target("native", capability), 2, torch.float32)
    inputs, params = ([t.float() for t in ts] for ts in case.build(2))
    shape = case.ours(inputs, params).shape
    expanded = outcome(case.ours, inputs, params, torch.tensor(0.7).expand(shape))
    copied = outcome(case.ours, inputs, params, torch.full(shape, 0.7))
    for a, b in zip(expanded.gradients, copied.gradients):
        torch.testing.assert_close(a, b)


def far_apart(x: Tensor, path) -> Tensor:
    """The same numbers with more than 2^31 elements between neighbours on axis 1 of a stacked tensor: a sparse file,
    of which only the rows are ever touched."""
    step = 2**31 + 64
    rows, inner = x.shape[0] * x.shape[1], x[0, 0].numel()
    storage = torch.UntypedStorage.from_file(str(path), True, ((rows - 1) * step + inner) * x.element_size())
    flat = torch.empty(0, dtype=x.dtype).set_(storage)
    strides = (x.shape[1] * step, step, *x[0, 0].contiguous().stride())
    return flat.as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_strides_beyond_32_bits(case, tmp_path, capability):
    skip_unless_native(case)
    files = iter(range(100))

    def layout(x):
        return far_apart(x, tmp_path / f"{next(files)}") if x.dim() > 2 else x

    changed = dataclasses.replace(case, name=f"{case.name}, far apart", layout=layout)
    check(changed, Target("native", capability), 1, torch.bfloat16)


# ------------------------------------------------------------------------------------------------------- empty
def zeros(*shape: int, k: int = 1) -> Dual:
    return Dual(torch.zeros(1 + k, *shape).requires_grad_())


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


EMPTY = {
    "norm": [
        *(
            lambda x=x: aajr.rms_norm(zeros(*x), x[-1], leaf(x[-1]))
            for x in [(0, 4), (2, 0, 4), (0, 0, 4), (3, 0)]
        ),
        *(
            lambda x=x: aajr.layer_norm(zeros(*x, k=3), x[-1], leaf(x[-1]), leaf(x[-1]))
            for x in [(0, 4), (2, 0, 4), (3, 0)]
        ),
    ],
    "activation": [
        *(lambda x=x: aajr.gelu(zeros(*x)) for x in [(0,), (2, 0), (0, 3), (2, 0, 3)]),
        *(lambda x=x: aajr.swiglu(zeros(*x), zeros(*x)) for x in [(0,), (2, 0), (0, 3), (2, 0, 3)]),
    ],
    "rotary": [
        lambda: aajr.rotary(zeros(0, 3, 5, 8), leaf(1, 5, 8), leaf(1, 5, 8)),
        lambda: aajr.rotary(zeros(2, 0, 5, 8), leaf(2, 5, 8), leaf(2, 5, 8)),
        lambda: aajr.rotary(zeros(2, 3, 0, 8), leaf(2, 0, 8), leaf(2, 0, 8)),
        lambda: aajr.rotary(zeros(2, 3, 5, 8), leaf(2, 5, 0), leaf(2, 5, 0)),
    ],
    "linear": [
        lambda: aajr.linear(zeros(0, 5), leaf(4, 5), leaf(4)),
        lambda: aajr.linear(zeros(2, 0, 5), leaf(4, 5), leaf(4)),
        lambda: aajr.linear(zeros(3, 0), leaf(4, 0), leaf(4)),
        lambda: aajr.linear(zeros(3, 5), leaf(0, 5), leaf(0)),
    ],
    "attention": [
        lambda s=s: aajr.attention(zeros(*s[:4]), zeros(s[0], s[4], *s[5:7]), zeros(s[0], s[4], s[5], s[7]))
        for s in [
            # B H N D, HK M D V
            (0, 2, 3, 8, 2, 5, 8, 4),
            (2, 2, 0, 8, 2, 5, 8, 4),
            (2, 2, 3, 8, 2, 0, 8, 4),
            (2, 2, 3, 8, 2, 5, 8, 0),
            (2, 2, 3, 0, 2, 5, 0, 4),
            (2, 0, 3, 8, 0, 5, 8, 4),
        ]
    ],
    "head": [
        lambda: aajr.lm_head_sensitivity(zeros(0, 4), leaf(9, 4), leaf(9)),
        lambda: aajr.lm_head_sensitivity(
            zeros(2, 0, 4), leaf(9, 4), labels=torch.zeros(2, 0, dtype=torch.long)
        )[0],
        lambda: aajr.lm_head_sensitivity(zeros(3, 0), leaf(9, 0), leaf(9), metric="probs"),
        lambda: aajr.lm_head_sensitivity(zeros(0, 4), leaf(9, 4), metric="l2"),
    ],
    "sensitivity": [
        lambda: aajr.ops.sensitivity.sensitivity(zeros(0, 5), "fisher"),
        lambda: aajr.ops.sensitivity.sensitivity(zeros(2, 0, 5), "probs"),
        lambda: aajr.ops.sensitivity.sensitivity(zeros(3, 0), "l2"),
    ],
}


def empty_outcome(backend: str, call) -> object:
    """Shape, values and gradients of the leaves, or the type of the error."""
    torch.manual_seed(0)
    with aajr.use_backend(backend):
        try:
            y = call()
        except (ValueError, RuntimeError) as error:
            return type(error)
        y = y.stacked if isinstance(y, Dual) else y
        results = {}
        node = y.grad_fn
        seen = [node] if node is not None else []
        leaves = []
        while seen:
            n = seen.pop()
            if hasattr(n, "variable"):
                leaves.append(n.variable)
            seen += [f for f, _ in n.next_functions if f is not None]
        y.sum().backward()
        results["grads"] = [t.grad for t in leaves]
        return y.detach(), results["grads"]


@pytest.mark.parametrize(("op", "index"), [(op, i) for op, calls in EMPTY.items() for i in range(len(calls))])
def test_empty_tensors_give_what_the_reference_gives(op, index, capability):
    reason = Target("native").why_not(op)
    if reason is not None:
        pytest.skip(reason)
    expected = empty_outcome("reference", EMPTY[op][index])
    got = empty_outcome("native", EMPTY[op][index])
    if isinstance(expected, type):
        assert got is expected
        return
    torch.testing.assert_close(got[0], expected[0], equal_nan=True)
    for a, b in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


# -------------------------------------------------------------------------------------------------- non-finite
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_non_finite_numbers_stay_in_their_batch_row(case, value, capability):
    """A NaN is not lost, and other rows of the batch are bitwise what they are without it."""
    skip_unless_native(case)
    inputs, params = ([t.float() for t in ts] for ts in case.build(2))
    clean = case.ours(inputs, params)
    for which in range(len(inputs)):
        for stack in range(inputs[which].shape[0]):
            spoiled = [t.clone() for t in inputs]
            spoiled[which][stack, 1].view(-1)[3] = value
            spoiled[which].requires_grad_()
            y = case.ours(spoiled, params)
            at = 1  # the axis of the batch, behind the stack
            torch.testing.assert_close(
                y.detach().narrow(at, 0, 1), clean.narrow(at, 0, 1), rtol=0, atol=0, equal_nan=True
            )
            if math.isnan(value):
                assert y.detach().narrow(at, 1, 1).isnan().any(), f"input {which}, stack {stack}"
            (gradient,) = torch.autograd.grad(y[:, 0].sum(), spoiled[which], allow_unused=True)
            assert gradient is None or torch.isfinite(gradient[:, 0]).all()


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_huge_numbers_do_not_crash(case, capability):
    skip_unless_native(case)
    for scale in (1e-42, 1e-30, 1e30, 3e38):
        inputs, params = ([t.float() for t in ts] for ts in case.build(2))
        inputs = [gap((t * scale).nan_to_num()) for t in inputs]
        outcome(case.ours, inputs, params, torch.ones(case.ours(inputs, params).shape))
