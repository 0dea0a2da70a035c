"""State that an attack must restore: random states, training flags, running statistics, ``requires_grad``."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import sharding
from ..backends import capture
from ..backends.errors import UnsupportedOperation
from ..ops.attention import draws_apart
from ..rules.registry import RULES
from ..torch_private import RUNNING_NORMS, TorchDispatchMode

__all__ = [
    "RandomState",
    "frozen_parameters",
    "modules_of",
    "one_dropout_mask",
    "parameters_are_frozen",
    "ranks_of",
]

_frozen = contextvars.ContextVar("frozen", default=False)


class _DrawnAlike(TorchFunctionMode):
    """Sends attention with dropout of plain tensors where that of Duals goes."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and (kwargs.get("dropout_p") or any(args[4:5])):
            return RULES[func](*args, **kwargs)
        return func(*args, **kwargs)


def one_dropout_mask(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Context in which plain tensors and Duals draw the same dropout masks from the same random state.

    They do anywhere but in attention on devices whose fused kernels draw in their own ways: torch's
    ``scaled_dot_product_attention`` of plain tensors takes our kernels here.
    """
    return _DrawnAlike() if draws_apart(device) else contextlib.nullcontext()


class _NothingDrawn(TorchDispatchMode):
    """Refuses operators that draw random numbers."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            names = [argument.name for argument in func._schema.arguments]
            options = {**dict(zip(names, args)), **(kwargs or {})}
            if options.get("dropout_p", options.get("p")) != 0.0:
                raise UnsupportedOperation(
                    f"loss_fn draws random numbers ({func}), the same at every point of an attack, which a captured "
                    "CUDA graph cannot: put the model in eval mode (eval_mode=True) or set its dropout to 0."
                )
        return func(*args, **(kwargs or {}))


class RandomState:
    """The state of the global generators of the CPU and of one device, to be put back as often as wanted.

    While a CUDA graph is captured there is no state to be had, and what draws from it is refused.
    """

    def __init__(self, device: torch.device) -> None:
        self._captured = capture.reads_no_value(device)
        if self._captured:
            return
        self._cpu = torch.get_rng_state()
        self._module = None if device.type == "cpu" else torch.get_device_module(device)
        # mps has one device, and functions without a parameter for it
        self._device = () if device.type == "mps" else (device,)
        self._state = self._module.get_rng_state(*self._device) if self._module else None

    def restore(self) -> None:
        """Put the states back."""
        if self._captured:
            return
        torch.set_rng_state(self._cpu)
        if self._module is not None:
            self._module.set_rng_state(self._state, *self._device)

    def replay(self, call: Callable[[Any], Any], x: Any) -> Any:
        """``call(x)`` from these states, with the dropout masks that a Dual draws from them."""
        self.restore()
        with _NothingDrawn() if self._captured else one_dropout_mask(x.device):
            return call(x)


def modules_of(module: object, check: Callable[[object], None] | None = None) -> tuple[nn.Module, ...]:
    """`module`, one, several or None, as a tuple; each goes through `check` first.

    Raises:
        TypeError: something in it is no nn.Module.
    """
    if module is None:
        return ()
    modules = (
        (module,) if isinstance(module, nn.Module) or not isinstance(module, Iterable) else tuple(module)
    )
    for one in modules:
        if check is not None:
            check(one)
        if not isinstance(one, nn.Module):
            raise TypeError(f"module must be an nn.Module or several of them, got {type(one).__name__}.")
    return modules


@contextlib.contextmanager
def frozen_parameters(modules: tuple[nn.Module, ...], evaluate: bool) -> Iterator[None]:
    """Inside the block the modules' parameters need no gradient and, if asked, the modules are in eval mode.

    Afterwards, also after an exception, every flag and every running statistic is what it was. Sharded parameters
    (DTensor, as under ``fully_shard``) keep their flag: the gathered copies that run were made with it, and our ops
    leave their gradients out. Only the points of an attack are differentiated inside: what was computed before it is
    constant, see :func:`parameters_are_frozen`.
    """
    submodules = list(dict.fromkeys(m for module in modules for m in module.modules()))
    training = [m.training for m in submodules]
    parameters = [
        p
        for p in dict.fromkeys(p for module in modules for p in module.parameters())
        if p.requires_grad and not _sharded(p)
    ]
    statistics = [] if evaluate else [b for m in submodules for b in _statistics(m)]
    saved = [b.clone() for b in statistics]
    has_sharded = any(_is_spread(module) for module in modules)
    token = _frozen.set(True)
    try:
        for p in parameters:
            p.requires_grad_(False)
        if evaluate:
            for m in submodules:
                m.training = False
        with sharding.frozen_parameters() if has_sharded else contextlib.nullcontext():
            yield
    finally:
        _frozen.reset(token)
        for p in parameters:
            p.requires_grad_(True)
        for m, flag in zip(submodules, training):
            m.training = flag
        with torch.no_grad():
            for b, before in zip(statistics, saved):
                b.copy_(before)


def parameters_are_frozen() -> bool:
    """Whether the caller runs inside :func:`frozen_parameters`: inside an attack, or where a direction is computed.

    A function that an attack calls leaves out the graph of what it computed outside, with the same results.
    """
    return _frozen.get()


def ranks_of(modules: tuple[nn.Module, ...]) -> Any:
    """The process group whose ranks have to call these modules equally often, or None.

    Gathering sharded parameters and broadcasting buffers wait for all ranks: a rank that stepped back once more than
    the others would wait forever.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    for module in modules:
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return module.process_group
        if _is_spread(module):
            return torch.distributed.group.WORLD
    return None


def _sharded(p: Tensor) -> bool:
    return hasattr(p, "placements")


def _is_spread(module: nn.Module) -> bool:
    """Whether parameters are sharded, be they gathered at the moment or not."""
    return any(map(sharding.is_fully_sharded, module.modules())) or any(map(_sharded, module.parameters()))


def _statistics(m: nn.Module) -> Iterator[Tensor]:
    """Buffers that a forward in training mode overwrites."""
    if isinstance(m, RUNNING_NORMS) and m.training and m.track_running_stats:
        yield from m.buffers(recurse=False)
