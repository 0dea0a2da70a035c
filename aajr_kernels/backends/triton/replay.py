"""Calls of launchers, recorded once per signature and replayed.

A launcher checks, allocates, chooses tiles and builds arguments, which takes ten times as long as starting its kernels
and has the same outcome whenever the same sizes come again. :func:`replayed` runs it once under a recorder; from then
on a call with the same signature allocates the same memory and starts the same compiled kernels at the new addresses.

The signature has everything that launchers and Triton's compiler look at: of tensors the sizes, strides, dtype, device
and address modulo 16, of other arguments type and value, and how float32 is multiplied. What may change beside, tables
of tiles and variables of the environment, takes effect after :func:`.launch.forget`.

A signature is recorded at its second call, so that lengths which never come back cost no recording. Operations of torch
are repeated, one by one. Calls are never replayed in which a result depends on numbers in tensors, or whose launches
Triton does not let be taken apart (:mod:`.direct`).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...torch_private import TorchDispatchMode, has_dispatch_modes
from .. import capture
from ..operator import Registry
from . import launch as gpu
from .direct import direct, is_hooked, stream

#: signatures that are kept; the oldest goes first, unless it was replayed since it was the oldest before
LIMIT = 2048
#: alignment of pointers that Triton's compiler and tensor maps make use of, in bytes
_ALIGNMENT = 16
_SCALARS = {bool, int, float, str, torch.dtype}
_aten = torch.ops.aten
_ALLOCATIONS = (
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
)
_UNFORESEEN = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


#: the tensors of a call that is replayed, the arguments first, by number; None once they are not needed
Memory = list[Tensor | None]


@dataclass
class Part:
    """A tensor as a part of another one, at an offset from its beginning in elements."""

    number: int
    size: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def __call__(self, memory: Memory) -> Tensor:
        x = memory[self.number]
        assert x is not None  # needed, and kept for that
        return x.as_strided(self.size, self.strides, x.storage_offset() + self.offset)


@dataclass
class Allocation:
    """Memory for results and for what passes between kernels."""

    size: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class Operation:
    """An operator of torch; with Parts in place of tensors. What it `allocates` is added to the memory."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    allocates: bool

    def __call__(self, memory: Memory) -> Tensor:
        with torch.no_grad():
            result: Tensor = self.func(*_filled(self.args, memory), **self.kwargs)
        return result


def _filled(args: Iterable[Any], memory: Memory) -> list[Any]:
    return [
        x(memory) if isinstance(x, Part) else _filled(x, memory) if isinstance(x, (list, tuple)) else x
        for x in args
    ]


@dataclass
class Launch:
    """A compiled kernel, and the places among its arguments of addresses and tensor maps: tensor, offset in bytes."""

    run: Callable[..., None]
    grid: tuple[int, ...]
    kernel: tuple[Any, ...]
    arguments: list[Any]
    pointers: list[tuple[int, int, int]]
    maps: list[tuple[int, int, int, Any]]

    def __call__(self, addresses: list[int], stream: Any) -> None:
        arguments = self.arguments.copy()
        for i, number, offset in self.pointers:
            arguments[i] = addresses[number] + offset
        for i, number, offset, maps in self.maps:
            arguments[i] = maps[addresses[number] + offset]
        self.run(*self.grid, stream, *self.kernel, *arguments)


Step = Allocation | Operation | Launch


@dataclass
class Call:
    """A recorded call of a launcher.

    Attributes:
        steps: in order, with the numbers of the tensors that no later one needs.
        results: of each, None, the number of a tensor, or a part of one.
        many: whether the launcher returns a tuple.
        used: whether it was replayed since it was last the oldest.
    """

    steps: list[tuple[Step, list[int]]]
    results: list[int | Part | None]
    many: bool
    used: bool = False

    def __call__(self, inputs: list[Tensor], addresses: list[int]) -> Any:
        self.used = True
        memory: Memory = [*inputs]
        device = inputs[0].device
        with gpu.guard(device):
            queue = stream(device.index or 0)
            for step, done in self.steps:
                made = None
                if type(step) is Allocation:
                    made = torch.empty_strided(step.size, step.strides, dtype=step.dtype, device=device)
                elif type(step) is Launch:
                    step(addresses, queue)
                elif type(step) is Operation:
                    result = step(memory)
                    made = result if step.allocates else None
                if made is not None:
                    memory.append(made)
                    addresses.append(made.data_ptr())
                for number in done:
                    memory[number] = None
        results = [
            memory[x] if type(x) is int else None if x is None else x(memory)  # type: ignore[operator]
            for x in self.results
        ]
        return tuple(results) if self.many else results[0]


