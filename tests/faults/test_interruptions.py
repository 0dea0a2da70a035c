"""A training that is killed or fails at any of its file operations goes on from there, to the same bits."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faults.children import DIED, Child, Points, files_of_at_most
from faults.scale import scaled
from training.test_training_resume import config, loader, same, timeless, train
from training.tiny_lm import tiny_lm

pytest.importorskip("safetensors")

from aajr_kernels.training import Diagnostics, read_rows
from aajr_kernels.training.checkpoints import Checkpoints
from common.trust import count

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
SETTINGS = dict(steps=4, accumulate=1, checkpoint_every=1, diagnostics=Diagnostics(every=2))


@pytest.fixture(autouse=True, scope="module")
def without_figures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aajr_kernels.training.report._figure", lambda *_: False)
        yield


def whole_run(out: Path | None, seed: int = 0):
    model = tiny_lm(seed=seed, dropout=0.3)
    return model, train(model, loader(), out, settings=config(**SETTINGS))


@pytest.fixture(scope="module")
def straight():
    return whole_run(None)


def in_a_child(out: Path, before: Callable[[], object]) -> tuple[int, str]:
    """Run the training in a fork after `before`; its exit status (negative: the signal) and what it said."""

    def work() -> object:
        points = before()
        whole_run(out)
        return getattr(points, "passed", "")

    return Child(work).result()


def goes_on(out: Path, straight) -> None:
    """The training continues without a warning and ends with the bits and rows of one that was not interrupted."""
    expected, result = straight
    before = Checkpoints(out / "checkpoints").newest()
    assert before is None or 1 <= before.step <= 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # a checkpoint brings the weights; without one the training begins with its own
        model, resumed = whole_run(out, seed=0 if before is None else 9)
    assert resumed.resumed_from == (0 if before is None else before.step)
    assert same(model, expected)
    assert timeless(resumed.rows) == timeless(result.rows) == timeless(read_rows(out / "metrics.jsonl"))
    assert [row["step"] for row in read_rows(out / "stability.jsonl")] == [2, 4]
    assert not [path for path in out.rglob("*") if "writing" in path.name]


@pytest.fixture(scope="module")
def total(tmp_path_factory) -> int:
    out = tmp_path_factory.mktemp("counted") / "run"
    code, number = in_a_child(out, lambda: Points().operations(out))
    assert code == 0 and int(number) > 50, number
    return int(number)


@pytest.fixture(scope="module")
def failing(tmp_path_factory) -> int:
    out = tmp_path_factory.mktemp("counted") / "run"
    code, number = in_a_child(out, lambda: Points().failing_operations(out))
    assert code == 0 and int(number) > 50, number
    return int(number)


@scaled(quick=3)
def test_killed_at_any_file_operation(drawn, total, straight, tmp_path):
    for number in drawn(range(1, total + 1)):
        out = tmp_path / str(number)
        code, said = in_a_child(out, lambda: Points(number).operations(out))
        assert code == DIED, said
        goes_on(out, straight)
        count("interruptions", kills=1)


@scaled(quick=3)
def test_any_file_operation_fails(drawn, failing, straight, tmp_path):
    problems = (errno.ENOSPC, errno.EROFS, errno.EIO)
    for number, problem in drawn(itertools.product(range(1, failing + 1), problems)):
        out = tmp_path / f"{number}-{problem}"

        def fail(problem: int = problem) -> None:
            raise OSError(problem, os.strerror(problem))

        code, said = in_a_child(out, lambda: Points(number, fail).failing_operations(out))
        # what only tidies up may pass over it
        assert code == 0 or (code == 1 and str(out) in said and os.strerror(problem) in said), (number, said)
        goes_on(out, straight)
        count("interruptions", failed_operations=1)


@scaled(quick=2)
def test_no_room_in_the_middle_of_a_file(drawn, straight, tmp_path):
    """The system ends writes at so many bytes, as a full disk does."""
    for size in drawn([*range(0, 4000, 97), *range(4000, 40000, 1499)]):
        out = tmp_path / str(size)
        with files_of_at_most(size):
            code, said = in_a_child(out, lambda: None)
        assert code == 0 or (code == 1 and str(out) in said), (size, said)
        goes_on(out, straight)
        count("interruptions", full_disks=1)


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 24, 32, 48, 64, 96])
def test_a_full_disk(size, straight, tmp_path):
    out = tmp_path / "disk"
    out.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(out)]
    if os.geteuid() != 0 or subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted by this user")
    try:
        code, said = in_a_child(out, lambda: None)
        assert code == 0 or (code == 1 and str(out) in said and "No space left" in said), said
        subprocess.run(["mount", "-o", "remount,size=1m", str(out)], check=True)
        goes_on(out, straight)
        count("interruptions", full_disks=1)
    finally:
        subprocess.run(["umount", str(out)], check=True)


def test_a_folder_that_cannot_be_written_is_named_and_stays_as_it_is(straight, tmp_path):
    whole_run(tmp_path)
    contents = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def someone_else() -> None:
        if os.geteuid() == 0:  # who may write everywhere
            for folder in (tmp_path, *tmp_path.parents):
                if folder.owner() == "root" and folder != Path("/") and folder.name.startswith("pytest"):
                    folder.chmod(0o755)
            os.seteuid(65534)
        else:
            for folder in (tmp_path, tmp_path / "checkpoints"):
                folder.chmod(0o555)

    try:
        code, said = in_a_child(tmp_path, someone_else)
    finally:
        for folder in (tmp_path, tmp_path / "checkpoints"):
            folder.chmod(0o755)
    assert code == 1 and str(tmp_path) in said and "Permission denied" in said, said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == contents


@pytest.mark.slow
def test_killed_at_random_times(straight, tmp_path):
    """Between the operations, too: in the middle of a write, say."""
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    whole_run(None)
    span = time.perf_counter() - start
    for number in range(40):
        out, delay = tmp_path / str(number), 1.5 * span * torch.rand((), generator=generator).item()
        limit = lambda: (
            signal.signal(signal.SIGALRM, signal.SIG_DFL),
            signal.setitimer(signal.ITIMER_REAL, delay),
        )
        code, said = in_a_child(out, limit)
        assert code in (0, -signal.SIGALRM), said
        goes_on(out, straight)
        count("interruptions", kills=int(code < 0))


def test_rows_are_on_the_disk_before_the_checkpoint_that_they_belong_to(tmp_path, monkeypatch):
    """The system may write in another order than it was told, unless a file is flushed: power that fails between."""
    done: list[tuple[str, str]] = []
    flush, rename = os.fsync, Path.rename

    def flushed(handle: int) -> None:
        place = os.fstat(handle)
        names = [p for p in [tmp_path, *tmp_path.rglob("*")] if os.path.samestat(p.stat(), place)]
        done.append(("flush", str(names[0].relative_to(tmp_path))))
        flush(handle)

    def renamed(self: Path, target: Path) -> Path:
        done.append(("rename", target.name))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", renamed)
    whole_run(tmp_path)
    places = [i for i, (what, _) in enumerate(done) if what == "rename"]
    assert [done[i][1] for i in places] == [f"step-{n:08d}" for n in range(1, 5)]
    for before, here in zip([-1, *places], places):
        order = [name for what, name in done[before + 1 : here] if what == "flush"]
        order = order[order.index("metrics.jsonl") :]
        rows = ["metrics.jsonl", *(["stability.jsonl"] if here > places[0] else []), "."]
        made = next(name for name in order if name.startswith("checkpoints/.writing"))
        inner = [f"{made.split('/model')[0]}/{name}" for name in ("model.safetensors", "state.safetensors")]
        folder = made.split("/model")[0]
        assert order == [*rows, *inner, f"{folder}/manifest.json", folder]
        assert done[here + 1] == ("flush", "checkpoints")
