"""DDP and FSDP2 against one process: arguments ddp | fsdp2, model, dtype, and what else is switched on."""

from __future__ import annotations

import torch
from shared import batch, begin, difference, end, gradients, head_of, layers_of, model_of, say, step
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

rank, world, (kind, name, precision, *more) = begin()
dtype, mixed = getattr(torch, precision), "mixed" in more
#: parameters rest in a wider dtype than they are used in
resting = {torch.float32: torch.float64, torch.bfloat16: torch.float32}[dtype] if mixed else dtype


def wrapped(model: nn.Module) -> nn.Module:
    if "checkpoint" in more:
        layers = tuple(layers_of(model))
        apply_activation_checkpointing(
            model,
            checkpoint_wrapper_fn=lambda m: checkpoint_wrapper(m, CheckpointImpl.NO_REENTRANT),
            check_fn=lambda m: m in layers,
        )
    if kind == "ddp":
        # the attack and the penalty begin at embeddings: the table is not used
        return DistributedDataParallel(model, find_unused_parameters=True)
    policy = (
        MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        if mixed
        else MixedPrecisionPolicy()
    )
    for layer in layers_of(model):
        fully_shard(layer, mp_policy=policy)
    if "head" in more:
        fully_shard(head_of(model), mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


x, labels = batch(2 * world, dtype)
rows = slice(2 * rank, 2 * rank + 2)
plain = model_of(name, dtype)
which = "all" if "all" in more else "last"
traj, _ = step(plain, x, labels, which=which)
expected = gradients(plain)

truth = None
if dtype == torch.bfloat16:
    exact = model_of(name, torch.float32)
    step(exact, x.float(), labels, which=which)
    truth = gradients(exact)
model = wrapped(model_of(name, resting))
for _ in range(2):  # once more: nothing is left over in the wrapper
    model.zero_grad()
    hooked = [model, head_of(model)] if "head" in more else model
    ours, _ = step(model, x[rows], labels[rows], which=which, modules=hooked)
    actual = gradients(model)
    if truth is not None:  # as close to float32 as one process in this dtype is
        error, own = difference(actual, truth), difference(expected, truth)
        if rank == 0:
            print(f"{kind} {name} bfloat16: {error:.1e}, one process {own:.1e}")
        assert error <= 2 * own
        continue
    # a row does not depend on the others, so the attack is that of one process
    assert (ours.points - traj.points[:, rows]).abs().max() <= 1e-5 * traj.points.abs().max()
    say(" ".join([kind, name, *more]), difference(actual, expected), dtype)
end()