_lock = threading.Lock()
#: signature -> its recorded call; None: seen once, False: cannot be replayed
_calls: dict[tuple[Any, ...], Call | bool | None] = {}


def replayed(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a launcher with positional arguments: tensors, numbers, strings, dtypes and None.

    It must not depend on, nor change, anything but its arguments.
    """

    @functools.wraps(launcher)
    def call(*args: Any) -> Any:
        settings = gpu.settings()
        if settings is None or has_dispatch_modes():
            return launcher(*args)
        key: list[Any] = [launcher, settings]
        tensors: list[Tensor] = []
        addresses: list[int] = []
        for x in args:
            if isinstance(x, Tensor):
                address = x.data_ptr()
                tensors.append(x)
                addresses.append(address)
                key += x.shape, x.stride(), x.dtype, x.get_device(), address % _ALIGNMENT
            elif x is None:
                key.append(None)
            elif type(x) in _SCALARS:
                key += type(x), x
            else:
                return launcher(*args)
        signature = tuple(key)
        recorded = _calls.get(signature, False if not tensors else ...)
        if isinstance(recorded, Call):
            return launcher(*args) if is_hooked() else recorded(tensors, addresses)
        if recorded is False or capture.is_capturing(tensors[0].device):
            return launcher(*args)
        if recorded is None:
            recorded, results = _record(launcher, args)
        else:
            recorded, results = None, launcher(*args)
        with _lock:
            _make_room()
            _calls[signature] = recorded
        return results

    return call


def _make_room() -> None:
    """The oldest signatures go: lengths that come once leave those of every step."""
    while len(_calls) >= LIMIT:
        signature, oldest = next(iter(_calls.items()))
        del _calls[signature]
        if isinstance(oldest, Call) and oldest.used:
            oldest.used = False
            _calls[signature] = oldest


def _record(launcher: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Call | bool, Any]:
    """The recorded call, or False, and its results."""
    apart = _apart(args)
    if apart is None:
        return False, launcher(*args)
    recorder = _Recorder([x for x in apart if isinstance(x, Tensor)])
    with recorder, gpu.traced(recorder.launch):
        results = launcher(*apart)
    return recorder.call(results), results


def _apart(args: tuple[Any, ...]) -> list[Any] | None:
    """The arguments, each tensor in memory of its own, so that a pointer tells its tensor; None where that fails."""
    apart: list[Any] = []
    seen: set[int] = set()
    for x in args:
        if isinstance(x, Tensor) and x.numel():
            if _storage(x) in seen:
                extent, (before, rest) = _extent(x), divmod(x.data_ptr() % _ALIGNMENT, x.element_size())
                if rest:
                    return None
                memory = torch.empty(before + extent, dtype=x.dtype, device=x.device)
                memory[before:].copy_(x.detach().as_strided((extent,), (1,)))
                x = memory.as_strided(x.shape, x.stride(), before)
            seen.add(_storage(x))
        apart.append(x)
    return apart


def _extent(x: Tensor) -> int:
    """Elements from the first of a tensor to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class _Recorder(TorchDispatchMode):
    """Sees allocations, operations and launches of a launcher."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.inputs = len(inputs)
        self.tensors = list(inputs)  # kept, lest memory be used twice
        self.numbers = {_storage(x): number for number, x in enumerate(inputs)}
        self.steps: list[Step] = []
        self.allocations: dict[int, Allocation] = {}
        self.last: dict[int, int] = {}  # step that needs a tensor
        self.follows = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or _UNFORESEEN.intersection(func.tags):
            # several views, such as those of `unbind`, are seen where they are used
            views = isinstance(result, (list, tuple)) and all(_storage(x) in self.numbers for x in result)
            self.follows &= views and not func._schema.is_mutable
        elif func in _ALLOCATIONS:
            self._allocate(result)
        elif _storage(result) not in self.numbers or func._schema.is_mutable:
            self._operate(func, args, kwargs or {}, result)
        return result

    def _add(self, x: Tensor) -> int:
        self.numbers[_storage(x)] = number = len(self.tensors)
        self.tensors.append(x)
        self.last[number] = len(self.steps)
        return number

    def _allocate(self, x: Tensor) -> int:
        number = self._add(x)
        self.allocations[number] = Allocation(tuple(x.shape), x.stride(), x.dtype)
        self.steps.append(self.allocations[number])
        return number

    def _operate(self, func: Any, args: Any, kwargs: dict[str, Any], result: Tensor) -> None:
        try:
            parts = tuple(self._parts(args))
        except KeyError:  # memory from elsewhere
            self.follows = False
            return
        self.follows &= not any(isinstance(x, Tensor) for x in kwargs.values())
        allocates = _storage(result) not in self.numbers
        if allocates:
            self._add(result)
        self.steps.append(Operation(func, parts, kwargs, allocates))

    def _parts(self, args: Any) -> Iterable[Any]:
        for x in args:
            if isinstance(x, Tensor):
                yield self._part(x)
            else:
                yield tuple(self._parts(x)) if isinstance(x, (list, tuple)) else x

    def _part(self, x: Tensor) -> Part:
        number, offset = self._place(x)
        if x.dtype != self.tensors[number].dtype:
            raise KeyError("memory seen as another dtype")
        return Part(number, tuple(x.shape), x.stride(), offset // x.element_size())

    def _place(self, x: Tensor) -> tuple[int, int]:
        """The number of the tensor that `x` is a part of, and how many bytes after its beginning."""
        number = self.numbers[_storage(x)]
        self.last[number] = len(self.steps)
        return number, x.data_ptr() - self.tensors[number].data_ptr() if x.numel() else 0

    def launch(self, *launch: Any) -> None:
        """A launch: the arguments of :func:`.direct.direct`."""
        apart = direct(*launch)
        if apart is None or any(_storage(x) not in self.numbers for _, x, *_ in apart.tensors + apart.maps):
            self.follows = False  # Triton lacks a part, or there is memory from elsewhere
            return
        pointers = [(i, *self._place(x)) for i, x in apart.tensors]
        maps = [(i, *self._place(x), tensor_maps) for i, x, tensor_maps in apart.maps]
        arguments = [None if isinstance(x, Tensor) else x for x in apart.arguments]
        self.steps.append(Launch(apart.run, apart.grid, apart.kernel, arguments, pointers, maps))

    def call(self, results: Any) -> Call | bool:
        """The recorded call, False where it cannot be replayed."""
        many = isinstance(results, tuple)
        described = [None if x is None else self._result(x) for x in (results if many else (results,))]
        if not self.follows:
            return False
        done: list[list[int]] = [[] for _ in self.steps]
        kept = {x.number if isinstance(x, Part) else x for x in described}
        for number, step in self.last.items():
            if number >= self.inputs and number not in kept:
                done[step].append(number)
        return Call(list(zip(self.steps, done)), described, many)

    def _result(self, x: Tensor) -> int | Part:
        """A result: all of an allocation, which then gets its axes, or a part of one."""
        number = self.numbers.get(_storage(x), -1) if x.numel() else self._allocate(x)
        if number < self.inputs or x.dtype != self.tensors[number].dtype:
            self.follows = False
            return number
        whole = x.untyped_storage().nbytes() == x.nbytes == x.element_size() * _extent(x)
        allocation = self.allocations.pop(number, None) if whole or not x.numel() else None
        if allocation is None:
            return Part(number, tuple(x.shape), x.stride(), int(x.storage_offset()))
        allocation.size, allocation.strides = tuple(x.shape), x.stride()
        return number


#: decorator of the launchers; CPU: Triton's interpreter; ROCm calls itself CUDA
operator = Registry("triton", ("CPU", "CUDA"), gpu.dry_run, replayed)
