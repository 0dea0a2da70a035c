"""A Hugging Face model that transformers itself spread (``tp_plan="auto"``), against one process."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from shared import batch, begin, difference, end, gradients, model_of, say, step

rank, world, (folder,) = begin()
os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
import transformers  # noqa: E402

plain = model_of("llama", torch.float32)
if rank == 0:
    plain.save_pretrained(folder)
dist.barrier()
stdout = sys.stdout
model = transformers.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
sys.stdout = stdout  # transformers silences the other ranks
assert any(hasattr(p, "placements") for p in model.parameters())
x, labels = batch(2, torch.float32)
traj, _ = step(plain, x, labels)
ours, _ = step(model, x, labels)
assert (ours.points - traj.points).abs().max() <= 1e-5 * traj.points.abs().max()
say("tp_plan=auto llama", difference(gradients(model), gradients(plain)), torch.float32)
end()
