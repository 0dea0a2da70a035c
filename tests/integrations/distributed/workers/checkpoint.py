"""Save, resume: what is wrapped (ddp | fsdp2 | tensor), whether to save or to resume, where, dtype.

Every run ends with step 4. The one that saves goes on from step 2 too, and leaves its parameters for the others.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from shared import batch, begin, difference, end, layers_of, model_of, step, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from aajr_kernels.integrations.distributed import TrainingState

rank, world, (kind, action, where, precision) = begin()
dtype, folder = getattr(torch, precision), Path(where)

model: nn.Module = model_of("hand", dtype)
if kind == "tensor":
    plan = {f"layers.*.{name}": ColwiseParallel() for name in ("q", "k", "v", "up")}
    plan |= {f"layers.*.{name}": RowwiseParallel() for name in ("o", "down")} | {"head": ColwiseParallel()}
    parallelize_module(model, init_device_mesh("cpu", (world,)), plan)
elif kind == "fsdp2":
    for layer in layers_of(model):
        fully_shard(layer)
    fully_shard(model)
else:
    model = DistributedDataParallel(model, find_unused_parameters=True)
optimizer = torch.optim.AdamW((p for n, p in model.named_parameters() if "embed" not in n), lr=1e-2)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1.0 / (1 + n))
state = TrainingState(model, optimizer, scheduler)

x, labels = batch(4, dtype)
rows = slice(None) if kind == "tensor" else slice(4 // world * rank, 4 // world * (rank + 1))


def train(until: int) -> None:
    while state.step < until:
        optimizer.zero_grad()
        step(model, x[rows] * (1 + 0.1 * state.step), labels[rows])
        optimizer.step()
        scheduler.step()
        state.step += 1


def parameters() -> dict[str, torch.Tensor]:
    return {n.removeprefix("module."): whole(p.detach()).clone() for n, p in model.named_parameters()}


if action == "save":
    train(2)
    dcp.save({"training": state}, checkpoint_id=folder / "step-2")
    train(4)
    final = parameters()
    if rank == 0:
        torch.save(final, folder / "final.pt")
else:
    before = parameters()
    dcp.load({"training": state}, checkpoint_id=folder / "step-2")
    assert state.step == 2 and scheduler.last_epoch == 2
    assert any((before[n] != p).any() for n, p in parameters().items())
    train(4)
    expected = torch.load(folder / "final.pt")
    if action == "same":  # the same processes: the same bits
        assert all(torch.equal(p, expected[n]) for n, p in parameters().items())
    error = difference(parameters(), expected)
    bound = 1e-11 if dtype == torch.float64 else 1e-5
    if rank == 0:
        print(f"{kind} resumed in {world} processes, {precision}: {error:.1e}")
    assert error <= bound, error
end()
