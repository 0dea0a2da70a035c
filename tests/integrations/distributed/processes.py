"""Workers of a test in several processes: started, waited for, and gone afterwards whatever happened."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
WORKERS = Path(__file__).parent / "workers"

needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch was built without torch.distributed and gloo",
)


def launch(worker: str, world: int, folder: Path, *arguments: str, timeout: float = 240.0) -> str:
    """Run ``workers/<worker>.py rank world store arguments...`` in `world` processes; what rank 0 printed.

    Every worker has to end with code 0 and the word ``agrees``.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests", WORKERS)))
    environment.pop("TRITON_INTERPRET", None)
    folder.mkdir(parents=True, exist_ok=True)
    store = folder / f"store-{time.monotonic_ns()}"
    logs = [folder / f"{store.name}-{rank}.txt" for rank in range(world)]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, str(WORKERS / f"{worker}.py"), str(rank), str(world), str(store)]
            with log.open("w") as file:
                running.append(
                    subprocess.Popen(
                        [*command, *arguments], env=environment, stdout=file, stderr=subprocess.STDOUT
                    )
                )
        end = time.monotonic() + timeout
        while any(process.poll() is None for process in running):
            failed = [process for process in running if process.poll() not in (None, 0)]
            if failed or time.monotonic() > end:
                time.sleep(1.0 if failed else 0.0)  # the others may have something to say
                break
            time.sleep(0.05)
        said = [log.read_text() for log in logs]
        ended = [process.poll() for process in running]
        told = "\n".join(f"--- rank {r}, code {c}\n{t[-3000:]}" for r, (c, t) in enumerate(zip(ended, said)))
        assert all(code == 0 for code in ended) and all("agrees" in text for text in said), told
        return said[0]
    finally:
        for process in running:
            process.kill()
            process.wait()
