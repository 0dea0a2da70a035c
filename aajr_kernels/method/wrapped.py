"""Computations between the hooks of a wrapped model.

Fully sharded parameters exist whole only while the module that owns them runs: its hooks gather them before its
``forward`` and free them after it. A streamed head, which never calls the model's own head, would meet a shard of the
weight. So the computation takes the place of ``forward`` for the length of one call: all hooks fire, the weight of the
head is whole, and what is returned is what the hooks watch for the backward.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .attack_state import modules_of

__all__ = ["inside"]

_ABSENT = object()
#: kinds of modules that have no such hooks -> the remedy
REMEDIES = {
    "FullyShardedDataParallel": "FSDP1 is not supported: use torch.distributed.fsdp.fully_shard",
    "DataParallel": "DataParallel is not supported: use DistributedDataParallel",
    "OptimizedModule": "it is compiled: give the module before torch.compile, and compile its layers",
}
_NO_STAGES = "pipeline parallelism is not supported, stages send plain tensors: shard the layers instead"


def inside(module: nn.Module | Iterable[nn.Module], func: Callable[..., Any]) -> Callable[..., Any]:
    """`func`, run as the forward of `module`: between its hooks, with its parameters gathered.

    Args:
        module: the root, to which ``fully_shard`` was applied last, or a DistributedDataParallel, or a plain module,
            for which nothing changes. Several are nested in their order: name the root first, then a head that was
            given to ``fully_shard`` by itself.
        func: needs the parameters: :func:`~aajr_kernels.aligned_penalty`, ``lm_loss(...)``, a function of
            yours. It may call submodules of `module`, not `module` itself. It gets its arguments as they are, past the
            casts of a mixed precision policy, which the layers apply to what they are given. A policy's
            ``output_dtype`` applies to what it returns: leave it None or float32.

    Returns:
        A function with the arguments and results of `func`. A result that is differentiated has to be among what
        `func` returns, where the hooks find it: a tensor, or tensors in tuples, dicts and dataclasses.

    Raises:
        TypeError: a module is of a kind that has no such hooks (FullyShardedDataParallel of FSDP1, DataParallel, a
            compiled module, a stage of a pipeline).
    """
    modules = modules_of(module, _check)

    @functools.wraps(func)
    def call(*args: Any, **kwargs: Any) -> Any:
        run = functools.partial(func, *args, **kwargs)
        for one in reversed(modules):
            run = functools.partial(_through, one, run)
        return run()

    return call


def _through(module: nn.Module, run: Callable[[], Any]) -> Any:
    inner: nn.Module = module
    if isinstance(module, nn.parallel.DistributedDataParallel):
        inner = module.module
        if not torch.is_grad_enabled() or not any(p.requires_grad for p in inner.parameters()):
            return (
                run()
            )  # no gradient to be averaged: an attack, whose backward the reducer would wait for in vain
    arguments: tuple[torch.Tensor, ...] = ()
    if inner is not module:  # with device_ids it looks at its arguments, and has to find one
        device = next(inner.parameters()).device
        arguments = (torch.empty(0, device=device),)
    with _forward(inner, run):
        return module(*arguments)


@contextlib.contextmanager
def _forward(module: nn.Module, run: Callable[[], Any]) -> Iterator[None]:
    """`run` as the forward of `module` for one call, after which its own forward is there again."""
    own = module.__dict__.get("forward", _ABSENT)

    def put_back() -> None:
        if own is _ABSENT:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = own

    def forward(*_: Any) -> Any:
        put_back()
        return run()

    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        put_back()


def _check(module: object) -> None:
    name = type(module).__name__
    is_stage = type(module).__module__.startswith("torch.distributed.pipelining")
    known = [REMEDIES[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in REMEDIES]
    remedy = _NO_STAGES if is_stage else next(iter(known), None)
    if remedy is not None:
        raise TypeError(
            f"module must be wrapped by fully_shard or DistributedDataParallel, got {name}: {remedy}."
        )
