"""One of two processes of a training ends or stops: the other ends with an error, and both go on to the same bits."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import random
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from faults.children import DIED, Child, Points
from integrations.distributed.processes import needs_gloo
from torch.utils.data import DataLoader
from training.test_training_resume import config, timeless
from training.tiny_lm import sequences, tiny_lm

pytest.importorskip("safetensors")

from aajr_kernels.training import Attack, Diagnostics, fit, read_rows
from aajr_kernels.training.checkpoints import Checkpoints
from aajr_kernels.training.wrappers import reshard
from common.trust import count

pytestmark = [
    needs_gloo,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork"),
    pytest.mark.timeout(3600),
]
ATTACK = Attack(radius=0.5, steps=1, step_size=0.2, init="uniform")
SETTINGS = dict(steps=3, attack=ATTACK, accumulate=1, checkpoint_every=1, diagnostics=Diagnostics(every=2))
WORLD = 2
#: seconds in which a process ends after another has
SOON = 20.0


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    monkeypatch.setattr("aajr_kernels.training.report._figure", lambda *_: False)


def trained(
    out: Path, store: Path, rank: int, seed: int, begin: Callable[[], object], patience: float
) -> str:
    """Train as one of the processes: the digest of its parameters, the step it began at and what `begin` counted."""
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group(
        "gloo",
        store=distributed.FileStore(str(store), WORLD),
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=patience),
    )
    model = tiny_lm(seed=seed, dropout=0.3)
    fully_shard(model.embedding)
    fully_shard(model)
    data = DataLoader(torch.cat(sequences(5, seed=rank)), batch_size=2, shuffle=True)
    points = begin()
    result = fit(model, data, config(**SETTINGS), out=out, progress=False)
    passed = getattr(points, "passed", 0)
    reshard(model)
    whole = [p.full_tensor().detach().numpy().tobytes() for p in model.parameters()]
    distributed.destroy_process_group()
    return f"{hashlib.sha256(b''.join(whole)).hexdigest()} {result.resumed_from} {passed}"


@contextlib.contextmanager
def pair(
    out: Path, *begin: Callable[[], object], seed: int = 0, patience: float = 600.0
) -> Iterator[list[Child]]:
    """Two processes that train into one folder, and call each its `begin` before."""
    store = out.with_name(f"{out.name}-store-{time.monotonic_ns()}")
    children: list[Child] = []
    try:
        for rank, own in enumerate(begin or [lambda: None] * WORLD):
            children.append(Child(lambda rank=rank, own=own: trained(out, store, rank, seed, own, patience)))
        yield children
    finally:
        for child in children:
            child.stop()


def finished(out: Path, *begin: Callable[[], object], **options) -> list[list[str]]:
    """The results of both processes."""
    with pair(out, *begin, **options) as children:
        results = [child.result() for child in children]
    assert [code for code, _ in results] == [0] * WORLD, results
    return [said.split() for _, said in results]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Parameters and rows of an uninterrupted training, and the calls that each process makes."""

    out = tmp_path_factory.mktemp("straight") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aajr_kernels.training.report._figure", lambda *_: False)
        (digest, *_, first), (other, *_, second) = finished(out, *[Points().calls] * WORLD)
    assert digest == other
    return digest, timeless(read_rows(out / "metrics.jsonl")), (int(first), int(second))


def goes_on(out: Path, straight) -> None:
    """Earlier data are intact, and both processes go on from them to the bits of the training without a fault."""
    digest, rows, _ = straight
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = Checkpoints(out / "checkpoints").newest()
        written = timeless(read_rows(out / "metrics.jsonl")) if (out / "metrics.jsonl").exists() else []
    step = 0 if before is None else before.step
    assert written == rows[: len(written)] and len(written) >= step
    # a checkpoint brings the weights; without one the training begins with its own
    ended = finished(out, seed=0 if before is None else 9)
    assert [said[:2] for said in ended] == [[digest, str(step)]] * WORLD
    assert timeless(read_rows(out / "metrics.jsonl")) == rows
    assert not [path for path in out.rglob("*") if "writing" in path.name]


def one_ends(out: Path, straight, rank: int, begin: Callable[[], object]) -> None:
    acts = [begin if own == rank else lambda: None for own in range(WORLD)]
    with pair(out, *acts) as children:
        code, said = children[rank].result()
        assert code == DIED, said
        started = time.monotonic()
        code, said = children[1 - rank].result(limit=SOON)
        seconds = time.monotonic() - started
    # the other may have been done; which of them gloo says depends on whether it was reading or writing
    is_told = any(reason in said for reason in ("closed by peer", "reset by peer", "Broken pipe"))
    assert code == 0 or (code == 2 and "gloo" in said and is_told), (code, said)
    goes_on(out, straight)
    count("processes", killed=1, seconds_to_the_error_at_most=round(seconds, 2))


def test_the_first_dies_between_writing_and_renaming_a_checkpoint(straight, tmp_path):
    out = tmp_path / "run"
    # the first checkpoint is there, the second is not
    one_ends(out, straight, 0, lambda: Points(2).renames(out / "checkpoints"))


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(WORLD))
def test_one_dies_at_random_calls(rank, straight, tmp_path):
    for number in random.Random(rank).sample(range(1, straight[2][rank]), 10):
        one_ends(tmp_path / str(number), straight, rank, Points(number).calls)


@pytest.mark.slow
def test_the_first_dies_at_file_operations(straight, tmp_path):
    for number in range(1, 45, 4):
        out = tmp_path / str(number)
        one_ends(out, straight, 0, lambda out=out, number=number: Points(number).operations(out))


@pytest.mark.slow
def test_the_other_of_one_that_stops_ends_at_the_limit_of_the_group(straight, tmp_path):
    """A machine that hangs does not close its connections."""
    out, patience = tmp_path / "run", 15.0
    stops = Points(straight[2][0] // 2, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    with pair(out, stops.calls, lambda: None, patience=patience) as children:
        code, said = children[1].result(limit=120.0 + patience)
        assert os.waitpid(children[0].pid, os.WUNTRACED | os.WNOHANG)[0] == children[0].pid, "it did not stop"
    assert code == 2 and "imed out" in said, said
    goes_on(out, straight)
    count("processes", stopped=1)
