"""The objective in a loop of accelerate: micro-batches, mixed precision, and two processes beside one."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from assertions import assert_exact_gradients
from integrations.trainer.trainers import CONFIG, Rows, adapted_gpt2, collate, gpt2, llama

from aajr_kernels.training import KL, Objective, policy_of

accelerate = pytest.importorskip("accelerate")
pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # read by peft

ROOT = Path(__file__).parents[3]
#: on the second step, on rows drawn at random
LAZY = dataclasses.replace(CONFIG, penalty=dataclasses.replace(CONFIG.penalty, every=2, rows=0.5))
SHARED = dataclasses.replace(CONFIG, share_context=True)
DIVERGENCES = dataclasses.replace(CONFIG, adversarial_loss=KL(tokens="attention"), anchor_weight=0.4)
CONFIGS = {"accelerate": CONFIG, "lazy": LAZY, "shared": SHARED, "divergences": DIVERGENCES}


@pytest.fixture(autouse=True)
def _fresh_state():
    """accelerate keeps its settings per process."""
    accelerate.state.AcceleratorState._reset_state(True)
    yield
    accelerate.state.AcceleratorState._reset_state(True)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


def loop(model, sizes: list[int], **options) -> dict[str, torch.Tensor]:
    """One step of the rows, in micro-batches of these sizes, as docs/trainer.md has it."""
    accelerator = accelerate.Accelerator(cpu=True, **options)
    wrapped = accelerator.prepare(model).train()
    objective = Objective(wrapped, CONFIG)
    rows = iter(Rows(sum(sizes)))
    micro = [collate([next(rows) for _ in range(size)]) for size in sizes]
    counts = objective.counts(micro)
    for part, batch in enumerate(micro):
        last = part == len(micro) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(wrapped):
            with accelerator.autocast():
                terms = objective(batch, counts=counts, part=part)
            accelerator.backward(terms.total)
    return gradients(model)


@pytest.mark.integration(
    "accelerate, a plain loop", "accumulation of unequal micro-batches", "the step in one batch"
)
def test_micro_batches_of_unequal_lengths_add_up_to_one_batch(record_property):
    expected = loop(gpt2().double(), [4])
    for sizes in ([1, 1, 1, 1], [3, 1]):
        error = assert_exact_gradients(loop(gpt2().double(), sizes), expected, tolerance=1e-11)
        record_property("error", error)


def test_mixed_precision_is_that_of_torch():
    actual = loop(llama(), [4], mixed_precision="bf16")
    twin = llama().train()
    with torch.autocast("cpu", torch.bfloat16):
        total = Objective(twin, CONFIG)(collate(list(Rows(4)))).total
    total.backward()
    for name, p in twin.named_parameters():
        assert torch.equal(actual[name], p.grad), name


def test_mixed_precision_that_would_be_lost_is_an_error():
    """accelerate's autocast is in the forward of the whole model, and an attack calls its parts."""
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    objective = Objective(accelerator.prepare(gpt2()), CONFIG)
    with pytest.raises(RuntimeError, match=r"prepared for mixed precision.*with accelerator.autocast\(\)"):
        objective(collate(list(Rows(2))))


WORKER = """
import sys
from pathlib import Path

import torch
from integrations.trainer.trainers import CONFIG, Rows, adapted_gpt2, arguments, collate, gpt2, quiet, recorder, rows_of

import transformers
from accelerate import Accelerator
from aajr_kernels.integrations.trainer import AAJRTrainer
from aajr_kernels.training import Objective
from integrations.trainer.test_accelerate import CONFIGS, fully_sharding, loop_of
from integrations.trainer.test_trl import Extra

torch.set_num_threads(1)
kind, folder = sys.argv[1:]
out = {}


def model():
    return (adapted_gpt2() if kind == "lora" else gpt2()).double()


if kind in CONFIGS:
    accelerator = Accelerator(cpu=True)
    plain = model()
    wrapped = accelerator.prepare(plain).train()
    rank = accelerator.process_index
    assert isinstance(wrapped, torch.nn.parallel.DistributedDataParallel) or accelerator.num_processes == 1
    out["gradients"] = loop_of(accelerator, wrapped, plain, rank, kind)
else:
    seen = recorder()
    is_sharded = kind.startswith("fsdp")
    options = dict(per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=2, learning_rate=0.1)
    if kind == "checkpointing":
        options["gradient_checkpointing"] = True
    cls = Extra if kind.endswith("penalty") else AAJRTrainer
    if is_sharded:
        cls = fully_sharding(cls)
    shared = dict(train_dataset=Rows(8), data_collator=collate, callbacks=[seen], objective=CONFIG)
    trainer = quiet(cls, model(), arguments(folder, ddp_backend="gloo", **options), **shared)
    trainer.train()
    kinds = [cls.__name__ for cls in type(trainer.model_wrapped).__mro__]
    assert ("FSDPModule" if is_sharded else "DistributedDataParallel") in kinds
    out["gradients"], out["rows"] = seen.gradients, rows_of(trainer)
    rank = trainer.args.process_index
torch.save(out, Path(folder) / f"{rank}.pt")
torch.distributed.destroy_process_group()
"""


