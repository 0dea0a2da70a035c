"""The entry points of the modules themselves, called past the Python side with arguments that do not fit: of the native
module, and of the CUDA one compiled for the CPU.

Valid calls are recorded from the small cases of tests/backends/cpu/test_bad_input.py, forward and backward, and
spoiled in every way below. Whatever claims more memory than there is must raise ValueError; the rest may raise or
run, but must not crash.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from backends import cuda_host
from backends.cpu.test_bad_input import SMALL
from ops.suite import Target

from aajr_kernels.backends import cpu as native
from aajr_kernels.backends import cuda
from aajr_kernels.testing.cases.case import outcome
from aajr_kernels.testing.cases.products import attention, head

PAGE = 4096
SIZES = [4, 2, 2, 1, 8]  # bytes of the dtype codes
EXTREMES = [-(2**63), -(2**40), -1, 0, 1, 2, 17, 2**31, 2**40, 2**63 - 1]
RECORDED = [
    *SMALL,
    head("probs", "recorded", (5,), 13, 37),
    head("l2", "recorded", (5,), 13, 37, labelled=True),
    attention("recorded", (2, 4, 2, 7, 9, 10, 6), mask="square", softcap=2.0, causal="lower_right", window=3),
    attention("recorded, q moves", (1, 4, 2, 7, 9, 10, 6), moves=(1, 0, 0)),
]


#: axes (entry, tensor, axis) whose size no other tensor repeats: the words of a head without a bias, the classes, the
#: rows that are summed, the blocks that share a parameter's gradient
FREE = {
    *(("head_fwd", 1, 0), ("sensitivity_fwd", 0, 3), ("norm_bwd", 8, 0), ("norm_bwd", 9, 0)),
    *(("column_sum", 0, axis) for axis in range(3)),
}
#: tensors with any number of axes that no other tensor repeats
ANY_AXES = {("column_sum", 0)}
#: tensors that may have any type: the mask
ANY_TYPE = {("attention_fwd", 3), ("attention_bwd", 3)}


@dataclass(eq=False)  # hashed by identity
class Call:
    """A valid call whose tensors lie, dense, in the middle of memory of their own."""

    module: ModuleType
    name: str
    tensors: list
    ints: tuple
    floats: tuple
    keep: list

    def run(self, **changed) -> None:
        arguments = {"tensors": tuple(self.tensors), "ints": self.ints, "floats": self.floats, "threads": 2}
        getattr(self.module, self.name)(**{**arguments, **changed})


def placed(t: torch.Tensor | None, keep: list):
    if t is None:
        return None
    dense = t.detach().contiguous()
    room = torch.zeros(2 * PAGE + dense.numel() * dense.element_size() * 4, dtype=torch.uint8)
    start = (-room.data_ptr()) % 64 + PAGE
    room[start : start + dense.numel() * dense.element_size()] = dense.view(-1).view(torch.uint8)
    keep.append(room)
    return room.data_ptr() + start, native.CODES[t.dtype], tuple(dense.shape), dense.stride()


def tensor_of(view) -> torch.Tensor | None:
    """A copy of what a module was given."""
    if view is None:
        return None
    pointer, code, shape, strides = view
    dtype = next(dtype for dtype, number in native.CODES.items() if number == code)
    if 0 in shape:
        return torch.zeros(shape, dtype=dtype)
    count = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides))
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(pointer)
    return torch.frombuffer(memory, dtype=dtype, count=count).as_strided(shape, strides).clone()


@functools.cache
def recorded(backend: str) -> tuple[Call, ...]:
    """One valid call of every entry with every combination of dtypes and missing tensors."""
    door = {"native": native, "cuda": cuda}[backend]
    by_key: dict[tuple, Call] = {}

    class Recorder:
        """The module, whose entries are recorded."""

        def __init__(self, module: ModuleType) -> None:
            self.module = module

        def __getattr__(self, name: str):
            entry = getattr(self.module, name)
            is_entry = "tensors:" in (entry.__doc__ or "")
            return functools.partial(self.call, name, entry) if is_entry else entry

        def call(self, name, entry, tensors, ints, floats, threads):
            entry(tensors, ints, floats, threads)
            key = (name, *(None if t is None else (t[1], len(t[2])) for t in tensors), ints)
            if key not in by_key:
                keep: list = []
                copies = [placed(tensor_of(t), keep) for t in tensors]
                by_key[key] = Call(self.module, name, copies, tuple(ints), tuple(floats), keep)

    for case in RECORDED:
        target = Target(backend)
        if target.why_not(case.op) is None:
            torch.manual_seed(0)
            inputs, params = ([t.float() for t in ts] for ts in case.build(2))
            with target.active(), pytest.MonkeyPatch.context() as patch:
                recorder = Recorder(door.module())
                patch.setattr(door, "module", lambda recorder=recorder: recorder)
                outcome(case.ours, inputs, params, torch.ones(case.ours(inputs, params).shape))
    return tuple(by_key.values())


@pytest.fixture(params=["native", "cuda"])
def calls(request) -> tuple[Call, ...]:
    reason = Target("native").why_not("norm") if request.param == "native" else cuda_host.why_not()
    if reason is not None:
        pytest.skip(reason)
    recorded_calls = recorded(request.param)
    assert recorded_calls
    return recorded_calls


def must_raise(call: Call, what: str, **changed) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT012
        call.run(**changed)
        pytest.fail(f"{call.name} accepted {what}")
    assert str(error.value).strip(), f"{call.name}: an empty message for {what}"


def may_raise(call: Call, **changed) -> None:
    with contextlib.suppress(ValueError, TypeError):
        call.run(**changed)


def with_tensor(call: Call, index: int, view) -> tuple:
    return (*call.tensors[:index], view, *call.tensors[index + 1 :])


def present(call: Call):
    return [(i, t) for i, t in enumerate(call.tensors) if t is not None]


def test_the_recorded_calls_are_valid(calls):
    for call in calls:
        call.run()
    names = {call.name for call in calls}
    untested = {n for n in dir(calls[0].module) if n.endswith(("_fwd", "_bwd")) and n not in names}
    print("entries without a recorded call:", sorted(untested))


def test_wrong_numbers_of_arguments(calls):
    for call in calls:
        t, i, f = tuple(call.tensors), call.ints, call.floats
        for changed in ({"tensors": t[:-1]}, {"tensors": (*t, None)}, {"tensors": ()}, {"ints": (*i, 0)}):
            must_raise(call, str(changed), **changed)
        must_raise(call, "one more float", floats=(*f, 0.0))
        if i:
            must_raise(call, "one integer less", ints=i[:-1])
        if f:
            must_raise(call, "one float less", floats=f[:-1])
        must_raise(call, "no tensor at all", tensors=(None,) * len(t))


def test_axes_that_are_longer_than_the_memory(calls):
    for call in calls:
        for index, (pointer, code, shape, strides) in present(call):
            for axis, size in enumerate(shape):
                if (call.name, index, axis) in FREE:
                    continue
                for longer in (size + 1, 2**31, 2**40, 2**62):  # 2^31: one more than an int holds
                    grown = (*shape[:axis], longer, *shape[axis + 1 :])
                    view = (pointer, code, grown, strides)
                    must_raise(
                        call, f"{grown} for tensor {index} {shape}", tensors=with_tensor(call, index, view)
                    )


def test_axes_too_many_and_too_few(calls):
    for call in calls:
        for index, (pointer, code, shape, strides) in present(call):
            more = (pointer, code, (2, *shape), (1, *strides))
            if (call.name, index) not in ANY_AXES:
                must_raise(call, f"a new axis on tensor {index}", tensors=with_tensor(call, index, more))
            scalar = (pointer, code, (), ())
            if shape:
                must_raise(call, f"a number as tensor {index}", tensors=with_tensor(call, index, scalar))
            nine = (pointer, code, (1,) * 9, (1,) * 9)
            must_raise(call, f"nine axes on tensor {index}", tensors=with_tensor(call, index, nine))


def test_types_wider_than_the_memory(calls):
    for call in calls:
        for index, (pointer, code, shape, strides) in present(call):
            for other in range(5):
                view = (pointer, other, shape, strides)
                changed = with_tensor(call, index, view)
                if (call.name, index) in ANY_TYPE:
                    may_raise(call, tensors=changed)
                elif SIZES[other] > SIZES[code]:
                    must_raise(call, f"dtype {other} for tensor {index} of dtype {code}", tensors=changed)
                else:
                    may_raise(call, tensors=changed)
            for unknown in (-1, 5, 99, 2**31 - 1):
                view = (pointer, unknown, shape, strides)
                must_raise(call, f"dtype {unknown}", tensors=with_tensor(call, index, view))


def test_addresses_that_cannot_be(calls):
    for call in calls:
        for index, (pointer, code, shape, strides) in present(call):
            view = (0, code, shape, strides)
            must_raise(call, f"no memory for tensor {index}", tensors=with_tensor(call, index, view))
            if SIZES[code] > 1:
                view = (pointer + 1, code, shape, strides)
                must_raise(call, f"a crooked tensor {index}", tensors=with_tensor(call, index, view))


def test_shorter_axes_missing_tensors_and_no_strides_do_not_crash(calls):
    for call in calls:
        for index, (pointer, code, shape, strides) in present(call):
            may_raise(call, tensors=with_tensor(call, index, None))
            may_raise(call, tensors=with_tensor(call, index, (pointer, code, shape, (0,) * len(shape))))
            may_raise(call, tensors=with_tensor(call, index, (pointer, code, shape[::-1], strides[::-1])))
            for axis, size in enumerate(shape):
                for shorter in {0, 1, size - 1}:
                    cut = (*shape[:axis], max(shorter, 0), *shape[axis + 1 :])
                    may_raise(call, tensors=with_tensor(call, index, (pointer, code, cut, strides)))


def test_integers_and_floats_of_every_size(calls):
    for call in calls:
        for i in range(len(call.ints)):
            for value in EXTREMES:
                may_raise(call, ints=(*call.ints[:i], value, *call.ints[i + 1 :]))
        for i in range(len(call.floats)):
            for value in (0.0, -1.0, 1e-300, 1e300, float("inf"), float("-inf"), float("nan")):
                may_raise(call, floats=(*call.floats[:i], value, *call.floats[i + 1 :]))


def test_numbers_of_threads_that_make_no_sense(calls):
    for call in calls:
        for threads in (-5, 0, 2**31 - 1):
            call.run(threads=threads)


@pytest.mark.parametrize("fill", [-1, 2**40, -(2**62)])
def test_indices_that_point_nowhere(calls, fill):
    for call in calls:
        for index, (_, code, shape, _) in present(call):
            if code == 4:
                keep: list = []
                wild = placed(torch.full(shape, fill, dtype=torch.int64), keep)
                may_raise(call, tensors=with_tensor(call, index, wild))


@pytest.mark.parametrize(
    "junk",
    [(1,), ("text",), ((1, 2),), ((1, 2, 3, 4),), ((0, 0, (2,), ()),), ((0, 0, (-1,), (1,)),)],
    ids=str,
)
def test_things_that_are_no_tensors(calls, junk):
    for call in calls:
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            call.run(tensors=junk * len(call.tensors))
