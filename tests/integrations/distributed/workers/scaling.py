"""The collectives of a real step against those that the scaling model counts: data, tensor, what else is on."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from plans import plan_of
from shared import VOCABULARY, batch, begin, end, layers_of, model_of, step
from torch.distributed import ProcessGroup
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from aajr_kernels.integrations.transformers import fuse
from bench.scaling import Layout, Shape, collectives

#: operator -> collective, and where the largest tensor of the call is
FUNCTIONAL = {"all_reduce": 0, "all_gather_into_tensor": 0, "reduce_scatter_tensor": 0}
DIRECT = {"allreduce_": ("all_reduce", 0), "_allgather_base_": ("all_gather", 0)}
DIRECT |= {"_reduce_scatter_base_": ("reduce_scatter", 1)}
NAMES = {"all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter"}


class Recorder(TorchDispatchMode):
    """Bytes of all collectives, by kind and group."""

    def __init__(self, groups: dict[str, str]) -> None:
        super().__init__()
        self.groups, self.bytes, self.calls = groups, Counter(), Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # first into its collectives
        name = func._schema.name.split("::")[1]
        if func.namespace == "_c10d_functional" and name in FUNCTIONAL:
            factor = args[1] if name == "all_gather_into_tensor" else 1
            self.add(NAMES.get(name, name), args[-1], args[0], factor)
        elif func.namespace == "c10d" and name in DIRECT:
            kind, place = DIRECT[name]
            tensor = args[place][0] if isinstance(args[place], (list, tuple)) else args[place]
            group = next(
                a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())
            )
            self.add(kind, ProcessGroup.unbox(group).group_name, tensor, 1)
        elif func.namespace in ("c10d", "_c10d_functional") and name not in (
            "wait_tensor",
            "_wrap_tensor_autograd",
            "barrier",
        ):
            raise AssertionError(f"a collective that the model does not know: {func}")
        return func(*args, **(kwargs or {}))

    def add(self, kind: str, group: str, tensor: torch.Tensor, factor: int) -> None:
        if tensor.dtype == torch.int64:  # the handshake of the split head on CPUs, two numbers
            return
        key = (self.groups[group], kind)
        self.bytes[key] += factor * tensor.numel() * tensor.element_size()
        self.calls[key] += 1


rank, world, (data, tensor, *more) = begin()
mesh = init_device_mesh("cpu", (int(data), int(tensor)), mesh_dim_names=("data", "tensor"))
model = model_of("llama", torch.float32)
fuse(model)
if int(tensor) > 1:
    parallelize_module(model, mesh["tensor"], plan_of("llama", "sequence" in more))
if "recompute" in more:
    layers = tuple(layers_of(model))
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=lambda m: checkpoint_wrapper(m, CheckpointImpl.NO_REENTRANT),
        check_fn=lambda m: m in layers,
    )
if int(data) > 1:
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
x, labels = batch(2, torch.float32)
config = model.config
layout = Layout(
    data=int(data), tensor=int(tensor), batch=2, length=x.shape[1], tangents=1, attack=2,
    sequence="sequence" in more, recompute="recompute" in more, width=4, reduced=4,
    labelled=float((labels >= 0).double().mean()),
)  # fmt: skip
shape = Shape(
    "tiny", config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads,
    config.hidden_size // config.num_attention_heads, config.intermediate_size, VOCABULARY,
)  # fmt: skip

recorder = Recorder({mesh[axis].get_group().group_name: axis for axis in ("data", "tensor")})
with recorder:
    step(model, x, labels, steps=2)
counted, calls = Counter(), Counter()
for c in collectives(shape, layout):
    counted[c.group, c.kind] += c.count * c.size
    calls[c.group, c.kind] += c.count
if rank == 0:
    for key in sorted(counted | recorder.bytes):
        print(
            *key,
            f"measured {recorder.bytes[key]} in {recorder.calls[key]}, counted {counted[key]} in {calls[key]}",
        )
    assert recorder.bytes == counted
    assert recorder.calls == calls
end()
