"""Compiled kernels started without Triton's look-up: every private part of Triton that the package reaches.

``kernel[grid](...)`` looks at every argument, at options and at the environment to find the compiled kernel, which
takes several times as long as starting it. :func:`direct` keeps the result. It relies on, in triton 3.6-3.9:

- ``kernel[grid](...)`` returns the compiled kernel, whose ``run(*grid, stream, function, packed_metadata,
  launch_metadata, enter_hook, exit_hook, *arguments)`` starts it and takes addresses for pointers.
- Where arguments are tensor descriptors (NVIDIA only), ``run.launch`` is a function around the one in C, a variable of
  its closure named ``launcher``. It calls ``make_tensordesc_arg(descriptor, metadata)`` of its module (with a third
  argument from 3.8 on) for a tensor map, sizes and strides in place of a descriptor.
- Hooks of profilers are ``knobs.runtime.launch_enter_hook`` and ``launch_exit_hook``, with a list ``calls``.

Where one of these is missing :func:`direct` returns None, and the caller stays with ``kernel[grid](...)``.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver

#: tensor maps that an argument keeps: memory comes back at the same addresses
_MAPS = 64


class _Address:
    """Stands for a tensor of which only the address is needed."""

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


class TensorMaps:
    """The tensor maps of one argument by address, made when first asked for."""

    def __init__(self, descriptor: Any, expand: Callable[[Any], list[Any]]) -> None:
        self._descriptor, self._expand = copy.copy(descriptor), expand
        self._descriptor.base = None
        self._maps: dict[int, Any] = {}

    def __getitem__(self, address: int) -> Any:
        tensor_map = self._maps.get(address)
        if tensor_map is None:
            if len(self._maps) >= _MAPS:
                self._maps.clear()
            descriptor = copy.copy(self._descriptor)
            descriptor.base = _Address(address)
            tensor_map = self._maps[address] = self._expand(descriptor)[0]
        return tensor_map


@dataclass
class Direct:
    """A compiled kernel and its arguments.

    Attributes:
        run: takes `grid`, a stream, `kernel`, and the arguments one by one.
        arguments: as the launcher in C takes them.
        tensors: places among the arguments, and the tensor whose address belongs there.
        maps: places, the tensor, and its maps, one of which belongs there.
    """

    run: Callable[..., None]
    grid: tuple[int, ...]
    kernel: tuple[Any, ...]
    arguments: list[Any]
    tensors: list[tuple[int, torch.Tensor]]
    maps: list[tuple[int, torch.Tensor, TensorMaps]]


def direct(
    kernel: Any, compiled: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
) -> Direct | None:
    """A launch taken apart, to start its kernel again; None where Triton lacks a part that this takes.

    Args:
        kernel: decorated with ``triton.jit``.
        compiled: what ``kernel[grid](*args, **options)`` returned.
        grid, args, options: of that launch.
    """
    try:
        run, maps = compiled.run, []
        flat: list[Any] = []  # arguments of the launcher in C
        metadata = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
        constants = {name: value for name, value in options.items() if name in kernel.arg_names}
        bound = kernel.signature.bind(*args, **constants)
        bound.apply_defaults()
        for argument in bound.arguments.values():
            if hasattr(argument, "block_shape"):
                expand = _expand(run, next(metadata))
                maps.append((len(flat), argument.base, TensorMaps(argument, expand)))
                flat += expand(argument)
            else:
                flat.append(argument)
        if maps:
            run = copy.copy(run)
            run.launch = inspect.getclosurevars(run.launch).nonlocals["launcher"]
        parts = compiled.function, compiled.packed_metadata, None, None, None
    except (AttributeError, LookupError, StopIteration, TypeError):
        return None
    tensors = [(i, x) for i, x in enumerate(flat) if isinstance(x, torch.Tensor)]
    return Direct(run, (*grid, 1, 1)[:3], parts, flat, tensors, maps)


def _expand(run: Any, metadata: Any) -> Callable[[Any], list[Any]]:
    """A function from a descriptor to the map, sizes and strides that stand in its place."""
    make = sys.modules[type(run).__module__].make_tensordesc_arg
    more = (None,) * (len(inspect.signature(make).parameters) - 2)
    return lambda descriptor: list(make(descriptor, metadata, *more))


def is_hooked() -> bool:
    """Whether a profiler watches launches."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def stream(device: int) -> Any:
    """The current stream of a device."""
    return driver.active.get_current_stream(device)
