"""Calls of launchers, recorded once per signature and replayed.

A launcher checks, allocates, chooses tiles and builds arguments, which takes ten times as long as starting its kernels
and has the same outcome whenever the same sizes come again. :func:`replayed` runs it once under a recorder; from then
on a call with the same signature allocates the same memory and starts the same compiled kernels at the new addresses.

The signature has everything that launchers and Triton's compiler look at: of tensors the sizes, strides, dtype, device
and address modulo 16, of other arguments type and value, and how float32 is multiplied. What may change beside, tables
of tiles and variables of the environment, takes effect after :func:`.launch.forget`.

A signature is recorded at its second call, so that lengths which never come back cost no recording. Calls that a
recorder cannot follow are never replayed: those with operations of torch other than allocations, views and fillings of
new memory, and launches that Triton does not let be taken apart (:mod:`.direct`).
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
from ..operator import Registry
from . import launch as gpu
from .direct import direct, is_hooked, stream

#: signatures that are kept; the oldest goes first
LIMIT = 2048
#: alignment of pointers that Triton's compiler and tensor maps make use of, in bytes
_ALIGNMENT = 16
_SCALARS = (bool, int, float, str, torch.dtype)
_aten = torch.ops.aten
#: operators that allocate -> what they fill the memory with
_ALLOCATIONS: dict[Any, float | None] = {
    _aten.empty.memory_format: None,
    _aten.empty_like.default: None,
    _aten.empty_strided.default: None,
    _aten.new_empty.default: None,
    _aten.new_empty_strided.default: None,
    _aten.zeros.default: 0.0,
    _aten.zeros_like.default: 0.0,
    _aten.new_zeros.default: 0.0,
}
#: sizes, strides, dtype, and the number that fills it
Memory = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, float | None]
#: number of a tensor, among the arguments and then the allocations, and distance from its start in bytes
Place = tuple[int, int]


@dataclass
class Launch:
    """A compiled kernel, its arguments, and the places in memory of those that are addresses or tensor maps."""

    run: Callable[..., None]
    grid: tuple[int, ...]
    kernel: tuple[Any, ...]
    arguments: list[Any]
    pointers: list[tuple[int, Place]]
    maps: list[tuple[int, Place, Any]]


@dataclass
class Call:
    """A recorded call of a launcher.

    Attributes:
        allocations: memory for results and for what passes between kernels.
        launches: in order.
        results: of each, None or the number of a tensor, and its sizes, strides and offset where it is a part of that.
        many: whether the launcher returns a tuple.
    """

    allocations: list[Memory]
    launches: list[Launch]
    results: list[tuple[int, tuple[Any, ...] | None] | None]
    many: bool

    def __call__(self, inputs: list[Tensor], addresses: list[int]) -> Any:
        """Allocate and launch; the lists of tensors and addresses are extended."""
        device, tensors = inputs[0].device, inputs
        for size, strides, dtype, value in self.allocations:
            memory = torch.empty_strided(size, strides, dtype=dtype, device=device)
            if value is not None:
                memory.fill_(value)
            tensors.append(memory)
            addresses.append(memory.data_ptr())
        with gpu.guard(device):
            current = stream(device.index or 0)
            for launch in self.launches:
                arguments = launch.arguments.copy()
                for i, (number, offset) in launch.pointers:
                    arguments[i] = addresses[number] + offset
                for i, (number, offset), maps in launch.maps:
                    arguments[i] = maps[addresses[number] + offset]
                launch.run(*launch.grid, current, *launch.kernel, *arguments)
        results = [None if x is None else _part(tensors[x[0]], x[1]) for x in self.results]
        return tuple(results) if self.many else results[0]


def _part(x: Tensor, part: tuple[Any, ...] | None) -> Tensor:
    return x if part is None else x.as_strided(*part)


_lock = threading.Lock()
#: signature -> its recorded call; None: seen once, False: cannot be replayed
_calls: dict[tuple[Any, ...], Call | bool | None] = {}


def replayed(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a launcher with positional arguments: tensors, numbers, strings, dtypes and None.

    It must not depend on, nor change, anything but its arguments.
    """

    @functools.wraps(launcher)
    def call(*args: Any) -> Any:
        if not gpu.is_launched() or has_dispatch_modes():
            return launcher(*args)
        key: list[Any] = [launcher, *gpu.settings()]
        tensors: list[Tensor] = []
        addresses: list[int] = []
        multiplied = False
        for x in args:
            if isinstance(x, Tensor):
                address, dtype = x.data_ptr(), x.dtype
                tensors.append(x)
                addresses.append(address)
                multiplied |= dtype is torch.float32
                key += x.shape, x.stride(), dtype, x.get_device(), address % _ALIGNMENT
            elif x is None:
                key.append(None)
            elif isinstance(x, _SCALARS):
                key += type(x), x
            else:
                return launcher(*args)
        if multiplied:
            key.append(torch.backends.cuda.matmul.fp32_precision)
        signature = tuple(key)
        recorded = _calls.get(signature, False if not tensors else ...)
        if isinstance(recorded, Call):
            return launcher(*args) if is_hooked() else recorded(tensors, addresses)
        if recorded is False or gpu.is_capturing(tensors[0].device):
            return launcher(*args)
        if recorded is None:
            recorded, results = _record(launcher, args)
        else:
            recorded, results = None, launcher(*args)
        with _lock:
            if len(_calls) >= LIMIT:
                del _calls[next(iter(_calls))]
            _calls[signature] = recorded
        return results

    return call


