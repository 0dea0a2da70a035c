"""Seeded fuzzing of the modules' entries, past the Python side: valid calls (`test_entries.recorded`) with one to three
arguments changed.

Memory of every tensor ends where its last element does, so that AddressSanitizer sees a step beyond it. An entry that
accepts a call must leave all memory but its results as it is, and give what it gives for dense copies of the same
tensors; otherwise it must raise ValueError with a sentence. Things of another Python type than the Python side passes
are refused by pybind11, in its words.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from backends.test_entries import EXTREMES, FREE, Call, tensor_of

from aajr_kernels.backends import cpu as native

DTYPES = list(native.CODES)
#: what lies between the elements of a tensor
GAP = {torch.float32: 0.75, torch.bfloat16: 0.75, torch.float16: 0.75, torch.bool: True, torch.int64: 2**40}
#: relative difference, in the Euclidean norm, of sums that other strides group otherwise: csrc/tests/selftest.cpp
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
FLOATS = [0.0, -1.0, 1e-300, 1e300, 3e38, math.inf, -math.inf, math.nan]
THREADS = [-(2**31), -5, 0, 1, 2, 3, 7]  # very many, which take seconds: test_entries.py
#: not what Python's side passes
JUNK = ["text", b"bytes", 1.5, None, (), [1], 2**64, -(2**70), object()]


@dataclass(frozen=True)
class Laid:
    """A tensor in memory of its own: `base` [elements], offset and strides in elements, also 0 and negative."""

    base: torch.Tensor
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
        """As an entry takes it."""
        address = self.base.data_ptr() + self.offset * self.base.element_size()
        return address, native.CODES[self.base.dtype], self.shape, self.strides

    def of(self, base: torch.Tensor) -> torch.Tensor:
        """The elements in memory like `base`."""
        if 0 in self.shape:
            return base.new_empty(self.shape)
        first = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides) if s < 0)
        forward = base.as_strided(self.shape, [abs(s) for s in self.strides], first)
        return forward.flip([axis for axis, s in enumerate(self.strides) if s < 0])

    def outside(self) -> torch.Tensor:
        """Which elements of the memory are none of the tensor's."""
        places = self.of(torch.arange(self.base.numel()))
        outside = torch.ones(self.base.numel(), dtype=torch.bool)
        outside[places.reshape(-1)] = False
        return outside

    def overlaps_itself(self) -> bool:
        places = self.of(torch.arange(self.base.numel()))
        return places.unique().numel() < places.numel()


def laid(values: torch.Tensor, rng: random.Random | None = None) -> Laid:
    """The numbers in new memory; dense, or with axes in any order, gaps, steps, signs and an offset."""
    order = list(range(values.dim()))
    strides = [0] * values.dim()
    running, first = 1, 0
    if rng is not None and rng.random() < 0.5:
        rng.shuffle(order)
    for axis in reversed(order):
        n = values.shape[axis]
        step = running * (1 if rng is None or rng.random() < 0.7 else rng.choice((2, 3)))
        running = step * max(n, 1) + (0 if rng is None or rng.random() < 0.6 else rng.randint(1, 9))
        strides[axis] = step
        if rng is not None and rng.random() < 0.1 and n > 0:
            strides[axis], first = -step, first + (n - 1) * step
    offset = 0 if rng is None or rng.random() < 0.5 else rng.randint(1, 17)
    last = sum((n - 1) * abs(s) for n, s in zip(values.shape, strides))
    base = torch.full((offset + (last + 1 if values.numel() else 0),), GAP[values.dtype], dtype=values.dtype)
    result = Laid(base, offset + first, tuple(values.shape), tuple(strides))
    if values.numel():
        places = result.of(torch.arange(base.numel()))
        base[places.reshape(-1)] = values.reshape(-1)
    return result


def fenced(values: torch.Tensor, behind: bool) -> Laid:
    """The numbers, dense, at the end of memory, or at its start: a step beyond ends the process."""
    dense = laid(values)
    if not values.numel():
        return dense
    size, page = dense.base.numel() * dense.base.element_size(), mmap.PAGESIZE
    room = -(-size // page) * page
    memory = mmap.mmap(-1, room + 2 * page)
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for fence in (first, first + page + room):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(page), 0) == 0
    offset = page + (room - size if behind else 0)
    base = torch.frombuffer(memory, dtype=values.dtype, count=dense.base.numel(), offset=offset)
    return Laid(base.copy_(dense.base), 0, dense.shape, dense.strides)


