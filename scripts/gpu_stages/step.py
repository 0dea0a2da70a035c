"""Stage `step`: whole steps of a Llama with a billion parameters, at 4,096 and 128 positions.

Plain, exact (fused) and by finite differences: time until everything is enqueued, time until it is done, launches, peak
memory, replay from a CUDA graph. The first exact call is made with the first-use check, whose seconds are a row.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import aajr_kernels as aajr
from aajr_kernels.backends import selfcheck, selfcheck_record
from bench.case import Run
from bench.run import captured
from bench.suites import models, step

from .kernels import kernel_times, shrink
from .stage import Stage

LENGTHS: tuple[int, ...] = (4096, 128)
ROUNDS = 6


def run(stage: Stage) -> None:
    model, dtype, lengths = "llama-1b", "bfloat16", LENGTHS
    models.SHALLOW = 0  # as many layers at 128 positions
    if stage.dry:
        shrink()
        model, dtype, lengths = "llama-tiny", "float32", (8,)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        for length in lengths:
            plain = None
            for name, kind, form in (
                ("plain", "plain", "sdpa"),
                ("exact, fused", "penalty", "fused"),
                ("finite differences", "differences", "sdpa"),
            ):
                task = step.Task(kind, model, dtype, form, device=stage.device)
                wall = measure(stage, f"{name} {length}", task, length)
                plain = wall if name == "plain" else plain
                if wall and plain and name != "plain":
                    stage.row(f"{name} {length} over plain", ratio=round(wall / plain, 3))
        if stage.dry:  # on the CPU nothing was checked
            selfcheck.mode = "1"
            with aajr.use_backend("triton"):
                aajr.rms_norm(aajr.dual(torch.randn(3, 16), torch.randn(3, 16)), 16)
        checks = [row for file in Path(cache).rglob("*.jsonl") for row in _record(file)]
    seconds = sum(row.get("seconds") or 0.0 for row in checks)
    states = {row["key"]: row.get("reason") or row["state"] for row in checks}
    stage.row("first-use check", seconds=seconds, kinds=states)


def _record(file: Path) -> list[dict[str, Any]]:
    return selfcheck_record.Record("", file).rows()


def measure(stage: Stage, name: str, task: step.Task, length: int) -> float | None:
    """Rows of one step; returns its milliseconds."""
    if stage.left < 8 and not stage.dry:
        stage.row(name, "left out", reason="no time")
        return None
    try:
        selfcheck.mode = ""
        start = time.perf_counter()
        stream = None if stage.dry else torch.cuda.Stream()
        with torch.cuda.stream(stream):
            made = step.make(task, length)
            made.call()
            stage.wait()
        stage.row(f"{name} first", seconds=time.perf_counter() - start)
        wall = _timed(stage, name, made)
        _graph(stage, name, made, stream)
        return wall
    except Exception as error:  # the other steps are measured all the same
        stage.row(name, "failed", reason=f"{type(error).__name__}: {error}"[:600])
        return None
    finally:
        selfcheck.mode = "0"
        made = None  # type: ignore[assignment]
        gc.collect()
        if not stage.dry:
            torch.cuda.empty_cache()


def _reset(made: Run) -> None:
    if made.reset:
        made.reset()


def _timed(stage: Stage, name: str, made: Run) -> float:
    """Milliseconds of a step: the least of some rounds."""
    enqueued, walls, peak = [], [], 0
    for _ in range(1 if stage.dry else ROUNDS):
        _reset(made)
        stage.wait()
        base = 0
        if not stage.dry:
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
        start = time.perf_counter()
        made.call()
        enqueued.append(time.perf_counter() - start)
        stage.wait()
        walls.append(time.perf_counter() - start)
        if not stage.dry:
            peak = max(peak, torch.cuda.max_memory_allocated() - base)
    _reset(made)

    def step_and_reset() -> None:
        made.call()
        _reset(made)

    times = kernel_times(stage, step_and_reset, 1)
    stage.row(
        name,
        wall_ms=1e3 * min(walls),
        enqueue_ms=1e3 * min(enqueued),
        peak_bytes=peak,
        launches=sum(count for _, count in times.values()),
        kernels={kernel: [round(us, 1), count] for kernel, (us, count) in list(times.items())[:12]},
    )
    return 1e3 * min(walls)


def _graph(stage: Stage, name: str, made: Run, stream: torch.cuda.Stream | None) -> None:
    """A row with the time of a replay."""
    if stage.dry:
        stage.row(f"{name} graph", "left out", reason="no device")
        return
    _reset(made)
    try:
        replay = captured(made, stream)
    except RuntimeError as error:
        stage.row(f"{name} graph", "failed", reason=str(error)[:600])
        return
    walls = []
    for _ in range(ROUNDS):
        stage.wait()
        start = time.perf_counter()
        replay.call()
        stage.wait()
        walls.append(time.perf_counter() - start)
    stage.row(f"{name} graph", wall_ms=1e3 * min(walls))
