"""A training that is interrupted, damaged or killed goes on from its checkpoint, bit by bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from training.tiny_lm import fit_config, sequences, tiny_lm

pytest.importorskip("safetensors")

from aajr_kernels.training import (
    Attack,
    FitConfig,
    Linear,
    NonFiniteLossError,
    Penalty,
    Stream,
    fit,
    load_checkpoint,
    read_rows,
)
from aajr_kernels.training.checkpoints import Checkpoints
from aajr_kernels.training.record import Recorder
from aajr_kernels.training.state import pack, unpack

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    """They take longer than the trainings; the other file of tests draws them."""
    monkeypatch.setattr("aajr_kernels.training.report._figure", lambda *_: False)


class Stop(Exception):
    """Stands in for a crash."""


def config(**options) -> FitConfig:
    # everything that draws: dropout, random starts, a random step of the trajectory, random rows, shuffled data
    defaults = dict(
        steps=6,
        attack=Attack(radius=Linear(0.2, 0.6, 5), steps=2, step_size=0.2, init="uniform", restarts=2),
        penalty=Penalty(weight=0.1, steps="random", every=2, rows=0.5),
        learning_rate=1e-2,
        weight_decay=0.1,
        accumulate=2,
        checkpoint_every=3,
    )
    return fit_config(**(defaults | options))


def loader(**options) -> DataLoader:
    return DataLoader(torch.cat(sequences(5)), batch_size=2, shuffle=True, **options)


def train(model, batches, out=None, stop=None, settings=None, **options):
    def on_step(row):
        if row["step"] == stop:
            raise Stop

    return fit(model, batches, settings or config(), out=out, on_step=on_step, progress=False, **options)


def same(a, b) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


def timeless(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


DATA = {
    "shuffled": loader,
    "own generator": lambda: loader(generator=torch.Generator().manual_seed(3)),
    "function": lambda: lambda start: iter(sequences(20)[start:]),
    "one way": lambda: iter(sequences(20)),
}


@pytest.mark.parametrize("data", DATA)
def test_the_same_bits_as_without_an_interruption(data, tmp_path):
    straight, broken = tiny_lm(dropout=0.3), tiny_lm(dropout=0.3)
    expected = train(straight, DATA[data]())
    with pytest.raises(Stop):
        train(broken, DATA[data](), tmp_path, stop=5)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000003"]
    torch.rand(3), random.random()
    again = tiny_lm(seed=9, dropout=0.3)  # a new process would have other weights, too
    resumed = train(again, DATA[data](), tmp_path)
    assert resumed.resumed_from == 3 and resumed.steps == 6
    assert same(again, straight) and not same(again, broken)
    assert timeless(resumed.rows) == timeless(expected.rows)
    assert timeless(read_rows(tmp_path / "metrics.jsonl")) == timeless(expected.rows)


@pytest.mark.parametrize("kind", ["LambdaLR", "MultiStepLR", "OneCycleLR", "SequentialLR"])
def test_given_optimizers_and_schedulers_go_on_too(kind, tmp_path):
    def parts(model):
        optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-2, momentum=0.9, centered=True)
        make = torch.optim.lr_scheduler
        return optimizer, {
            "LambdaLR": lambda: make.LambdaLR(optimizer, lambda t: 1 / (1 + t)),
            "MultiStepLR": lambda: make.MultiStepLR(optimizer, [1, 4, 4], 0.5),
            "OneCycleLR": lambda: make.OneCycleLR(optimizer, 1e-2, total_steps=8),
            "SequentialLR": lambda: make.SequentialLR(
                optimizer, [make.ConstantLR(optimizer), make.ExponentialLR(optimizer, 0.9)], [2]
            ),
        }[kind]()

    ends = []
    for stop in (None, 5):
        model = tiny_lm()
        optimizer, scheduler = parts(model)
        options = dict(optimizer=optimizer, scheduler=scheduler)
        if stop is None:
            train(model, sequences(4), **options)
        else:
            with pytest.raises(Stop):
                train(model, sequences(4), tmp_path, stop=stop, **options)
            model = tiny_lm(seed=4)
            optimizer, scheduler = parts(model)
            train(model, sequences(4), tmp_path, optimizer=optimizer, scheduler=scheduler)
        ends.append((model, optimizer.param_groups[0]["lr"]))
    assert same(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1] != 1e-2


def test_shared_weights_stay_shared(tmp_path):
    model = tiny_lm(tied=True)
    model.mix.weight = torch.nn.Parameter(
        model.mix.weight.detach().clone().T
    )  # and one that is not contiguous
    train(model, sequences(4), tmp_path)
    again = tiny_lm(seed=4, tied=True)
    assert load_checkpoint(tmp_path, again) == 6
    assert same(again, model) and again.other is again.up
    assert again.calls == model.calls > 0 and again.scratch.tolist() == [1.0, 1.0]


# -- crashes --------------------------------------------------------------------------------------------------------

WORKER = """
import sys, time
sys.path[:0] = [{tests!r}, {root!r}]
import torch
torch.set_num_threads(1)
from training.test_training_resume import config, loader
from training.tiny_lm import tiny_lm
from aajr_kernels.training import fit

