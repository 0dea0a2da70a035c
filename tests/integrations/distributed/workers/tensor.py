"""Tensor parallelism against one process: model, dtype, data-parallel processes, and what else is switched on."""

from __future__ import annotations

from typing import Any

import torch
from plans import plan_of
from shared import batch, begin, difference, end, gradients, layers_of, model_of, say, step
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from aajr_kernels.integrations.distributed import tensor_parallel
from aajr_kernels.integrations.transformers import fuse

rank, world, (name, precision, data, *more) = begin()
dtype, copies = getattr(torch, precision), int(data)


mesh = init_device_mesh("cpu", (copies, world // copies), mesh_dim_names=("data", "tensor"))
options: dict[str, Any] = dict(metric="probs" if "probs" in more else "fisher")
x, labels = batch(2 * copies, dtype)
plain = model_of(name, dtype)
traj, _ = step(plain, x, labels, **options)
expected = gradients(plain)

model = model_of(name, dtype)
if "fuse" in more:
    fuse(model)
if "library" in more:
    tensor_parallel(model, mesh)
else:
    parallelize_module(model, mesh["tensor"], plan_of(name, "sequence" in more))
if "checkpoint" in more:
    layers = tuple(layers_of(model))
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=lambda m: checkpoint_wrapper(m, CheckpointImpl.NO_REENTRANT),
        check_fn=lambda m: m in layers,
    )
rows = slice(None)
if copies > 1:
    group = mesh["data"].get_local_rank()
    rows = slice(2 * group, 2 * group + 2)
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
for _ in range(2):
    model.zero_grad()
    ours, _ = step(model, x[rows], labels[rows], **options)
    assert (ours.points - traj.points[:, rows]).abs().max() <= 1e-5 * traj.points.abs().max()
    say(" ".join(["tensor", name, data, *more]), difference(gradients(model), expected), dtype)
if "optimizer" in more:  # the sharded gradients are those that an optimizer of torch takes
    for one in (plain, model):
        torch.optim.AdamW(one.parameters(), lr=1e-2).step()
    after = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.named_parameters()}
    before = dict(plain.named_parameters())
    say("after AdamW", difference({n: p.detach() for n, p in after.items()}, before), dtype)
end()
