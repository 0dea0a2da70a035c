"""Stage `warm`: kernels and their launchers are compiled by as many processes as there are cores, into Triton's cache.

The trials of :mod:`.kinds` run on torch's meta device; what they would launch is compiled for the device's processor,
as a launch would (tests/backends/triton/offline.py).
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from typing import Any

import torch

from aajr_kernels.backends.triton import launch as gpu

from .kinds import Sized, both_passes, kinds
from .stage import Stage


def run(stage: Stage) -> None:
    """The stage itself starts the others, which get their share from the environment."""
    share = os.environ.get("GPU_FIRST_SHARE")
    if share is not None:
        index, count = map(int, share.split("/"))
        compile_share(stage, [one for one in kinds(dry=False) if one.kind.backend == "triton"][index::count])
        return
    count = min(16, os.cpu_count() or 1)
    shares = ["1/1000"] if stage.dry else [f"{index}/{count}" for index in range(count)]  # dry: one kind
    command = [sys.executable, *sys.orig_argv[1:]]
    processes = [subprocess.Popen(command, env={**os.environ, "GPU_FIRST_SHARE": share}) for share in shares]
    for process in processes:
        process.wait()


def compile_share(stage: Stage, share: list[Sized]) -> None:
    offline: Any = importlib.import_module("backends.triton.offline").offline
    architecture = "sm_90" if stage.dry else gpu.architecture(torch.device("cuda", 0))
    for one in share:
        start = time.perf_counter()
        try:
            with offline(architecture) as compiled:
                launch(one)
            if not stage.dry:
                for kernel in compiled:
                    kernel.run  # noqa: B018  loads the kernel and compiles its launcher
            facts: dict[str, Any] = {"kernels": len({kernel.hash for kernel in compiled})}
            stage.row(one.name, seconds=time.perf_counter() - start, **facts)
        except Exception as error:  # the others are compiled all the same
            stage.row(one.name, "failed", reason=f"{type(error).__name__}: {error}"[:500])


def launch(one: Sized) -> None:
    """Forward and backward of a trial on the meta device."""
    kind = one.kind._replace(device=torch.device("meta"))
    both_passes(kind, one.length, kind.backend)()
