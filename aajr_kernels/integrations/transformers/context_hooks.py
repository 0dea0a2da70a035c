"""Keys and values of a context among the outputs of sharded modules.

``fully_shard`` gathers the parameters of a module for its backward when a gradient reaches one of its outputs. Those of
a context arrive at its keys and values, which a cache takes past the outputs: here the hooks see them too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ... import sharding
from ...method.attack_state import ranks_of

__all__ = ["agreed_start", "is_sharded", "watched"]


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` or tensor parallelism holds its parameters."""
    return sharding.is_dtensor(*model.parameters()) or bool(_fully_sharded(model))


def agreed_start(model: nn.Module, start: Callable[[], int], device: torch.device) -> int:
    """The smallest `start` of all ranks that gather the parameters of `model`, which have to call it equally often.

    Raises:
        ValueError: `start` raises on another rank; what it raises on this one is raised here.
    """
    group = ranks_of((model,))
    if group is None:
        return start()
    smallest = torch.tensor(-1, device=device)
    try:
        smallest.fill_(start())
    finally:
        torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN, group=group)
    if smallest < 0:
        raise ValueError(
            "x must have a context that can be shared on all processes, got one that another process refuses: see its "
            "error."
        )
    return int(smallest)


@contextlib.contextmanager
def watched(model: nn.Module, recorder: Any) -> Iterator[None]:
    """Inside, a fully sharded module returns the keys and values that it puts into `recorder` to its own hooks too."""
    modules = _fully_sharded(model)
    own = {module: module.__dict__.get("forward") for module in modules}
    handles = []
    try:
        for module in modules:
            filled: list[Any] = []
            module.__dict__["forward"] = _with_layers(module.forward, recorder, filled)
            # after the hooks of fully_shard, which are older
            handles.append(module.register_forward_hook(_without_layers(filled)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, forward in own.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


def _fully_sharded(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if sharding.is_fully_sharded(m)]


def _with_layers(forward: Callable[..., Any], recorder: Any, filled: list[Any]) -> Callable[..., Any]:
    """`forward` that also returns keys and values of the layers that it fills, which are noted in `filled`."""

    def run(*args: Any, **kwargs: Any) -> Any:
        before = [layer for layer in recorder.layers if layer.is_initialized]
        output = forward(*args, **kwargs)
        filled[:] = [layer for layer in recorder.layers if layer.is_initialized and layer not in before]
        return output, [[_no_view(layer.keys), _no_view(layer.values)] for layer in filled]

    return run


def _without_layers(filled: list[Any]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        output, tensors = output
        for layer, (keys, values) in zip(filled, tensors):
            # a policy's output_dtype is for the outputs proper
            layer.keys, layer.values = keys.to(layer.keys.dtype), values.to(layer.values.dtype)
        return output

    return hook


def _no_view(x: Any) -> Any:
    """A copy of a view: keys behind a sliding window are one, whose hooks a write in place would lose."""
    return x if x.stacked._base is None else x.clone()
