"""A shared context under FSDP2 against the whole sequence in one process: arguments are what is switched on.

Rows of the ranks may be attacked from different tokens on: the ranks take the smallest context.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from shared import LENGTH, SIZES, batch, begin, end, gradients, layers_of, model_of, say
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import aajr_kernels as aajr
from aajr_kernels.integrations.distributed import inside
from aajr_kernels.integrations.transformers import fuse, shared_context

rank, world, more = begin()
dtype = torch.float64
START = 5
x, labels = batch(2 * world, dtype)
first = START + torch.arange(2 * world)  # other ones on every rank
mask = torch.arange(LENGTH) >= first[:, None]
labels = labels.masked_fill(torch.arange(LENGTH) < START, -100)


def made() -> nn.Module:
    model = model_of("llama", dtype)
    if "window" in more:  # shorter than the context
        torch.manual_seed(1)
        own = transformers.MistralConfig(**SIZES, sliding_window=4)
        model = transformers.MistralForCausalLM(own).to(dtype)
    if "fused" in more:
        fuse(model)
    return model


def step(model: Any, x: Tensor, labels: Tensor, mask: Tensor, func: Any = None) -> tuple[Any, Tensor]:
    """An attack, and the gradients of adversarial loss and penalty of `func`; of a shared context without one."""
    if func is None:
        func = inside(model, shared_context)(model.model, x, mask=mask)
        assert func.start == START
        x, labels, mask = func.x, func.suffix(labels), func.suffix(mask)
    options = dict(head=model.lm_head, labels=labels)
    adversary = inside(model, aajr.lm_loss(func, **options))
    traj = aajr.ascend(
        adversary, x.detach(), radius=0.5, steps=2, step_size=0.3, scope="token", mask=mask, module=model
    )
    # the batch's labelled tokens, per rank
    count = float((all_labels != -100).sum()) * len(x) / (2 * world)
    penalty, aux = inside(model, aajr.trajectory_penalty)(
        func, x, traj, mask=labels != -100, denominator=count, return_primal=True, **options
    )
    (aux.primal + 0.1 * penalty).backward()
    return traj, penalty.detach()


all_labels = labels
plain = made()
whole = lambda z: plain.model(inputs_embeds=z, use_cache=False).last_hidden_state
traj, _ = step(plain, x, labels, mask, whole)
expected = gradients(plain)

rows = slice(2 * rank, 2 * rank + 2)
model = made()
if "checkpointing" in more:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
for layer in layers_of(model):
    fully_shard(layer)
fully_shard(model)


def state() -> list[Any]:
    return [(len(m._forward_hooks), vars(m).get("forward")) for m in model.modules()]


before = state()
for _ in range(2):  # once more: nothing is left over in the wrapper
    model.zero_grad()
    ours, _ = step(model, x[rows], labels[rows], mask[rows])
    assert (
        ours.points - traj.points[:, rows, START:]
    ).abs().max() <= 1e-6  # norms in float32 where not fused
    error = {
        name: (g - expected[name]).norm() / expected[name].norm() for name, g in gradients(model).items()
    }
    assert error.keys() == expected.keys()
    worst = float(max(error.values()))
    if "fused" in more:
        say(f"context {' '.join(more)}", worst, dtype)
    else:
        assert worst <= 1e-6
    assert state() == before
end()
