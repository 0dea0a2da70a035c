"""Calls that must raise, and their messages, in two processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from shared import HIDDEN, batch, begin, end, layers_of, model_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import aajr_kernels as aajr
from aajr_kernels.integrations.distributed import inside, tensor_parallel
from aajr_kernels.ops.head import counted

rank, world, _ = begin()
mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tensor",))


def refused(kind: type[Exception], words: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except kind as error:
        said = str(error)
    else:
        said = "nothing was raised"
    assert words in said, (words, said)


def split(tensor: torch.Tensor, *placements: Any) -> torch.Tensor:
    return distribute_tensor(tensor, mesh, placements)


stack, weight = torch.randn(2, 2, 4, HIDDEN), torch.randn(10, HIDDEN)
x = aajr.Dual(stack)

# every process has rows of its own, and would take the others' words for its own
own = aajr.Dual(stack + rank)
refused(ValueError, "same tokens", lambda: aajr.lm_head_sensitivity(own, split(weight, Shard(0))))
longer = aajr.Dual(torch.randn(2, 2, 4 + rank, HIDDEN))
refused(ValueError, "same tokens", lambda: aajr.lm_head_sensitivity(longer, split(weight, Shard(0))))
labels = torch.full((2, 4), rank)
refused(
    ValueError, "same tokens", lambda: aajr.lm_head_sensitivity(x, split(weight, Shard(0)), labels=labels)
)
for is_known in (True, False):  # one process counts a token more, whether it knows their number or not
    counted._is_known = lambda device, is_known=is_known: is_known
    mask = torch.arange(8).view(2, 4) < 3 + rank
    refused(
        ValueError, "same tokens", lambda: aajr.lm_head_sensitivity(x, split(weight, Shard(0)), mask=mask)
    )
counted._is_known = lambda device: True

# fully_shard without inside(): the head is a shard, the tokens differ
model = model_of("hand", torch.float32)
for layer in layers_of(model):
    fully_shard(layer)
fully_shard(model)
z, targets = batch(4, torch.float32)
hidden = model.hidden
refused(
    Exception,
    "same tokens",
    lambda: (
        inside(model, hidden)
        and aajr.aligned_penalty(inside(model, hidden), z[2 * rank :][:2], z[2 * rank :][:2], head=model.head)
    ),
)

# splits that mean nothing
refused(
    aajr.UnsupportedOperation,
    "over the vocabulary",
    lambda: aajr.lm_head_sensitivity(x, split(weight, Shard(1))),
)
refused(
    aajr.UnsupportedOperation,
    "bias must be split like",
    lambda: aajr.lm_head_sensitivity(x, split(weight, Shard(0)), torch.randn(10)),
)
refused(aajr.UnsupportedOperation, "x is not", lambda: aajr.linear(x, split(weight, Shard(0))))
refused(
    aajr.UnsupportedOperation,
    "x is not",
    lambda: aajr.rms_norm(x, HIDDEN, split(torch.ones(HIDDEN), Replicate())),
)
refused(
    aajr.UnsupportedOperation,
    "cannot be placed",
    lambda: DTensor.from_local(x, mesh, [Partial("max")]),
)
refused(
    aajr.UnsupportedOperation,
    "drop the gradient",
    lambda: torch.distributed.all_reduce(aajr.Dual(torch.randn(2, 3).requires_grad_() * 1)),
)
refused(
    aajr.UnsupportedOperation,
    "sums and averages",
    lambda: torch.distributed.all_reduce(aajr.Dual(torch.randn(2, 3)), torch.distributed.ReduceOp.MAX),
)
refused(AttributeError, "only where its stack is a DTensor", lambda: x.redistribute(placements=[Replicate()]))
other = init_device_mesh("cpu", (1, world), mesh_dim_names=("data", "tensor"))
refused(
    aajr.UnsupportedOperation,
    "the same one",
    lambda: aajr.linear(
        aajr.Dual(split(stack, Replicate())), distribute_tensor(weight, other, [Replicate(), Replicate()])
    ),
)
# an op without a meaning on shards says so instead of taking the shard for the whole
from aajr_kernels.backends import choice  # noqa: E402

for backend in ("auto", "reference", "native"):
    if backend == "native" and choice.backends()["native"] is not None:
        continue
    with aajr.use_backend(backend):
        refused(
            aajr.UnsupportedOperation,
            "to_local",
            lambda: choice.select_backend("attention", split(stack, Shard(1))),
        )

llama = model_of("llama", torch.float32)
refused(ValueError, "must have an axis 'rows'", lambda: tensor_parallel(llama, mesh, "rows"))
refused(TypeError, "must carry a plan", lambda: tensor_parallel(model_of("hand", torch.float32), mesh))
llama.config.num_key_value_heads = 3
refused(ValueError, "num_key_value_heads=3 evenly", lambda: tensor_parallel(llama, mesh))
end()
