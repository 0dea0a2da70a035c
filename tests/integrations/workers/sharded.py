"""DDP and FSDP2 against one process: arguments ddp | fsdp2, model, dtype, and what else is switched on."""

from __future__ import annotations

import torch
from common import batch, begin, difference, end, gradients, head_of, layers_of, model_of, say, step
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

rank, world, (kind, name, precision, *more) = begin()
dtype = getattr(torch, precision)


def wrapped(model: nn.Module) -> nn.Module:
    if "checkpoint" in more:
        chosen = tuple(layers_of(model))
        apply_activation_checkpointing(
            model,
            checkpoint_wrapper_fn=lambda m: checkpoint_wrapper(m, CheckpointImpl.NO_REENTRANT),
            check_fn=lambda m: m in chosen,
        )
    if kind == "ddp":
        # the attack and the penalty begin at embeddings: the table is not used
        return DistributedDataParallel(model, find_unused_parameters=True)
    for layer in layers_of(model):
        fully_shard(layer)
    if "head" in more:
        fully_shard(head_of(model))
    return fully_shard(model)


x, labels = batch(2 * world, dtype)
rows = slice(2 * rank, 2 * rank + 2)
plain = model_of(name, dtype)
which = "all" if "all" in more else "last"
traj, _ = step(plain, x, labels, which=which)
expected = gradients(plain)

model = wrapped(model_of(name, dtype))
for _ in range(2):  # once more: nothing is left over in the wrapper
    model.zero_grad()
    hooked = [model, head_of(model)] if "head" in more else model
    ours, _ = step(model, x[rows], labels[rows], which=which, modules=hooked)
    # a row does not depend on the others, so the attack is that of one process
    assert (ours.points - traj.points[:, rows]).abs().max() <= 1e-5 * traj.points.abs().max()
    say(" ".join([kind, name, *more]), difference(gradients(model), expected), dtype)
end()
