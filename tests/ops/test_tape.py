"""Calls of ops as one step of autograd: the same numbers, and nothing that autograd would refuse."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import aajr_kernels as aajr
from aajr_kernels import Dual
from aajr_kernels.backends import selfcheck
from aajr_kernels.ops import tape
from aajr_kernels.ops.activation import swiglu
from aajr_kernels.ops.attention import attention
from aajr_kernels.ops.autograd import Function
from aajr_kernels.ops.between import Heads, Joined, Sum, Turned
from aajr_kernels.ops.linear import projections
from aajr_kernels.ops.norm import add_rms_norm
from aajr_kernels.ops.tape import Untaped, in_one_step


def block(x: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Reads its stream twice, and one weight twice."""
    y, stream = add_rms_norm(Dual(x), None, 6, norm)
    a, b = projections(y, [(gate, None), (up, None)])
    (h,) = projections(swiglu(a, b), [(down, None)])
    (again,) = projections(h, [(gate, None)])
    (again,) = projections(again, [(down, None)])
    heads = Turned.apply(Heads.apply(again.stacked, 3, False))
    other = Joined.apply(Heads.apply(h.stacked, 2, True))
    return Sum.apply(Sum.apply(stream.stacked, Joined.apply(heads)), other)


def leaves(frozen: tuple[int, ...] = ()) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 2, 4, 6), (6,), (8, 6), (8, 6), (6, 8)
    drawn = [torch.randn(*shape, generator=generator) for shape in shapes]
    return [x.requires_grad_(i not in frozen) for i, x in enumerate(drawn)]


def gradients(y: Tensor, inputs: list[Tensor], **options) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, inputs, torch.arange(float(y.numel())).cos().reshape(y.shape), **options)


@pytest.mark.parametrize("frozen", [(), (0,), (1, 2), (0, 1, 2, 3), (2, 4)], ids=str)
def test_one_step_is_its_body(frozen):
    inputs = leaves(frozen)
    trained = [x for x in inputs if x.requires_grad]
    step, parts = in_one_step(lambda: block(*inputs), inputs), block(*inputs)
    assert torch.equal(step, parts)
    assert {type(fn[0]).__name__ for fn in step.grad_fn.next_functions if fn[0]} == {"AccumulateGrad"}
    for ours, theirs in zip(gradients(step, trained), gradients(parts, trained), strict=True):
        assert torch.equal(ours, theirs)


def test_an_input_given_twice_and_one_that_is_not_read():
    x, norm, gate, _, down = leaves()
    unread = torch.randn(3, requires_grad=True)
    step = in_one_step(lambda: block(x, norm, gate, gate, down), [x, norm, gate, gate, down, unread])
    expected = gradients(block(x, norm, gate, gate, down), [x, gate])
    *ours, none = gradients(step, [x, gate, unread], allow_unused=True)
    assert none is None and all(map(torch.equal, ours, expected))


def test_a_graph_serves_as_often_as_it_is_kept():
    inputs = leaves()
    step = in_one_step(lambda: block(*inputs), inputs)
    first = gradients(step, inputs, retain_graph=True)
    (alone,) = gradients(step, inputs[2:3], retain_graph=True)
    assert torch.equal(alone, first[2])
    assert all(map(torch.equal, first, gradients(step, inputs)))
    with pytest.raises(RuntimeError, match="second time"):
        gradients(step, inputs)


class _Square(Function):
    """Its backward begins with another one of the same graph, once."""

    again: list[tuple[Tensor, Tensor]] = []

    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, bar):
        while _Square.again:
            y, x = _Square.again.pop()
            torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
        (x,) = ctx.saved_tensors
        return 2.0 * x * bar


def test_a_backward_inside_a_backward_of_the_same_graph():
    x = torch.randn(3, requires_grad=True)
    y = in_one_step(lambda: _Square.apply(x), [x])
    _Square.again.append((y, x))
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    assert torch.equal(gradient, 2.0 * x) and not _Square.again


def test_hooks_of_parameters_see_their_gradient_once():
    inputs, seen = leaves(), []
    expected = gradients(block(*inputs), inputs[2:3])
    inputs[2].register_hook(lambda bar: seen.append(bar) or 2.0 * bar)
    inputs[2].register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    y = in_one_step(lambda: block(*inputs), inputs)
    y.backward(torch.arange(float(y.numel())).cos().reshape(y.shape))
    assert len(seen) == 2 and torch.equal(seen[0], expected[0]) and torch.equal(seen[1], 2.0 * expected[0])


def test_nothing_to_train():
    inputs = leaves((0, 1, 2, 3, 4))
    step = in_one_step(lambda: block(*inputs), inputs)
    assert not step.requires_grad and torch.equal(step, block(*inputs))


def test_another_thread_is_not_in_the_step():
    inputs, nodes = leaves(), []

    def body():
        thread = threading.Thread(target=lambda: nodes.append(block(*inputs).grad_fn))
        thread.start()
        thread.join()
        return block(*inputs)

    in_one_step(body, inputs)
    assert nodes[0] is not None


def test_a_second_derivative_is_refused():
    inputs = leaves()
    with pytest.raises(RuntimeError, match="has no derivative"):
        gradients(in_one_step(lambda: block(*inputs), inputs), inputs, create_graph=True)


def test_a_write_to_what_was_saved_is_seen():
    inputs = leaves()
    step = in_one_step(lambda: block(*inputs), inputs)
    with torch.no_grad():
        inputs[3].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(step, inputs)


