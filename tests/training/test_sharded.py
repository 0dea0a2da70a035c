"""``Objective`` and ``fit`` after fully_shard, in a group of one process; several are in integrations/distributed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from integrations.distributed.processes import needs_gloo
from torch import nn
from training.tiny_lm import ATTACK, fit_config, quiet, sequences, tiny_lm

from aajr_kernels.training import KL, Objective, Penalty, load_checkpoint, policy_of
from aajr_kernels.training.gradients import over_processes
from aajr_kernels.training.wrappers import reshard, smallest

# torch says so of any model whose last layer is linear
pytestmark = [needs_gloo, pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")]


@pytest.fixture(autouse=True)
def _group():
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_numbers_of_several_processes(monkeypatch):
    """Of the other process they come by the operation that is asked for: the smallest, the sum, the largest."""
    operations = torch.distributed.ReduceOp
    other = {operations.MIN: [5, -7], operations.SUM: [10.0], operations.MAX: [4.0]}
    ways = {operations.MIN: torch.minimum, operations.SUM: torch.add, operations.MAX: torch.maximum}

    def reduced(numbers, operation=operations.SUM, group=None):
        theirs = torch.tensor(other[operation], dtype=numbers.dtype)
        numbers.copy_(ways[operation](numbers, theirs))

    monkeypatch.setattr(torch.distributed, "all_reduce", reduced)
    cpu = torch.device("cpu")
    assert smallest([3, 2], object(), cpu) == [3, -7] and smallest([3, 2], None, cpu) == [3, 2]
    parts = {"loss": [torch.tensor(1.0), torch.tensor(2.0)], "q_max": [torch.tensor(1.0), torch.tensor(3.0)]}
    assert over_processes(parts, object(), cpu) == {"loss": 13.0, "q_max": 4.0}
    assert over_processes(parts, None, cpu) == {"loss": 3.0, "q_max": 3.0}


def sharded(model: nn.Module) -> nn.Module:
    """All of it by the root, but for the embedding."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.embedding)
    return fully_shard(model)


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    reshard(model)
    return {name: getattr(p, "full_tensor", lambda p=p: p)().detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["aligned", "spectral", "divergences"])
def test_fit_is_that_of_a_whole_model_and_resumes(kind, tmp_path):
    """The model forms its logits: its own forward is called between its hooks."""
    method = "aligned" if kind == "divergences" else kind
    penalty = Penalty(method, weight=0.2, steps="last" if method == "spectral" else "worst")
    options = dict(attack=ATTACK, penalty=penalty, learning_rate=1e-2, penalty_clip_norm=0.05)
    if kind == "divergences":
        options |= dict(adversarial_loss=KL(), clean_weight=0.5, anchor_weight=0.3)
    frozen = policy_of(tiny_lm(5).double().eval())
    policy = lambda model: replace(policy_of(model), reference=frozen)
    data, whole = sequences(3), tiny_lm().double()
    expected = quiet(whole, data, fit_config(steps=3, **options), policy=policy(whole))
    again = tiny_lm().double()
    for steps in (2, 3):
        made = sharded(tiny_lm().double())
        result = quiet(made, data, fit_config(steps=steps, **options), policy=policy(made), out=tmp_path)
    load_checkpoint(tmp_path, again)
    for name, p in parameters(made).items():
        torch.testing.assert_close(p, whole.get_parameter(name), rtol=1e-12, atol=1e-14)
        assert torch.equal(p, again.get_parameter(name))
    assert result.resumed_from == 2 and len(result.rows) == 3
    for row, other in zip(result.rows, expected.rows, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-12)
        assert row["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-12)


def test_models_that_are_sharded_in_another_way():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = tiny_lm()
    fully_shard(model.mix)
    with pytest.raises(
        TypeError, match="must be the module that fully_shard was applied to last, got TinyLM"
    ):
        Objective(model, fit_config(steps=1).objective)
    model = tiny_lm()
    fully_shard(model, ignored_params={model.up.weight})
    with pytest.raises(TypeError, match="all trained parameters sharded, got up.weight"):
        Objective(model, fit_config(steps=1).objective)
    model = tiny_lm()
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], {"up": ColwiseParallel()})
    with pytest.raises(TypeError, match="sharded by fully_shard over all processes and in no other way"):
        Objective(model, fit_config(steps=1).objective)
    fully_shard(model, mesh=mesh["data"])
    with pytest.raises(TypeError, match="in a loop of your own"):
        Objective(model, fit_config(steps=1).objective)
