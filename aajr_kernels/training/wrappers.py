"""Models in several processes: their wrappers, the group that averages their gradients, and calls of sharded ones.

``fully_shard`` shards the parameters of a module in place and gathers them between its hooks. Functions that need them
are :func:`entered`, one by one: the backward of an attack frees what its forward gathered. All processes then have to
call the model equally often, so that they decide together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from ..method.wrapped import inside
from ..sharding import is_fully_sharded

__all__ = ["entered", "group_of", "reshard", "smallest", "unwrapped"]

Function = TypeVar("Function", bound=Callable[..., Any])
#: wrappers that are not understood -> what to do instead
REMEDIES = {
    "DataParallel": "start one process per device with torchrun or accelerate launch",
    "FullyShardedDataParallel": "call torch.distributed.fsdp.fully_shard, or train under DistributedDataParallel",
    "DeepSpeedEngine": "train under fully_shard or DistributedDataParallel",
    "OptimizedModule": "give the module that torch.compile was called with, its _orig_mod",
    "ScriptModule": "give the module before torch.jit",
    "RecursiveScriptModule": "give the module before torch.jit",
}


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside a DistributedDataParallel; a plain or fully sharded module is its own.

    Raises:
        TypeError: `model` is no module, is in another wrapper, or has parameters that are sharded in another way than
            by ``fully_shard`` over all processes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}.")
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    for cls in type(inner).__mro__:
        if cls.__name__ in REMEDIES:
            raise TypeError(
                "model must be a plain module, one after fully_shard or one in DistributedDataParallel, got "
                f"{type(inner).__name__}: {REMEDIES[cls.__name__]}."
            )
    assert isinstance(inner, nn.Module)
    _check_shards(inner)
    return inner


def _check_shards(model: nn.Module) -> None:
    if is_fully_sharded(model):
        reshard(model)
    elif any(map(is_fully_sharded, model.modules())):
        raise TypeError(
            f"model must be the module that fully_shard was applied to last, got {type(model).__name__}, of which only "
            "parts are sharded: call fully_shard on it, too."
        )
    for name, p in model.named_parameters():
        mesh: Any = getattr(p, "device_mesh", None)
        if mesh is None:
            if p.requires_grad and is_fully_sharded(model):
                raise TypeError(
                    f"model must have all trained parameters sharded, got {name}, which fully_shard ignores, so that "
                    "its gradient would not be averaged: leave it out of ignored_params, or freeze it."
                )
            continue
        is_replicated = mesh.ndim > 1 and p.placements[0].is_replicate()  # type: ignore[attr-defined]
        if (
            not is_fully_sharded(model)
            or mesh.size() != torch.distributed.get_world_size()
            or not (mesh.ndim == 1 or is_replicated)
        ):
            raise TypeError(
                f"model must be sharded by fully_shard over all processes and in no other way, got {name} on {mesh} "
                f"with {p.placements}: call ascend and trajectory_penalty, which work on such models, in a loop of "  # type: ignore[attr-defined]
                "your own."
            )


def reshard(model: nn.Module) -> None:
    """Free gathered parameters: the root keeps its own after a forward, and ``model.parameters()`` has them then."""
    for module in model.modules():
        if is_fully_sharded(module):
            module.reshard()  # type: ignore[operator]


def group_of(model: nn.Module) -> Any:
    """The process group over which the gradients of a model are averaged, or None."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.process_group
    return torch.distributed.group.WORLD if is_fully_sharded(model) else None


def entered(model: nn.Module, head: object = None) -> Callable[[Function], Function]:
    """From a function to the same with the parameters of a fully sharded model gathered.

    Args:
        model: the root; of any other module functions stay as they are.
        head: the language-model head, which may have hooks of its own, as that of :attr:`Policy.head`.
    """
    if not is_fully_sharded(model):
        return lambda func: func
    modules = [model]
    output: Any = getattr(model, "get_output_embeddings", None)
    for module in (head, None if output is None else output()):
        if isinstance(module, nn.Module) and is_fully_sharded(module) and module not in modules:
            modules.append(module)
    return lambda func: inside(modules, func)  # type: ignore[return-value]


def smallest(values: list[int], group: Any, device: torch.device) -> list[int]:
    """The smallest of each number over the processes of a group, all of which call this; None for this one."""
    if group is None:
        return [int(value) for value in values]
    numbers = torch.tensor([int(value) for value in values], device=device)
    torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MIN, group=group)
    return [int(number) for number in numbers.tolist()]