def slow(row):
    print(row["step"], flush=True)
    time.sleep(0.05)

fit(tiny_lm(dropout=0.3), loader(), config(steps=500), out=sys.argv[1], on_step=slow, progress=False)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
@pytest.mark.slow
def test_kill_minus_nine_loses_at_most_one_interval(tmp_path):
    tests = Path(__file__).parent.parent
    code = WORKER.format(tests=str(tests), root=str(tests.parent))
    worker = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        seen = 0
        while seen < 8:
            line = worker.stdout.readline()
            assert line, "the worker ended by itself"
            seen = int(line)
        os.kill(worker.pid, signal.SIGKILL)
        rest = [int(line) for line in worker.communicate()[0].split()]
    finally:
        worker.kill()
        worker.wait()
        worker.stdout.close()
    seen = max([seen, *rest])
    steps = seen // 3 * 3 + 6
    again, straight = tiny_lm(dropout=0.3), tiny_lm(dropout=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed = train(again, loader(), tmp_path, settings=config(steps=steps))
    assert seen - 3 <= resumed.resumed_from <= seen
    expected = train(straight, loader(), settings=config(steps=steps))
    assert same(again, straight)
    assert timeless(resumed.rows) == timeless(expected.rows)


def damage(path: Path, kind: str) -> None:
    if kind == "truncated":
        with (path / "model.safetensors").open("r+b") as file:
            file.truncate(100)
    elif kind == "one bit":
        content = bytearray((path / "state.safetensors").read_bytes())
        content[-5] ^= 1
        (path / "state.safetensors").write_bytes(content)
    elif kind == "file missing":
        (path / "model.safetensors").unlink()
    elif kind == "no manifest":
        (path / "manifest.json").unlink()
    elif kind == "half a manifest":
        text = (path / "manifest.json").read_text()
        (path / "manifest.json").write_text(text[: len(text) // 2])
    elif kind == "other format":
        content = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(content | {"format": 0}))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("truncated", r"model.safetensors should have \d+ bytes and has 100"),
        ("one bit", "state.safetensors does not have its checksum"),
        ("file missing", "model.safetensors should have .* has 0"),
        ("no manifest", "manifest.json cannot be read"),
        ("half a manifest", "manifest.json cannot be read"),
        ("other format", "its format is 0, this version reads 1 and 2"),
    ],
)
def test_a_damaged_newest_checkpoint_is_skipped(kind, said, tmp_path):
    straight = tiny_lm(dropout=0.3)
    train(straight, loader(), tmp_path)
    newest = tmp_path / "checkpoints" / "step-00000006"
    damage(newest, kind)
    again = tiny_lm(seed=5, dropout=0.3)
    with pytest.warns(RuntimeWarning, match=f"step-00000006 is skipped: .*{said}"):
        resumed = train(again, loader(), tmp_path, settings=config(keep=1))
    assert resumed.resumed_from == 3 and same(again, straight)
    assert [p.name for p in newest.parent.iterdir()] == ["step-00000006"]
    assert load_checkpoint(newest, tiny_lm()) == 6


