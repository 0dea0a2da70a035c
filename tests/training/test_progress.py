"""Progress of long commands: plain lines within seconds where there is no terminal, bars where there is one."""

from __future__ import annotations

import contextlib
import io
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from aajr_kernels.training import progress
from aajr_kernels.training.progress import Progress, in_words

ROOT = Path(__file__).parents[2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_lines_tell_count_elapsed_and_estimate(clock):
    out = io.StringIO()
    display = Progress(out)  # not entered: no thread writes lines of its own
    display.stage("training", 5)
    for i in range(5):
        clock.now += 4
        display.step(f"loss {i}")
    display.stage("checks", 2)
    display.begin("first")
    clock.now += 200
    display.begin("second")
    display.__exit__(None)
    assert out.getvalue().splitlines() == [
        "training 0/5: begins",
        "training 1/5: 4 s, about 16 s left, loss 0",
        "training 2/5: 8 s, about 12 s left, loss 1",
        "training 3/5: 12 s, about 8 s left, loss 2",
        "training 4/5: 16 s, about 4 s left, loss 3",
        "training 5/5: 20 s, loss 4",
        "training 5/5: done in 20 s",
        "checks 0/2: begins",
        "checks 1/2: 3 min, about 3 min left, second",
        "checks 2/2: done in 3 min",
    ]


def test_lines_keep_a_distance_that_grows(clock):
    out = io.StringIO()
    display = Progress(out)
    display.stage("long", 10_000)
    for _ in range(10_000):
        clock.now += 1
        display.step()
    lines = len(out.getvalue().splitlines())
    # every 3 s up to 90 s, every thirtieth of the time up to 900 s, every 30 s from there
    assert 30 + 60 + 300 < lines < 30 + 80 + 310


def test_what_an_earlier_run_did_is_no_speed(clock):
    out = io.StringIO()
    display = Progress(out)
    display.stage("tasks", 100, done=90)
    clock.now += 10
    display.reach(92, "seed 1")
    assert out.getvalue().splitlines()[-1] == "tasks 92/100: 10 s, about 40 s left, seed 1"


def test_a_long_step_is_not_silent(monkeypatch):
    monkeypatch.setattr(progress, "SHORTEST", 0.2)
    out = io.StringIO()
    with Progress(out) as display:
        display.stage("one step")
        deadline = time.monotonic() + 10
        while len(out.getvalue().splitlines()) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert len(out.getvalue().splitlines()) >= 3
    assert out.getvalue().splitlines()[-1].startswith("one step: done in ")


def test_an_error_leaves_the_stage_unfinished():
    out = io.StringIO()
    with contextlib.suppress(KeyError), Progress(out) as display:
        display.stage("steps", 3)
        raise KeyError
    assert "done" not in out.getvalue()


def test_nothing_is_shown_unless_wanted():
    out = io.StringIO()
    with Progress(out, shown=False) as display:
        display.stage("steps", 1)
        display.step()
    assert out.getvalue() == ""


def test_a_terminal_gets_bars(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    with Progress(out, keep=True) as display:
        display.stage("[steps]", 3)
        display.step("[loss 1]")
        display.stage("one thing")
    assert "━" in out.getvalue() and "3/3" in out.getvalue() and "[steps]" in out.getvalue()
    assert "begins" not in out.getvalue()
    monkeypatch.setenv("TERM", "dumb")
    assert not progress.draws(Terminal())


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "0 s"), (99.4, "99 s"), (125, "2 min"), (5900, "98 min"), (9000, "2.5 h")]
)
def test_durations_are_read_at_a_glance(seconds, words):
    assert in_words(seconds) == words


def test_a_command_whose_output_is_a_pipe_shows_lines_while_it_runs():
    command = [
        sys.executable,
        "-m",
        "aajr_kernels",
        "validate",
        "--dtype",
        "float64",
        "--backend",
        "reference",
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as running:
        assert running.stdout is not None
        ready, _, _ = select.select([running.stdout], [], [], 120)
        first = os.read(running.stdout.fileno(), 1000).decode() if ready else ""
        alive = running.poll() is None
        running.kill()
    assert first.startswith("checks 0/")
    assert alive