def _record(launcher: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Call | bool, Any]:
    """The recorded call, or False, and its results."""
    apart = _apart(args)
    if apart is None:
        return False, launcher(*args)
    recorder = _Recorder([x for x in apart if isinstance(x, Tensor)])
    with recorder, gpu.traced(recorder.add):
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
    """Sees allocations and launches of a launcher."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.inputs = len(inputs)
        self.tensors = list(inputs)  # kept, lest memory be used twice
        self.numbers = {_storage(x): number for number, x in enumerate(inputs)}
        self.launches: list[Launch] = []
        self.values: dict[int, float | None] = {}  # that fill allocations
        self.reached: set[int] = set()  # by launches
        self.follows = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self.values[self._allocated(result)] = _ALLOCATIONS[func]
        elif func in (_aten.fill_.Scalar, _aten.zero_.default):
            number = self.numbers.get(_storage(result), 0)
            whole = result.untyped_storage().nbytes() == result.nbytes
            self.follows &= number >= self.inputs and whole and number not in self.reached
            self.values[number] = args[1] if len(args) > 1 else 0.0
        else:
            views: Iterable[Any] = result if isinstance(result, (list, tuple)) else (result,)
            known = all(isinstance(x, Tensor) and _storage(x) in self.numbers for x in views)
            self.follows &= known and not func._schema.is_mutable
        return result

    def _allocated(self, x: Tensor) -> int:
        self.numbers[_storage(x)] = number = len(self.tensors)
        self.tensors.append(x)
        return number

    def add(self, *launch: Any) -> None:
        """A launch: the arguments of :func:`.direct.direct`."""
        apart = direct(*launch)
        if apart is None or any(_storage(x) not in self.numbers for _, x, *_ in apart.tensors + apart.maps):
            self.follows = False  # Triton lacks a part, or there is memory from elsewhere
            return
        pointers = [(i, self._place(x)) for i, x in apart.tensors]
        maps = [(i, self._place(x), tensor_maps) for i, x, tensor_maps in apart.maps]
        arguments = [None if isinstance(x, Tensor) else x for x in apart.arguments]
        self.launches.append(Launch(apart.run, apart.grid, apart.kernel, arguments, pointers, maps))

    def _place(self, x: Tensor) -> Place:
        number = self.numbers[_storage(x)]
        self.reached.add(number)
        return number, x.data_ptr() - self.tensors[number].data_ptr() if x.numel() else 0

    def call(self, results: Any) -> Call | bool:
        """The recorded call, False where it cannot be replayed."""
        many = isinstance(results, tuple)
        described: list[tuple[int, tuple[Any, ...] | None] | None] = []
        geometry: dict[int, Tensor] = {}  # of an allocation: a result, where that is all of it
        for x in results if many else (results,):
            if x is None:
                described.append(None)
                continue
            number = self.numbers.get(_storage(x), -1) if x.numel() else self._allocated(x)
            if number < self.inputs or x.dtype != self.tensors[number].dtype:
                return False
            whole = x.untyped_storage().nbytes() == x.nbytes == x.element_size() * _extent(x)
            if (whole or not x.numel()) and number not in geometry:
                geometry[number] = x
                described.append((number, None))
            else:
                described.append((number, (tuple(x.shape), x.stride(), x.storage_offset())))
        if not self.follows:
            return False
        allocations = []
        for number, memory in enumerate(self.tensors[self.inputs :], self.inputs):
            x = geometry.get(number, memory)
            allocations.append((tuple(x.shape), x.stride(), x.dtype, self.values.get(number)))
        return Call(allocations, self.launches, described, many)


#: decorator of the launchers; CPU: Triton's interpreter; ROCm calls itself CUDA
operator = Registry("triton", ("CPU", "CUDA"), gpu.dry_run, replayed)
