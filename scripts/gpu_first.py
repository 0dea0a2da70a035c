"""The first minutes on a GPU: everything that only a device can tell, in order of value, within a budget.

    make gpu-check                            on a CUDA device, about ten minutes; results in build/gpu
    python scripts/gpu_first.py --seconds 560 --out DIR
    python scripts/gpu_first.py --again DIR --out DIR2    the second run: what failed in the first, compute-sanitizer
    python scripts/gpu_first.py --dry         all stages on the CPU, tiny: whether each writes its rows
    python scripts/gpu_first.py --only step --only choices

Every stage is a process: an illegal access takes its CUDA context along, not the others. Rows are JSON lines in
DIR/rows.jsonl, on disk as soon as they are known; beside them log.txt, junit-*.xml and bench.jsonl (rows to be appended
to bench/results). A prebuilt CUDA module is taken from AAJR_CUDA_MODULE. scripts/gpu_stages has the stages.

Exit codes: 0 all passed; 1 something failed or took too long; 3 there is no device.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]

from gpu_stages import AGAIN, NAMES  # noqa: E402
from gpu_stages.stage import Stage, read_rows  # noqa: E402

COMMANDS = ("tests", "sanitizer", "bench")
#: attempts of `correctness`, which ends with its device
ATTEMPTS = 12
BAD = ("failed", "faulted")
#: figures of rows that the summary shows
FIGURES = ("flop_per_s", "bytes_per_s", "us", "wall_ms", "enqueue_ms", "launches", "peak_bytes", "ratio")
#: stages that share a process in a dry run, most of whose time is imports; two processes at a time
DRY = (
    ("machine", "correctness", "kernels", "step", "graphs", "context", "choices"),
    ("warm",),
    ("tests", "bench"),
)


def environment(name: str, dry: bool, blocking: bool) -> dict[str, str]:
    """Variables of a stage's process."""
    own = {**os.environ, "AAJR_SELFCHECK": "0", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    own["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    if blocking:
        own["CUDA_LAUNCH_BLOCKING"] = "1"
    own.pop("TRITON_INTERPRET", None)
    if dry:
        own |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        if name != "warm":  # which compiles
            own["TRITON_INTERPRET"] = "1"
    return own


def run_stages(options: argparse.Namespace, names: Sequence[str], seconds: float) -> None:
    """Run stages in one process; after one that died, `correctness` goes on with blocking launches."""
    start, blocking, status = time.monotonic(), bool(options.again), None
    for _ in range(ATTEMPTS if names == ["correctness"] else 1):
        left = seconds - (time.monotonic() - start)
        command = [sys.executable, __file__, "--stage", ",".join(names), "--seconds", f"{left:.0f}"]
        command += ["--out", str(options.out), *["--dry"] * options.dry]
        command += ["--again", str(options.again)] if options.again else []
        with (options.out / "log.txt").open("a") as log:
            process = subprocess.Popen(
                command,
                env=environment(names[0], options.dry, blocking),
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(timeout=max(left, 1.0))
            except subprocess.TimeoutExpired:
                status = None
            finally:
                with contextlib.suppress(ProcessLookupError):  # nothing that it started outlives it
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if status in (0, None):
            break
        blocking = not blocking  # the case that died is repeated so, and names its kernel
    facts = {"status": status, "seconds": round(time.monotonic() - start, 1)}
    for name in names:
        Stage(name, options.out, 0.0).row("stage", "done" if status == 0 else "failed", **facts)


def run(options: argparse.Namespace) -> int:
    """All stages; the summary comes last."""
    if not options.dry:
        import torch

        if not torch.cuda.is_available():
            print(f"gpu_first: torch {torch.__version__} sees no CUDA or ROCm device; nothing was checked.")
            return 3
    options.out.mkdir(parents=True, exist_ok=True)
    shares = AGAIN if options.again else NAMES
    names = [name for name in shares if not options.only or name in options.only]
    before, end = len(read_rows(options.out / "rows.jsonl")), time.monotonic() + options.seconds
    if options.dry:
        groups = [present for group in DRY if (present := [name for name in group if name in names])]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda group: run_stages(options, group, options.seconds), groups))
    for name in names if not options.dry else ():
        left = end - time.monotonic()
        if left < 10:
            Stage(name, options.out, 0.0).row("stage", "left out", reason="no time")
            continue
        run_stages(options, [name], min(left, shares[name] * max(1.0, options.seconds / 560)))
    rows = read_rows(options.out / "rows.jsonl")[before:]
    print("\n".join(summary(rows)))
    return int(any(row["state"] in BAD for row in rows))


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line per stage with its counts, the main figures, and a line per failure."""
    lines = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        own = [row for row in rows if row["stage"] == stage]
        states = [row["state"] for row in own if row["name"] != "stage" and row["state"] != "started"]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        (end,) = [row for row in own if row["name"] == "stage"][-1:] or [{}]
        lines.append(f"{stage:12} {end.get('state', 'no end'):8} {end.get('seconds', 0):6} s  {counts}")
        for row in own:
            figures = {key: row[key] for key in FIGURES if row.get(key) is not None}
            if figures and row["state"] not in BAD:
                numbers = "  ".join(f"{key} {value:,.4g}" for key, value in figures.items())
                lines.append(f"    {row['name'][:60]:60} {numbers}")
            if row["state"] in BAD:
                why = row.get("reason") or row.get("worst") or row.get("status")
                lines.append(f"    {row['state'].upper()} {row['name']}: {why}"[:240])
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=560.0, help="of the whole run (default 560)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of the results")
    parser.add_argument(
        "--again", type=Path, metavar="DIR", help="repeat what failed in the run with these results"
    )
    parser.add_argument("--dry", action="store_true", help="on the CPU, at tiny sizes")
    parser.add_argument(
        "--only", action="append", choices=[*NAMES, *AGAIN], help="only this stage; repeatable"
    )
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.out = options.out.absolute()
    if options.again is not None and options.again.absolute() == options.out:
        parser.error("--again and --out name the same folder: give the second run one of its own.")
    if options.stage is None:
        return run(options)
    before = None if options.again is None else read_rows(options.again / "rows.jsonl")
    if os.environ.get("TRITON_INTERPRET"):  # Triton 3.6 and numpy 2.4 do not go together there
        importlib.import_module("backends.triton.interpreter").patch()
    for name in options.stage.split(","):
        stage = Stage(name, options.out, time.monotonic() + options.seconds, options.dry, before)
        if name in COMMANDS:
            getattr(importlib.import_module("gpu_stages.commands"), name)(stage)
        else:
            importlib.import_module(f"gpu_stages.{name}").run(stage)
    return 0


if __name__ == "__main__":
    sys.exit(main())
