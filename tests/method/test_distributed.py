"""An attack and the penalty along it under DDP and FSDP2, two processes with gloo, against one process without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed"),
]

WORKER = """
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector

import aajr_kernels as aajr

kind, rank, store = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def model():
    torch.manual_seed(1)
    return nn.Sequential(Block(), Block(), nn.Linear(6, 5)).double()


x = torch.randn(2, 3, 6, dtype=torch.float64)


def step(net, rows, named):
    loss_fn = lambda z: net(z).square().sum((1, 2))
    module = net if named else None
    traj = aajr.ascend(loss_fn, x[rows], radius=0.5, steps=3, scope="token", module=module)
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    penalty, aux = aajr.trajectory_penalty(net, x[rows], traj, steps="last", at="end", return_primal=True)
    (penalty + aux.primal.square().mean()).backward()
    return traj


def gradients(net):
    return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in net.parameters()]


plain = model()
whole = step(plain, slice(0, 2), False)
for named in (False, True):
    net = model()
    if kind == "ddp":
        net = DistributedDataParallel(net)
    else:
        for block in net[:2]:
            fully_shard(block)
        fully_shard(net)
    traj = step(net, slice(rank, rank + 1), named)
    # a row does not depend on the others, so the attack is that of one process
    assert (traj.points - whole.points[:, rank : rank + 1]).abs().max() < 1e-13
    for ours, theirs in zip(gradients(net), gradients(plain), strict=True):
        assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max().clamp(min=1e-3)
    net.zero_grad()
    step(net, slice(rank, rank + 1), named)  # and once more: nothing is left over in the wrapper
    wave = lambda model: lambda z: (30.0**rank * model(z).sum((1, 2))).sin()  # one rank has to step back
    traj, alone = (
        aajr.ascend(wave(m), x[rank : rank + 1], radius=1.0, steps=2, module=m) for m in (net, plain)
    )
    assert (traj.points - alone.points).abs().max() < 1e-12
    counts = [None, None]
    dist.all_gather_object(counts, (traj.evaluations, alone.evaluations))
    (first, first_alone), (second, second_alone) = counts
    assert first == second and first_alone != second_alone, counts
dist.barrier()
dist.destroy_process_group()
print("agrees")
"""


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_agree_with_one(kind, tmp_path):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", WORKER, kind]
    logs = [tmp_path / f"{rank}.txt" for rank in range(2)]
    workers = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as file:
                arguments = [*command, str(rank), str(tmp_path / "store")]
                workers.append(
                    subprocess.Popen(arguments, env=environment, stdout=file, stderr=subprocess.STDOUT)
                )
        for worker, log in zip(workers, logs):
            worker.wait(timeout=120)
            assert worker.returncode == 0 and "agrees" in log.read_text(), log.read_text()[-3000:]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
