"""Check everything that needs a CUDA or ROCm device, in parts of under ten minutes each; the summary comes last.

    make gpu-check                    the GPU tests in four parts, compute-sanitizer, `python -m bench gpu`
    make gpu-check PART=2/8           only one eighth of the tests
    make gpu-check ONLY=sanitizer     only that: tests, sanitizer or bench
    make gpu-check PY=python3         with an interpreter that has torch, triton, pytest and a GPU, without any set-up

Rows of the benchmarks are appended to bench/results/<device>.jsonl. Exit codes: 0 all passed; 1 a test failed, a gate
was red or a part ran out of time (a missed bound of the benchmarks is only reported); 3 there is no device; 5 there are
no GPU tests. make prints that code and exits with 2 itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 570  # seconds a part may take
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q"]
KINDS = ("tests", "sanitizer", "bench")
#: families of rows in each part of the benchmarks
BENCHES = {
    "attention": ["full-forward", "full-backward", "causal-forward", "causal-backward"],
    "rows": [
        f"{op}-{part}"
        for op in ("rms_norm", "layer_norm", "swiglu", "gelu", "rotary")
        for part in ("forward", "backward")
    ],
    "head and step": ["head", "step"],
    "launches": ["launches"],
}


@dataclass(frozen=True)
class Result:
    """One part: its title, what came of it, and its seconds."""

    title: str
    verdict: str
    seconds: float

    @property
    def failed(self) -> bool:
        return self.verdict.startswith("FAILED")


def collect(marker: str) -> list[str]:
    """Ids of the tests with that marker, in the order in which they run."""
    command = [*PYTEST, "--collect-only", "-m", marker, "tests"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    if done.returncode not in (0, 5):
        print(done.stdout + done.stderr)
        raise SystemExit(1)
    return [line for line in done.stdout.splitlines() if "::" in line]


def split(tests: Sequence[str], parts: int) -> list[list[str]]:
    """Neighbours stay together: they share compiled kernels and expected results."""
    parts = max(1, min(parts, len(tests)))
    edges = [len(tests) * i // parts for i in range(parts + 1)]
    return [list(tests[start:end]) for start, end in itertools.pairwise(edges)]


def run(title: str, command: list[str]) -> Result:
    """Run one part; whatever it started ends with it."""
    print(f"\n=== {title}", flush=True)
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        status = process.wait(timeout=LIMIT)
        verdict = "passed" if status == 0 else f"FAILED (exit {status})"
    except subprocess.TimeoutExpired:
        verdict = f"FAILED (over {LIMIT} s)"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Result(title, verdict, time.monotonic() - start)


def run_tests(title: str, tests: list[str], prefix: Sequence[str] = (), jobs: int = 1) -> Result:
    """Run tests by their ids, which are too many for a command line."""
    workers = ["-n", str(jobs)] if jobs > 1 and importlib.util.find_spec("xdist") else []
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(tests))
        file.flush()
        return run(title, [*prefix, *PYTEST, *workers, f"@{file.name}"])


def sanitize() -> list[Result]:
    """compute-sanitizer on the small cases: memcheck on all, racecheck and initcheck on the kernels in CUDA C++."""
    sanitizer = shutil.which("compute-sanitizer")
    small = collect("gpu and sanitizer") if sanitizer else []
    if not sanitizer or not small:
        reason = "no small case is marked for it" if sanitizer else "compute-sanitizer is not installed"
        return [Result("compute-sanitizer", f"left out: {reason}", 0.0)]
    ours = [test for test in small if test.endswith("-cuda]")]
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # so that memcheck sees every allocation's end
    results = []
    try:
        for tool, tests in (("memcheck", small), ("racecheck", ours), ("initcheck", ours)):
            checked = [sanitizer, "--tool", tool, "--target-processes", "all", "--error-exitcode", "9"]
            if tests:
                results.append(run_tests(f"compute-sanitizer {tool}, {len(tests)} tests", tests, checked))
    finally:
        del os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"]
    return results


def results_file(device: str) -> Path:
    """bench/results/<device>.jsonl, named by the marketing name."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return ROOT / "bench" / "results" / f"{name}.jsonl"


def summary_of_rows(lines: Sequence[str]) -> list[str]:
    """One line per measured variant: time, ratio, share of the ceiling, and whether its bounds hold."""
    summary = []
    for line in lines:
        row: dict[str, Any] = json.loads(line)
        if row["min_ms"] is None:
            continue
        share = row.get("flop_share") or row.get("byte_share")
        bounds = ", ".join(f"{name} <= {limit:g}" for name, limit in row["bounds"].items())
        mark = {True: "held", False: "MISSED", None: ""}[row["passed"]]
        summary.append(
            f"{row['suite']}:{row['family']:20} {row['variant']:22} {row['min_ms']:9.3f} ms  "
            f"x {row['ratio']:5.2f}  {'' if share is None else f'{share:4.0%}':4}  {mark:6} {bounds}".rstrip()
        )
    return summary


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", metavar="I/N", help="run the I-th of N parts of the tests and nothing else")
    parser.add_argument("--parts", type=int, default=4, metavar="N", help="parts of the tests (default 4)")
    parser.add_argument("--only", choices=KINDS, help="run only this kind of check")
    parser.add_argument(
        "--jobs", type=int, default=min(8, os.cpu_count() or 1), help="test processes (default up to 8)"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            f"gpu-check: no CUDA or ROCm device can be used by torch {torch.__version__}; nothing was checked."
        )
        return 3
    device = torch.cuda.get_device_name()
    print(f"gpu-check on {device}, torch {torch.__version__}")
    kinds = ("tests",) if options.part else (options.only,) if options.only else KINDS
    results: list[Result] = []
    measured: list[str] = []
    if "tests" in kinds:
        tests = collect("gpu")
        if not tests:
            print("gpu-check: no test carries the gpu marker; nothing was checked.")
            return 5
        index, parts = (int(n) for n in options.part.split("/")) if options.part else (0, options.parts)
        shares = split(tests, parts)
        for number, share in enumerate(shares, start=1):
            if index in (0, number):
                title = f"part {number} of {len(shares)}, {len(share)} tests"
                results.append(run_tests(title, share, jobs=options.jobs))
    if "sanitizer" in kinds:
        results += sanitize()
    if "bench" in kinds:
        rows = results_file(device)
        known = len(rows.read_text().splitlines()) if rows.exists() else 0
        for title, families in BENCHES.items():
            names = [f"gpu:{family}" for family in families]
            command = [sys.executable, "-m", "bench", *names, "--rows", str(rows)]
            results.append(run(f"python -m bench, {title}", command))
        measured = summary_of_rows(rows.read_text().splitlines()[known:]) if rows.exists() else []
    print("\n=== summary")
    print("\n".join(measured))
    for result in results:
        print(f"{result.title:32} {result.verdict:44} {result.seconds:6.0f} s")
    return int(any(result.failed for result in results))


if __name__ == "__main__":
    sys.exit(main())