def fully_sharding(cls: type) -> type:
    """Under accelerate's FSDP2, which it offers on accelerators only."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    class Sharding(cls):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["GPT2Block"],
                cpu_ram_efficient_loading=False,
            )
            state = self.accelerator.state
            PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = plugin
            self.is_fsdp_enabled = True

    return Sharding


def micro_batches(rank: int, kind: str) -> list[dict[str, torch.Tensor]]:
    """Of eight rows of unequal length, two on each of two processes; "shared" has a context of two tokens."""
    columns = {"attack_mask": lambda ids: [0, 0] + [1] * (len(ids) - 2)} if kind == "shared" else {}
    rows = list(Rows(8, **columns))[rank::2]
    return [collate(rows[:3]), collate(rows[3:])]


def with_reference(model):
    """The policy of a model, with another model as its reference."""
    return dataclasses.replace(policy_of(model), reference=policy_of(gpt2(seed=7).double().eval()))


def loop_of(accelerator, wrapped, plain, rank: int, kind: str) -> dict[str, torch.Tensor]:
    """A step on two processes: the second, on which a lazy penalty is due."""
    objective = Objective(wrapped, CONFIGS[kind], policy=with_reference(plain))
    micro = micro_batches(rank, kind)
    counts = objective.counts(micro)
    assert counts.processes == 2 and counts.rows == 8
    for part, batch in enumerate(micro):
        with contextlib.nullcontext() if part else accelerator.no_sync(wrapped):
            terms = objective(batch, counts=counts, step=1, part=part)
            assert ("shared" in terms.parts) == (kind == "shared")
            accelerator.backward(terms.total)
    return gradients(plain)


def accumulated(kind: str) -> dict[str, torch.Tensor]:
    """The step of the two processes in one, with no context shared: their micro-batches in turns."""
    model = gpt2().double().train()
    config = dataclasses.replace(CONFIGS[kind], share_context=False)
    objective = Objective(model, config, policy=with_reference(model))
    first, second = (micro_batches(rank, kind) for rank in range(2))
    micro = [batch for pair in zip(first, second) for batch in pair]
    counts = objective.counts(micro)
    for part, batch in enumerate(micro):
        objective(batch, counts=counts, step=1, part=part).total.backward()
    return gradients(model)


def in_two_processes(kind: str, folder: Path) -> list[dict]:
    """Files that two workers with gloo saved."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    workers, logs = [], [folder / f"{rank}.txt" for rank in range(2)]
    try:
        for rank, log in enumerate(logs):
            environment = {
                **os.environ,
                **dict(PYTHONPATH=path, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", MASTER_ADDR="127.0.0.1"),
                **dict(MASTER_PORT=str(port), WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank)),
                **dict(LOCAL_WORLD_SIZE="2", ACCELERATE_USE_CPU="true"),
            }
            with log.open("w") as file:
                command = [sys.executable, "-W", "ignore", "-c", WORKER, kind, str(folder)]
                workers.append(
                    subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
                )
        for worker, log in zip(workers, logs):
            worker.wait(timeout=200)
            assert worker.returncode == 0, log.read_text()[-3000:]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.integration("Trainer and accelerate under DDP", "two processes, gloo", "one process, float64")
@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
@pytest.mark.parametrize(
    "kind",
    [*CONFIGS, "trainer", "lora", "checkpointing", "penalty", "fsdp", "fsdp-penalty"],
)
def test_two_processes_are_one(kind, tmp_path, record_property):
    from integrations.trainer.test_trl import Extra
    from integrations.trainer.trainers import rows_of, trained

    from aajr_kernels.integrations.trainer import AAJRTrainer

    first, second = in_two_processes(kind, tmp_path)
    if kind in CONFIGS:
        expected = [loop(gpt2().double(), [8]) if kind == "accelerate" else accumulated(kind)]
        first["gradients"], second["gradients"] = [first["gradients"]], [second["gradients"]]
    else:
        model = gpt2()
        if kind == "lora":
            pytest.importorskip("peft")
            model = adapted_gpt2()
        options = dict(per_device_train_batch_size=4, max_steps=2, data=Rows(8), objective=CONFIG)
        if kind.endswith("penalty"):  # whose means are those of micro-batches
            options |= dict(per_device_train_batch_size=1, gradient_accumulation_steps=4)
        alone, expected = trained(
            Extra if kind.endswith("penalty") else AAJRTrainer, model.double(), tmp_path, **options
        )
        for row, other in zip(rows_of(alone), first["rows"]):
            names = {"penalty", "adversarial_loss", "attack_start", "attack_worst", "q_max"} & row.keys()
            assert {n: other[n] for n in names} == pytest.approx({n: row[n] for n in names}, rel=1e-9)
            assert other["loss"] == pytest.approx(row["loss"], rel=1e-6)  # added up in float32
            assert other["active"] == pytest.approx(row["active"]) and len(names) >= 4
    for ours, theirs, exact in zip(first["gradients"], second["gradients"], expected, strict=True):
        record_property("error", assert_exact_gradients(ours, exact, tolerance=1e-11))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