def test_a_checkpoint_that_was_half_written_is_not_seen(tmp_path, monkeypatch):
    model = tiny_lm()
    train(model, sequences(4), tmp_path, settings=config(steps=3))
    store = Checkpoints(tmp_path / "checkpoints", 2)
    monkeypatch.setattr(Path, "rename", lambda *a: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        store.save(4, {"a": torch.ones(2)}, {})
    monkeypatch.undo()
    assert [p.name for p in store.folder.iterdir()] == ["step-00000003"]
    shutil.copytree(store.folder / "step-00000003", store.folder / ".writing-left-by-a-kill")
    assert store.newest().step == 3
    store.save(6, {"a": torch.ones(2)}, {"b": 1})
    assert sorted(p.name for p in store.folder.iterdir()) == ["step-00000003", "step-00000006"]


def test_only_the_newest_are_kept(tmp_path):
    train(tiny_lm(), sequences(4), tmp_path / "two", settings=config(checkpoint_every=1))
    assert len(list((tmp_path / "two" / "checkpoints").iterdir())) == 2
    train(tiny_lm(), sequences(4), tmp_path / "all", settings=config(checkpoint_every=1, keep=None))
    assert len(list((tmp_path / "all" / "checkpoints").iterdir())) == 6


def test_a_finished_training_has_nothing_left_to_do_and_can_be_made_longer(tmp_path):
    model = tiny_lm()
    first = train(model, sequences(4), tmp_path, settings=config(steps=3))
    again = tiny_lm(seed=3)
    second = train(again, sequences(4), tmp_path, settings=config(steps=3))
    assert second.resumed_from == second.steps == 3 and same(model, again)
    assert second.rows == first.rows
    straight = tiny_lm()
    train(straight, sequences(4))
    train(again, sequences(4), tmp_path)
    assert same(again, straight)


# -- messages -------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_a_checkpoint_is_said(tmp_path):
    train(tiny_lm(), sequences(4), tmp_path)
    more = config(steps=7)
    with pytest.raises(ValueError, match="must be a folder without checkpoints for resume=False"):
        train(tiny_lm(), sequences(4), tmp_path, resume=False)
    larger, narrower = tiny_lm(), tiny_lm()
    larger.extra = torch.nn.Linear(2, 2)
    narrower.head.bias = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(
        ValueError, match=r"step-00000006 was written for, which lacks extra.bias \(2 in all\)"
    ):
        train(larger, sequences(4), tmp_path, settings=more)
    with pytest.raises(ValueError, match=r"head.bias is \(3,\), there \(13,\)"):
        train(narrower, sequences(4), tmp_path, settings=more)
    with pytest.raises(ValueError, match="batches ended after 2, but the checkpoint had used"):
        train(tiny_lm(), iter(sequences(2)), tmp_path, settings=more)
    with pytest.warns(RuntimeWarning, match="changed since the checkpoint: learning_rate"):
        train(tiny_lm(), sequences(4), tmp_path, settings=config(steps=7, learning_rate=0.5))
    with pytest.raises(FileNotFoundError, match="where there is none"):
        load_checkpoint(tmp_path / "elsewhere", tiny_lm())
    damage(tmp_path / "checkpoints" / "step-00000007", "truncated")
    with pytest.raises(ValueError, match="step-00000007 cannot be used: model.safetensors"):
        load_checkpoint(tmp_path / "checkpoints" / "step-00000007", tiny_lm())


def test_without_safetensors_there_is_a_message(tmp_path, monkeypatch):
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ImportError, match=r"need the package safetensors: pip install 'aajr_kernels\[train\]'"
    ):
        train(tiny_lm(), sequences(4), tmp_path)
    train(tiny_lm(), sequences(4), settings=config(steps=1))  # and none is needed for no checkpoints


def test_skipped_steps_are_remembered(tmp_path):
    a, b = sequences(2)
    bad = {"inputs_embeds": torch.full((2, 5, 6), torch.nan), "labels": b}
    settings = config(steps=4, accumulate=1, checkpoint_every=1, non_finite="skip", max_skips=3)
    with pytest.raises(NonFiniteLossError, match="step 4 is not finite"):
        train(tiny_lm(), [a, bad, bad, bad], tmp_path, settings=settings)
    with pytest.raises(
        NonFiniteLossError, match="step 4 is not finite"
    ):  # the count of those in a row went on
        train(tiny_lm(), [a, bad, bad, bad], tmp_path, settings=settings)


# -- the parts ------------------------------------------------------------------------------------------------------


def test_state_survives_without_pickle():
    tree = {
        0: [1, 2.5, float("inf"), None, True, "x"],
        "t": (torch.arange(3), {"deep": torch.zeros((), dtype=torch.bfloat16)}),
        "c": Counter({3: 2}),
        "o": OrderedDict(a=1e-320),
        "e": [],
    }
    tensors, rest = pack(tree)
    unpacked = unpack(tensors, json.loads(json.dumps(rest)))
    assert unpacked[0] == tree[0] and unpacked["c"] == tree["c"] and type(unpacked["c"]) is Counter
    assert (
        type(unpacked["t"]) is tuple
        and torch.equal(unpacked["t"][0], tree["t"][0])
        and unpacked["o"] == {"a": 1e-320}
    )
    assert type(unpacked[0][4]) is bool and unpacked["e"] == []
    with pytest.raises(TypeError, match="state/a/1 holds a set, which a checkpoint cannot"):
        pack({"a": [0, {1}]})


def test_a_stream_counts_and_begins_again():
    stream = Stream([10, 11, 12], CPU)
    assert stream.take(5) == [10, 11, 12, 10, 11]
    assert (stream.epoch, stream.position, stream.total) == (1, 2, 5)
    ends = Stream(lambda start: range(start, 4), CPU)
    assert ends.take(4) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="batches ended after 4"):
        ends.take(1)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (b"\0", "Expecting value"),
        (b"\xff", "utf-8"),
        (b"3\n", "got int"),
        (b"{}\n", "without 'step'"),
        (b"[", "Expect"),
    ],
    ids=repr,
)
def test_a_damaged_row_costs_that_row_only(tmp_path, damage, told):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": step / 2} for step in range(1, 6)]
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    lines[1] = damage if damage.endswith(b"\n") else damage + lines[1]
    path.write_bytes(b"".join(lines) + b'{"step": 6, "lo')  # the last line is torn, which says nothing
    with pytest.warns(
        RuntimeWarning, match=rf"metrics\.jsonl, line 2 is no row and was left out: .*{told}"
    ) as said:
        recorder = Recorder(tmp_path, 4, tensorboard=False)
    assert len(said) == 1 and recorder.rows == [rows[0], *rows[2:4]]
    assert read_rows(path) == recorder.rows  # the file is whole again