def test_hooks_see_all_that_is_saved_once():
    inputs, packed = leaves(), []
    with saved_tensors_hooks(lambda x: (packed.append(x), x.clone())[1], lambda x: x):
        step = in_one_step(lambda: block(*inputs), inputs)
    assert len({id(x) for x in packed}) == len(packed) > len(inputs)
    assert all(map(torch.equal, gradients(step, inputs), gradients(block(*inputs), inputs)))


def test_a_checkpointed_step():
    inputs = leaves()
    step = torch.utils.checkpoint.checkpoint(
        lambda *inputs: in_one_step(lambda: block(*inputs), inputs), *inputs, use_reentrant=False
    )
    assert all(map(torch.equal, gradients(step, inputs), gradients(block(*inputs), inputs)))


# -- programs ---------------------------------------------------------------------------------------------------------


def repeated(inputs: list[Tensor], programs: dict, body=block, key=None) -> bool:
    """Whether a step, which is checked against its body, was one of the programs."""
    called = []
    step = in_one_step(lambda: called.append(0) or body(*inputs), inputs, programs, key)
    trained, parts = [x for x in inputs if x.requires_grad], body(*inputs)
    assert torch.equal(step, parts)
    for ours, theirs in zip(gradients(step, trained), gradients(parts, trained), strict=True):
        assert torch.equal(ours, theirs)
    return not called


def test_calls_are_repeated_where_they_would_be_the_same():
    inputs, programs = leaves(), {}
    assert not repeated(inputs, programs)
    assert repeated(inputs, programs)
    others = [(1.5 * x.detach()).requires_grad_() for x in inputs]
    assert repeated(others, programs)
    assert not repeated(others, programs, key="another one") and len(programs) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.detach(),
        lambda x: x.detach().double().requires_grad_(),
        lambda x: x.detach()[:, :1].requires_grad_(),
        lambda x: x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(),
    ],
    ids=["frozen", "dtype", "size", "strides"],
)
def test_calls_of_other_inputs_are_noted(change):
    inputs, programs = leaves(), {}
    repeated(inputs, programs)
    inputs = [
        change(inputs[0]),
        *([x.detach().to(change(inputs[0]).dtype).requires_grad_() for x in inputs[1:]]),
    ]
    assert not repeated(inputs, programs) and repeated(inputs, programs)


def test_calls_of_another_backend_are_noted():
    inputs, programs = leaves(), {}
    repeated(inputs, programs)
    with aajr.use_backend("reference"):
        assert not repeated(inputs, programs) and repeated(inputs, programs)
    assert repeated(inputs, programs)


def test_an_input_given_twice_may_be_two_the_next_time():
    x, norm, gate, up, down = leaves()
    programs = {}
    assert not repeated([x, norm, gate, gate, down], programs) and not programs
    assert not repeated([x, norm, gate, up, down], programs)
    assert not repeated([x, norm, gate, gate, down], programs)


def attending(x: Tensor, mask: Tensor, row: Callable[[Tensor], Tensor]) -> Tensor:
    return attention(Dual(x), Dual(x), Dual(x), mask=row(mask)).stacked


def test_a_view_of_a_mask():
    generator, programs = torch.Generator().manual_seed(0), {}
    body = functools.partial(attending, row=lambda mask: mask[1:2])
    for count in range(3):
        x = torch.randn(2, 1, 2, 4, 6, generator=generator).requires_grad_()
        mask = (torch.rand(3 + count, 4, generator=generator) > 0.3)[count:]  # at other places of its memory
        assert repeated([x, mask], programs, body) == (count > 0)


def test_a_mask_that_is_computed_is_computed_again():
    programs: dict = {}
    x, mask = torch.randn(2, 1, 2, 4, 6, requires_grad=True), torch.ones(1, 4, dtype=torch.bool).triu(1)
    assert not repeated([x, mask], programs, functools.partial(attending, row=lambda mask: ~mask))
    assert not programs


def test_a_backend_that_went_unchecked_is_chosen_again(monkeypatch):
    inputs, programs = leaves(), {}

    def unchecked(*inputs):
        selfcheck.left_out += 1
        return block(*inputs)

    assert not repeated(inputs, programs, unchecked) and not programs


def test_programs_are_limited(monkeypatch):
    monkeypatch.setattr(tape, "LIMIT", 2)
    inputs, programs = leaves(), {}
    assert not any(repeated(inputs, programs, key=key) for key in range(3))
    assert len(programs) == 1 and repeated(inputs, programs, key=2)


# -- what is refused --------------------------------------------------------------------------------------------------


class _Materializing(Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()


@pytest.mark.parametrize(
    "change",
    [
        lambda x, norm: add_rms_norm(Dual(x * 1.0), None, 6, norm)[0].stacked,
        lambda x, norm: add_rms_norm(Dual(x), None, 6, norm.detach())[0].stacked,
        lambda x, norm: add_rms_norm(Dual(x), None, 6, norm)[0].stacked + 1.0,
        lambda x, norm: _Materializing.apply(x),
    ],
    ids=["argument", "weight", "result", "materialized"],
)
def test_what_is_not_noted_is_refused(change):
    x, norm, *_ = leaves()
    with pytest.raises(Untaped):
        in_one_step(lambda: change(x, norm), [x, norm])
    assert add_rms_norm(Dual(x), None, 6, norm)[0].stacked.grad_fn is not None  # autograd is back


def test_results_that_are_computed_again_are_refused():
    inputs = leaves()
    with aajr.recompute(), pytest.raises(Untaped):
        in_one_step(lambda: block(*inputs), inputs)


def test_an_error_inside_ends_the_step():
    inputs = leaves()
    with pytest.raises(ZeroDivisionError):
        in_one_step(lambda: block(*inputs) / (1 // 0), inputs)
    assert block(*inputs).grad_fn is not None
