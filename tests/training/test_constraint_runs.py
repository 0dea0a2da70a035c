"""λ of a constraint is the same however the training is run: resumed, in micro-batches, on several processes."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys

import pytest
import torch
from training.test_constraint import ROOT, counting
from training.tiny_lm import (
    ATTACK,
    fit_config,
    quiet,
    sgd,
    tiny_lm,
    vector,
)

from aajr_kernels.training import (
    Constraint,
    Objective,
    ObjectiveConfig,
    Share,
    read_rows,
)

MOVING = Constraint(gamma=Share(0.5), window=60, rate=0.3, every=2, rows=0.5)


@pytest.mark.parametrize(
    ("stop", "penalty"),
    [
        (2, MOVING),
        (9, MOVING),
        (9, dataclasses.replace(MOVING, follow="validation")),
        (9, Constraint(gamma="auto", step_size=0.5, window=200, rate=0.3)),
    ],
    ids=["while it looks for gamma", "while λ moves", "λ follows validation", "a step size"],
)
def test_a_resumed_training_goes_on_bit_by_bit(stop, penalty, tmp_path):
    """Of validation, with a loader that shuffles."""
    pytest.importorskip("safetensors")
    data = torch.utils.data.DataLoader(torch.cat(counting(3)), batch_size=7, shuffle=True)
    more = {"validation": data} if penalty.follow == "validation" else {}

    class Stop(Exception):
        pass

    def at(row):
        if row["step"] == stop + 1:
            raise Stop

    settings = fit_config(
        steps=16, attack=ATTACK, penalty=penalty, accumulate=2, learning_rate=1e-2, checkpoint_every=stop
    )
    straight, again = tiny_lm(dropout=0.2), tiny_lm(dropout=0.2, seed=5)
    expected = quiet(straight, counting(), settings, **more).rows
    with pytest.raises(Stop):
        quiet(tiny_lm(dropout=0.2), counting(), settings, out=tmp_path, on_step=at, **more)
    result = quiet(again, counting(), settings, out=tmp_path, **more)
    assert result.resumed_from == stop and torch.equal(vector(again), vector(straight))
    timeless = [{k: v for k, v in row.items() if k != "seconds"} for row in result.rows]
    assert timeless == [{k: v for k, v in row.items() if k != "seconds"} for row in expected]
    assert len({row.get("multiplier") for row in expected}) > 3 and read_rows(tmp_path / "metrics.jsonl")


#: what λ may follow
FOLLOWED = {
    "training": dataclasses.replace(MOVING, rows=1.0, every=1, steps="worst", window=100),
    "validation": dataclasses.replace(
        MOVING, rows=1.0, every=1, steps="all", window=100, follow="validation"
    ),
    "step": Constraint(gamma="auto", step_size=0.5, window=40, rate=0.3, steps="worst"),
}


def accumulated(objective: Objective, optimizer, micro_batches, step: int, held_out=()) -> None:
    """A step of the optimizer from the gradients of all micro-batches."""
    counts = objective.counts(micro_batches)
    for part, batch in enumerate(micro_batches):
        objective(batch, counts=counts, step=step, part=part).total.backward()
    for part, batch in enumerate(held_out):
        objective.measure(batch, step=step, part=part)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("followed", FOLLOWED)
def test_micro_batches_have_the_λ_of_one_batch(followed):
    penalty = FOLLOWED[followed]
    held_out = counting(1, batch=14)[0] if followed == "validation" else None
    wholes, splits = [], []
    for rows, count in ((wholes, 1), (splits, 4)):
        model = tiny_lm().double()
        objective = Objective(model, ObjectiveConfig(attack=ATTACK, penalty=penalty))
        optimizer = sgd(model, 0.3)
        for step, ids in enumerate(counting() + counting()):
            apart = () if held_out is None else held_out.chunk(count)
            accumulated(objective, optimizer, ids.chunk(count), step, apart)
            rows.append(objective.scheduled(step + 1).weight)
    assert splits == pytest.approx(wholes, rel=1e-9) and len(set(wholes)) > 5


def test_a_shared_context_has_the_λ_of_none():
    from integrations.transformers.subjects import tiny

    pytest.importorskip("transformers")
    batch = {"input_ids": torch.arange(24).view(2, 12) % 31, "attack_mask": torch.ones(2, 12).long()}
    batch["attack_mask"][:, :6] = 0
    seen = []
    for share_context in (True, False):
        model = tiny("llama").double()
        penalty = Constraint(gamma=0.05, weight=0.1, window=10, rate=0.3, steps="last")
        config = ObjectiveConfig(attack=ATTACK, penalty=penalty, share_context=share_context)
        objective = Objective(model, config)
        for step in range(3):
            objective(batch, step=step)
        seen.append((objective.scheduled(3).weight, objective.multiplier.violation))
    assert seen[0] == pytest.approx(seen[1], rel=1e-9) and seen[0][0] != 0.1


WORKER = """
import sys, torch
from torch.nn.parallel import DistributedDataParallel
from training.test_constraint_runs import FOLLOWED, in_a_loop
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
for followed in FOLLOWED:
    torch.save(in_a_loop(followed, DistributedDataParallel, rank), sys.argv[1] + f"/{followed}{rank}.pt")
torch.distributed.destroy_process_group()
"""


def in_a_loop(followed: str, wrap=None, rank: int = 0) -> list[float]:
    """λ after every step, of two micro-batches on each of two processes or of four in one."""
    model = tiny_lm().double()
    wrapped = model if wrap is None else wrap(model)
    objective, weights = Objective(wrapped, ObjectiveConfig(attack=ATTACK, penalty=FOLLOWED[followed])), []
    held_out = counting(1)[0].split([2, 6, 5, 3]) if followed == "validation" else ()
    optimizer = sgd(model, 0.3)
    for step, ids in enumerate(counting()):
        micro = ids.split([3, 5, 4, 4])
        own = slice(None) if wrap is None else slice(2 * rank, 2 * rank + 2)
        accumulated(objective, optimizer, micro[own], step, held_out[own])
        weights.append(objective.scheduled(step + 1).weight)
    return [*weights, objective.state_dict()["multiplier"]["log"]]


@pytest.mark.slow
def test_two_processes_have_the_λ_of_one(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
    workers = []
    for rank in range(2):
        environment = dict(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", RANK=str(rank), OMP_NUM_THREADS="1"
        )
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        command = [sys.executable, "-W", "ignore", "-c", WORKER, str(tmp_path)]
        workers.append(subprocess.Popen(command, env={**os.environ, **environment}))
    try:
        assert [worker.wait(timeout=200) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    for followed in FOLLOWED:
        first, second = (torch.load(tmp_path / f"{followed}{rank}.pt") for rank in range(2))
        assert first == second and len(set(first)) >= 3
        assert first == pytest.approx(in_a_loop(followed), rel=1e-9)
