"""Tensors of a fully sharded model in checkpoints, which hold whole ones; all processes call these functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..sharding import is_dtensor
from ..torch_private import pytree

__all__ = ["gathered", "gathered_state", "is_sharded", "spread", "spread_state", "whole"]


def gathered(tree: Any, is_kept: bool) -> Any:
    """The tree with whole tensors on the CPU in place of sharded ones, one after the other; None where not kept."""

    def collected(leaf: Any) -> Any:
        if not is_sharded(leaf):
            return leaf
        tensor = whole(leaf)
        return tensor.cpu() if is_kept else None

    return pytree.tree_map(collected, tree)


def is_sharded(value: Any) -> bool:
    """Whether `value` is a DTensor."""
    return isinstance(value, Tensor) and is_dtensor(value)


def whole(value: Any) -> Tensor:
    """All of a tensor, sharded or not."""
    tensor: Tensor = value.full_tensor() if is_sharded(value) else value
    return tensor


def spread(value: Any, like: Tensor) -> Any:
    """A whole tensor sharded as `like` is; anything else as it is."""
    if not is_sharded(like) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    target: Any = like
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)


def gathered_state(optimizer: torch.optim.Optimizer, is_kept: bool) -> dict[str, Any]:
    """The state of an optimizer with whole tensors, as :func:`gathered`.

    Raises:
        ValueError: it keeps tensors of a sharded parameter that are not sharded like it.
    """
    for p in (p for group in optimizer.param_groups for p in group["params"] if is_sharded(p)):
        for name, value in optimizer.state.get(p, {}).items():
            is_alike = is_sharded(value) and value.shape == p.shape
            if isinstance(value, Tensor) and value.numel() > 1 and not is_alike:
                raise ValueError(
                    f"optimizer must keep its tensors in the shape of their parameters under fully_shard, got {name} "
                    f"{tuple(value.shape)} of one {tuple(p.shape)} in {type(optimizer).__name__}: take another one, or "
                    "leave out= away and save with integrations.distributed.TrainingState in a loop of your own."
                )
    state: dict[str, Any] = gathered(optimizer.state_dict(), is_kept)
    return state


def spread_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A state for :meth:`load_state_dict`, from whole tensors."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        **state,
        "state": {
            index: {name: spread(value, parameters[index]) for name, value in entries.items()}
            for index, entries in state["state"].items()
        },
    }
