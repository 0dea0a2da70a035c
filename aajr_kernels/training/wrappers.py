"""Models in a wrapper for several processes: unwrapping, and the wrappers that the objective supports."""

from __future__ import annotations

from torch import nn

__all__ = ["unwrapped"]

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
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    for cls in type(inner).__mro__:
        if cls.__name__ in REMEDIES:
            raise TypeError(
                f"model must be a plain module or one in DistributedDataParallel, got {type(inner).__name__}: "
                f"{REMEDIES[cls.__name__]}."
            )
    if any(hasattr(p, "placements") for p in inner.parameters()):
        raise TypeError(
            f"model must hold its whole parameters on every process, got {type(inner).__name__} with sharded ones: "
            "call ascend and trajectory_penalty, which work on such models, in a loop of your own."
        )
    assert isinstance(inner, nn.Module)
    return inner
