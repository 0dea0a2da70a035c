"""Combinations that do not work: one sentence with its remedy, and an entry of docs/troubleshooting.md."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.trainer.trainers import CONFIG
from integrations.transformers.subjects import tiny
from torch import nn

import aajr_kernels as aajr
from aajr_kernels.integrations.distributed import inside, tensor_parallel
from aajr_kernels.training import Objective

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
pytestmark = [
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
        reason="torch was built without torch.distributed and gloo",
    ),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:FSDP is switching to use .NO_SHARD:UserWarning"),  # alone
]


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    """A group of one, for the wrappers that want one."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    torch.distributed.destroy_process_group()


class DeepSpeedEngine(nn.Module):
    """By its name, which is how it is known: the library is not here."""


class Stage:
    """A stage as ``torch.distributed.pipelining`` makes it."""

    __module__ = "torch.distributed.pipelining.stage"


def fsdp1(module: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(module, device_id=torch.device("cpu"))


def layer() -> nn.Module:
    return nn.Linear(6, 6)


def script(module: nn.Module) -> Any:
    return torch.jit.script(module)


def penalty_of(module: nn.Module) -> Any:
    x, v = torch.randn(2, 4, 6).unbind()
    return aajr.aligned_penalty(module, x, v, metric="l2")


def of_no_rule(x: torch.Tensor, v: torch.Tensor) -> Any:
    return torch.special.bessel_j0(aajr.dual(x, v))


def split() -> Any:
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,), mesh_dim_names=("tensor",))
    return tensor_parallel(tiny("llama"), mesh)


def axis_that_is_not_there() -> Any:
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "model"))
    return tensor_parallel(tiny("llama"), mesh)


def axis_without_a_name() -> Any:
    return tensor_parallel(tiny("llama"), torch.distributed.device_mesh.init_device_mesh("cpu", (1, 1)))


UNKNOWN, INSIDE = (
    "must be a plain module, one after fully_shard or one in DistributedDataParallel",
    "must be wrapped by fully_shard or",
)
SHARDED, NO_RULE = (
    "must be sharded by fully_shard over all processes and in no other way",
    "has no derivative rule for a Dual",
)
Case = tuple[Callable[[], Any], type[Exception], str, str]
CASES: dict[str, Case] = {
    # a wrapped model of a kind that is not supported: heading of the page, and the remedy
    "objective: DataParallel": (
        lambda: Objective(nn.DataParallel(layer()), CONFIG),
        TypeError,
        UNKNOWN,
        "got DataParallel: start one process per device with torchrun or accelerate launch",
    ),
    "objective: FSDP1": (
        lambda: Objective(fsdp1(layer()), CONFIG),
        TypeError,
        UNKNOWN,
        "got FullyShardedDataParallel: call torch.distributed.fsdp.fully_shard, or train under DistributedDataParallel",
    ),
    "objective: DeepSpeed": (
        lambda: Objective(DeepSpeedEngine(), CONFIG),
        TypeError,
        UNKNOWN,
        "got DeepSpeedEngine: train under fully_shard or DistributedDataParallel",
    ),
    "objective: compiled": (
        lambda: Objective(torch.compile(layer(), backend="eager"), CONFIG),
        TypeError,
        UNKNOWN,
        "got OptimizedModule: give the module that torch.compile was called with, its _orig_mod",
    ),
    "objective: TorchScript": (
        lambda: Objective(script(layer()), CONFIG),
        TypeError,
        UNKNOWN,
        "got RecursiveScriptModule: give the module before torch.jit",
    ),
    "objective: tensor parallelism": (
        lambda: Objective(split(), CONFIG),
        TypeError,
        SHARDED,
        "call ascend and trajectory_penalty, which work on such models, in a loop of your own",
    ),
    "inside: DataParallel": (
        lambda: inside(nn.DataParallel(layer()), layer),
        TypeError,
        INSIDE,
        "DataParallel is not supported: use DistributedDataParallel",
    ),
    "inside: FSDP1": (
        lambda: inside(fsdp1(layer()), layer),
        TypeError,
        INSIDE,
        "FSDP1 is not supported: use torch.distributed.fsdp.fully_shard",
    ),
    "inside: compiled": (
        lambda: inside(torch.compile(layer(), backend="eager"), layer),
        TypeError,
        INSIDE,
        "it is compiled: give the module before torch.compile, and compile its layers",
    ),
    "inside: a stage of a pipeline": (
        lambda: inside(Stage(), layer),
        TypeError,
        INSIDE,
        "pipeline parallelism is not supported, stages send plain tensors: shard the layers instead",
    ),
    "penalty: TorchScript": (
        lambda: penalty_of(script(layer())),
        aajr.UnsupportedOperation,
        NO_RULE,
        "a module of TorchScript has no derivative rule for a Dual: call the module that torch.jit was given",
    ),
    # a mesh without the axis
    "mesh: another name": (
        axis_that_is_not_there,
        ValueError,
        "must have an axis",
        "'tensor', got the axes ('data', 'model'): name it in init_device_mesh(..., mesh_dim_names=...), or give axis=",
    ),
    "mesh: no names": (axis_without_a_name, ValueError, "must have an axis", "got the axes 2: name it"),
    # torch.compile with an operation that is not supported
    "compile: graph breaks": (
        lambda: torch.compile(of_no_rule, backend="eager")(*torch.randn(2, 4, 6).unbind()),
        aajr.UnsupportedOperation,
        NO_RULE,
        "special_bessel_j0 has no derivative rule for a Dual: replace it, call it on y.primal",
    ),
    "compile: full graph": (
        lambda: torch.compile(of_no_rule, fullgraph=True, backend="eager")(*torch.randn(2, 4, 6).unbind()),
        torch._dynamo.exc.Unsupported,  # whose text goes on about the graph break
        NO_RULE,
        "special_bessel_j0 has no derivative rule for a Dual: replace it, call it on y.primal",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_sentence_with_the_remedy(name: str) -> None:
    call, kind, heading, remedy = CASES[name]
    with pytest.raises(kind) as caught:
        call()
    said = str(caught.value)
    assert heading in said and remedy in said
    if kind is not torch._dynamo.exc.Unsupported:
        assert said.endswith(".") and len(re.findall(r"\.\s", said)) == 0, "one sentence"
    headings = re.findall(r"^### `(.*)`$", PAGE.read_text(), re.MULTILINE)
    assert [key for key in headings if key in said], "no entry of the page has these words"