@functools.cache
def outputs_of(index: int, calls: tuple[Call, ...]) -> frozenset[int]:
    """Which tensors a recorded call writes: those whose earlier contents do not stay."""
    call = calls[index]
    values = [None if t is None else tensor_of(t) for t in call.tensors]
    written = set()
    for i, value in enumerate(values):
        if value is None or not value.dtype.is_floating_point or value.numel() == 0:
            continue
        tensors = [None if v is None else laid(v) for v in values]
        changed = tensors[i]
        before = changed.base.fill_(1.5).clone()
        call.run(tensors=tuple(None if t is None else t.view() for t in tensors))
        if not same(changed.base, before):
            written.add(i)
    return frozenset(written)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit by bit."""
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


class Wrong(AssertionError):
    """An entry accepted a call and gave something else than for dense copies, or spoiled memory."""


@dataclass
class Example:
    """A changed call. `tensors`: laid out, None, or whatever takes the place of a tensor."""

    call: Call
    outputs: frozenset[int]
    tensors: list
    ints: tuple
    floats: tuple
    threads: object
    changes: list[str]
    #: results overlap with themselves or other tensors
    unspecified: bool = False
    #: a tensor that is none
    impossible: bool = False
    #: memory of what is no Laid any more
    keep: list = field(default_factory=list)

    def attempt(self, tensors: list) -> Exception | None:
        """Runs the entry; the exception that it raised."""
        views = tuple(t.view() if isinstance(t, Laid) else t for t in tensors)
        try:
            self.call.run(tensors=views, ints=self.ints, floats=self.floats, threads=self.threads)
        except (ValueError, TypeError, MemoryError) as error:
            return error
        except RuntimeError as error:
            if not str(error).startswith("Unable to cast Python instance of type"):
                raise Wrong(f"{self}: {error!r}") from error
            return error
        return None

    def check(self) -> bool:
        """Whether the entry accepted the call.

        Raises:
            Wrong: it is neither refused with a sentence nor right.
        """
        before = [t.base.clone() if isinstance(t, Laid) else None for t in self.tensors]
        dense = [laid(t.of(t.base)) if isinstance(t, Laid) else t for t in self.tensors]
        error = self.attempt(self.tensors)
        if error is not None:
            if len(str(error)) < 10:
                raise Wrong(f"{self}: no sentence in {error!r}")
            for i, t in enumerate(self.tensors):
                if isinstance(t, Laid) and not same(t.base, before[i]):
                    raise Wrong(f"{self}: tensor {i} changed, and then {error!r}")
            return False
        if self.impossible:
            raise Wrong(f"{self}: accepted")
        if self.unspecified:
            return True
        for i, t in enumerate(self.tensors):
            if not isinstance(t, Laid):
                continue
            kept = t.outside() if i in self.outputs else torch.ones_like(t.base, dtype=torch.bool)
            if not same(t.base[kept], before[i][kept]):
                raise Wrong(f"{self}: memory of tensor {i} outside of the results changed")
        if (refused := self.attempt(dense)) is not None:
            raise Wrong(f"{self}: accepted, but its dense copy raises {refused!r}")
        for i in sorted(self.outputs):
            if isinstance(self.tensors[i], Laid):
                got, expected = (ts[i].of(ts[i].base) for ts in (self.tensors, dense))
                if not close(got, expected):
                    raise Wrong(f"{self}: tensor {i} is\n{got}\nfor dense copies\n{expected}")
        return True

    def __str__(self) -> str:
        return f"{self.call.name} with {'; '.join(self.changes)}"


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    finite = expected.isfinite()
    if not torch.equal(finite, got.isfinite()):
        return False
    a, b = got[finite].double(), expected[finite].double()
    return bool((a - b).norm() <= TOLERANCE.get(got.dtype, 0.0) * b.norm())


# ------------------------------------------------------------------------------------------------------- changes
def layout(example: Example, i: int, rng: random.Random) -> str:
    t = example.tensors[i]
    example.tensors[i] = moved = laid(t.of(t.base), rng)
    return f"strides {moved.strides} of shape {moved.shape} and offset {moved.offset} for tensor {i}"


def expanded(example: Example, i: int, rng: random.Random) -> str:
    t = example.tensors[i]
    axis = rng.randrange(max(len(t.shape), 1))
    if not t.shape or 0 in t.shape:
        return "nothing"
    values = t.of(t.base).narrow(axis, 0, 1).contiguous()
    one = laid(values)
    strides = (*one.strides[:axis], 0, *one.strides[axis + 1 :])
    example.tensors[i] = Laid(one.base, 0, t.shape, strides)
    example.unspecified |= i in example.outputs and example.tensors[i].overlaps_itself()
    return f"axis {axis} of tensor {i} expanded"


def huge(example: Example, i: int, rng: random.Random) -> str:
    """Only where another tensor has the same axis: otherwise the entry would be right to walk it all."""
    t, n = example.tensors[i], rng.choice((2**31, 2**40, 2**62))
    axes = [a for a in range(len(t.shape)) if (example.call.name, i, a) not in FREE]
    if not axes or example.changes:
        return "nothing"
    axis = rng.choice(axes)
    example.keep.append(t)
    example.tensors[i] = (*t.view()[:2], replaced(t.shape, axis, n), replaced(t.strides, axis, 0))
    return f"{n} elements on axis {axis} of tensor {i}"


def replaced(items: tuple, place: int, item: object) -> tuple:
    return (*items[:place], item, *items[place + 1 :])


def reshaped(example: Example, i: int, rng: random.Random) -> str:
    t = example.tensors[i]
    values, axis = t.of(t.base), rng.randrange(max(len(t.shape), 1))
    ways: list[Callable[[], torch.Tensor]] = [
        lambda: values.unsqueeze(axis),
        lambda: values.select(axis, 0),
        lambda: values.narrow(axis, 0, 0),
        lambda: values.narrow(axis, 0, 1),
        lambda: values.narrow(axis, 0, values.shape[axis] - 1),
        lambda: torch.cat([values, values.narrow(axis, 0, 1)], axis),
        lambda: values.transpose(axis, 0),
        lambda: values.flatten(),
        lambda: values.reshape(values.shape + (1,) * (9 - values.dim())),
    ]
    way = rng.randrange(len(ways))
    if not t.shape or 0 in t.shape:
        return "nothing"
    example.tensors[i] = laid(ways[way](), rng if rng.random() < 0.3 else None)
    return f"shape {example.tensors[i].shape} instead of {t.shape} for tensor {i}"


def retyped(example: Example, i: int, rng: random.Random) -> str:
    t = example.tensors[i]
    dtype = rng.choice(DTYPES)
    example.tensors[i] = laid(t.of(t.base).nan_to_num(0.0, 1.0, -1.0).to(dtype))
    return f"{dtype} instead of {t.base.dtype} for tensor {i}"


def raw(example: Example, i: int, rng: random.Random) -> str:
    """Give a pointer, type, shape or strides that no tensor has."""
    example.keep.append(example.tensors[i])
    address, code, shape, strides = example.tensors[i].view()
    size = example.tensors[i].base.element_size()
    ways = [
        (0, code, shape, strides),  # as a tensor on the device "meta"
        (address + rng.randrange(1, max(size, 2)), code, shape, strides)
        if size > 1
        else (0, code, shape, strides),
        (address, rng.choice((-1, 5, 99, 2**31 - 1, -(2**31), 2**40)), shape, strides),
        (address, code, (*shape[:-1], -1), strides),
        (address, code, (*shape[:-1], 2**63), strides),
        (address, code, shape, strides[:-1]),
        (address, code, shape[:-1], strides),
        (address, code, shape, (*strides[:-1], 2**63)),
        (-1, code, shape, strides),
        (2**64, code, shape, strides),
        (address, code, list(shape), strides),
        (address, code, shape),
        rng.choice(JUNK),
        (rng.choice(JUNK), code, shape, strides),
        (address, rng.choice(JUNK), shape, strides),
        (address, code, rng.choice(JUNK), strides),
        (address, code, (*shape[:-1], rng.choice(JUNK)), strides),
        (address, code, shape, (*strides[:-1], rng.choice(JUNK))),
    ]
    way = rng.randrange(len(ways))
    example.tensors[i] = ways[way]
    # sizes as a list are taken as well, and a tensor without elements needs no memory
    possible = ways[way] is None or ways[way] == (address, code, list(shape), strides)
    example.impossible |= bool(shape) and 0 not in shape and not possible
    return f"{example.tensors[i]!r:.200} as tensor {i}"


def missing(example: Example, i: int, rng: random.Random) -> str:
    example.tensors[i] = None
    return f"None as tensor {i}"


def shared(example: Example, i: int, rng: random.Random) -> str:
    """The memory of another tensor of the same type, shape apart."""
    t = example.tensors[i]
    fits = [
        j
        for j, other in enumerate(example.tensors)
        if j != i
        and isinstance(other, Laid)
        and other.base.dtype == t.base.dtype
        and other.base.numel() >= math.prod(t.shape)
    ]
    if not fits:
        return "nothing"
    j = rng.choice(fits)
    other, dense = example.tensors[j], laid(t.of(t.base))
    example.tensors[i] = Laid(other.base, 0, t.shape, dense.strides)
    example.unspecified |= bool({i, j} & example.outputs)
    return f"tensor {i} in the memory of tensor {j}"


def numbers(example: Example, i: int, rng: random.Random) -> str:
    values = example.tensors[i].of(example.tensors[i].base).clone()
    if values.dtype == torch.int64:
        values.fill_(rng.choice((-1, 2**40, -(2**62), 2**63 - 1)))
    elif values.dtype != torch.bool and values.numel():
        flat = values.view(-1) if values.is_contiguous() else values.reshape(-1)
        flat[rng.randrange(flat.numel())] = rng.choice((math.inf, -math.inf, math.nan, 3e38))
        values = flat.view(values.shape)
    example.tensors[i] = laid(values)
    return f"other numbers in tensor {i}"


def integer(example: Example, i: int, rng: random.Random) -> str:
    if not example.ints:
        return "nothing"
    i = rng.randrange(len(example.ints))
    example.ints = replaced(example.ints, i, rng.choice([*EXTREMES, *JUNK]))
    return f"integer {i} is {example.ints[i]!r}"


def floating(example: Example, i: int, rng: random.Random) -> str:
    if not example.floats:
        return "nothing"
    i = rng.randrange(len(example.floats))
    example.floats = replaced(example.floats, i, rng.choice([*FLOATS, *(j for j in JUNK if j != 1.5)]))
    return f"float {i} is {example.floats[i]!r}"


def number_of_threads(example: Example, i: int, rng: random.Random) -> str:
    example.threads = rng.choice([*THREADS, *JUNK])
    return f"{example.threads!r} threads"


def counts(example: Example, i: int, rng: random.Random) -> str:
    way = rng.randrange(4)
    if way == 0:
        example.tensors.pop()
    elif way == 1:
        example.tensors.append(None)
    elif way == 2:
        example.ints = example.ints[:-1]
    else:
        example.floats = (*example.floats, 0.0)
    return ("a tensor less", "a tensor more", "an integer less", "a float more")[way]


CHANGES = (layout, layout, layout, layout, expanded, expanded, huge, reshaped, reshaped, retyped, raw, raw, missing,
           shared, numbers, integer, floating, number_of_threads, counts)  # fmt: skip


def valid(call: Call, outputs: frozenset[int], threads: int) -> Example:
    """A recorded call with tensors in memory of their own."""
    values = [None if t is None else tensor_of(t) for t in call.tensors]
    for i in outputs:
        values[i].zero_()
    tensors = [None if v is None else laid(v) for v in values]
    return Example(call, outputs, tensors, call.ints, call.floats, threads, [])


def example(seed: int, calls: tuple[Call, ...]) -> Example:
    """Of a seed, the same every time."""
    rng = random.Random(seed)
    index = rng.randrange(len(calls))
    made = valid(calls[index], outputs_of(index, calls), rng.choice((1, 2, 3)))
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = [i for i, t in enumerate(made.tensors) if isinstance(t, Laid)]
        if places:
            made.changes.append(rng.choice(CHANGES)(made, rng.choice(places), rng))
    return made


def fuzz(calls: tuple[Call, ...], seeds, capabilities: list[str]) -> Counter:
    """Check the examples of these seeds; how many were accepted and refused.

    Raises:
        Wrong: one is neither refused with a sentence nor right; the message has its seed.
    """
    seen: Counter = Counter()
    for seed in seeds:
        capability = None
        if capabilities:
            capability = capabilities[seed % len(capabilities)]
            calls[0].module.set_capability(capability)
        try:
            made = example(seed, calls)
            seen["accepted" if made.check() else "refused"] += 1
        except Wrong as error:
            raise Wrong(f"seed {seed}, {capability}: {error}") from None
    return seen
