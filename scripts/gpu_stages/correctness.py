"""Stage `correctness`: kernels at real sizes against the reference in float64 on the device.

Memory from torch.empty is NaN, and the kernels run three times (the third call of a launcher is replayed), with results
that are equal bit by bit. A case that takes the device along ends the process; the next one repeats it with blocking
launches, so that the error names the kernel, and goes on.
"""

from __future__ import annotations

import collections
import functools
import math
import os
import threading
import time
from typing import Any

import torch

from aajr_kernels.backends import selfcheck

from .kinds import kinds
from .stage import Stage

#: seconds below which no other case begins, and seconds after which one hangs
LEAST, MOST = 4.0, 30.0


def run(stage: Stage) -> None:
    poison()
    rows = stage.rows()
    begun = collections.Counter(row["name"] for row in rows if row["state"] == "started")
    ended = {row["name"] for row in rows if row["state"] in ("passed", "failed")}
    only = stage.failed_before()
    for one in kinds(stage.dry):
        if one.name in ended or (only is not None and one.name not in only):
            continue
        if begun[one.name] >= 2:
            stage.row(one.name, "failed", reason="the process ended twice in this case")
            continue
        if stage.left < LEAST and not stage.dry:
            stage.row(one.name, "left out", reason="no time")
            continue
        stage.row(
            one.name, "started", length=one.length, blocking=os.environ.get("CUDA_LAUNCH_BLOCKING") == "1"
        )
        start = time.perf_counter()
        watch = threading.Timer(MOST, _hang, (stage, one.name))
        watch.start()
        try:
            share, text = selfcheck.difference(one.kind, one.length, repeats=3)
        except Exception as error:
            share, text = math.inf, f"{type(error).__name__}: {str(error).strip()[:600]}"
        alive = _alive(stage)
        watch.cancel()
        state = "passed" if share <= 1 else "failed" if alive or begun[one.name] else "faulted"
        stage.row(one.name, state, share=share, worst=text, seconds=time.perf_counter() - start)
        if not alive:
            raise SystemExit("the device is lost to this process")


def _hang(stage: Stage, name: str) -> None:
    """End the process, whose main thread waits for the device."""
    stage.row(name, "failed", reason=f"no result within {MOST:g} s")
    os._exit(1)


def _alive(stage: Stage) -> bool:
    try:
        stage.wait()
    except RuntimeError:
        return False
    return True


def poison() -> None:
    """Fill what torch.empty and its relatives return with NaN."""

    def poisoned(allocate: Any) -> Any:
        @functools.wraps(allocate)
        def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
            result: torch.Tensor = allocate(*args, **kwargs)
            if result.is_floating_point():
                with torch.no_grad():
                    result.fill_(math.nan)
            return result

        return filled

    torches = [(torch, name) for name in ("empty", "empty_like", "empty_strided")]
    for owner, name in (*torches, (torch.Tensor, "new_empty")):
        setattr(owner, name, poisoned(getattr(owner, name)))
