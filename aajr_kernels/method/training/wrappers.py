"""Models in a wrapper for several processes: what is inside, and how the objective runs in the wrapper's forward.

An attack and a penalty call parts of a model, several times, with tensors and with Duals; DistributedDataParallel
wants one forward from which one backward comes. So the whole objective is computed inside one forward of the wrapper:
while it lasts, the forward of the module inside is the objective. The wrapper synchronises its buffers before it, finds
in the loss which parameters were used, and reduces gradients as they come, as for any other loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["through", "unwrapped"]

#: wrappers that are not understood -> what to do instead
REMEDIES = {
    "DataParallel": "start one process per device with torchrun or accelerate launch",
    "FullyShardedDataParallel": "train in one process or under DistributedDataParallel",
    "DeepSpeedEngine": "train in one process or under DistributedDataParallel",
    "OptimizedModule": "give the module that torch.compile was called with, its _orig_mod",
    "ScriptModule": "give the module before torch.jit",
    "RecursiveScriptModule": "give the module before torch.jit",
}


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside a DistributedDataParallel; a plain module is its own.

    Raises:
        TypeError: `model` is no module, is in another wrapper, or has sharded parameters.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}.")
    inside = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    for cls in type(inside).__mro__:
        if cls.__name__ in REMEDIES:
            raise TypeError(
                f"model must be a plain module or one in DistributedDataParallel, got {type(inside).__name__}: "
                f"{REMEDIES[cls.__name__]}."
            )
    if any(hasattr(p, "placements") for p in inside.parameters()):
        raise TypeError(
            f"model must hold its whole parameters on every process, got {type(inside).__name__} with sharded ones: "
            "call ascend and trajectory_penalty, which work on such models, in a loop of your own."
        )
    assert isinstance(inside, nn.Module)
    return inside


def through(model: nn.Module, work: Callable[[], Any], example: torch.Tensor) -> Any:
    """Call `work` inside one forward of a wrapped model; at once for a plain one.

    Args:
        model: a plain module, or one in DistributedDataParallel.
        work: returns a tree of dicts, lists and tuples; what is differentiated must be a tensor in it.
        example: any tensor on the model's device: wrappers look at what they are called with.
    """
    inside = unwrapped(model)
    if inside is model:
        return work()
    # accelerate keeps its forward, with autocast, on the instance
    own = "forward" in vars(inside)
    before = inside.forward

    def put_back() -> None:
        if own:
            inside.forward = before
        else:
            vars(inside).pop("forward", None)

    def redirected(*arguments: Any, **options: Any) -> Any:
        put_back()  # the objective itself may call the whole model
        return work()

    inside.forward = redirected
    try:
        return model(example)
    finally:
        put_back()
