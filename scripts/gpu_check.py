"""Run the GPU tests on a machine with a CUDA or ROCm device, in parts of under ten minutes each.

    make gpu-check                    everything: the parts, compute-sanitizer on the small cases, a summary
    make gpu-check PART=2/4           the second quarter of the test files alone, for machines lent by the minute
    make gpu-check PY=python3         with an interpreter that has torch, pytest and a GPU, without any set-up

Exit codes: 0 all passed; 1 a test failed or a part ran out of time; 3 there is no device; 5 there are no GPU tests.
make prints that code and exits with 2 itself.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 570  # seconds a part may take
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q"]


def collect(marker: str) -> dict[str, int]:
    """Test files holding tests with that marker, and how many."""
    command = [*PYTEST, "--collect-only", "-m", marker, "tests"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    if done.returncode not in (0, 5):
        print(done.stdout + done.stderr)
        raise SystemExit(1)
    files: dict[str, int] = {}
    for line in done.stdout.splitlines():
        if "::" in line:
            name = line.split("::")[0]
            files[name] = files.get(name, 0) + 1
    return files


def split(files: dict[str, int], parts: int) -> list[list[str]]:
    """Distribute files over parts so that each gets about the same number of tests."""
    shares: list[list[str]] = [[] for _ in range(parts)]
    for name in sorted(files, key=lambda name: (-files[name], name)):
        min(shares, key=lambda share: sum(files[other] for other in share)).append(name)
    return [sorted(share) for share in shares if share]


def run(title: str, command: list[str]) -> tuple[str, str, float]:
    """Run one part; its title, its verdict and its seconds."""
    print(f"\n=== {title}", flush=True)
    start = time.monotonic()
    try:
        status = subprocess.run(command, cwd=ROOT, timeout=LIMIT, check=False).returncode
        verdict = "passed" if status == 0 else f"FAILED (exit {status})"
    except subprocess.TimeoutExpired:
        verdict = f"FAILED (over {LIMIT} s)"
    return title, verdict, time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--part", metavar="I/N", help="run the I-th of N parts only, without compute-sanitizer"
    )
    parser.add_argument("--parts", type=int, default=4, metavar="N", help="how many parts (default 4)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            f"gpu-check: no CUDA or ROCm device can be used by torch {torch.__version__}; nothing was checked."
        )
        return 3
    print(f"gpu-check on {torch.cuda.get_device_name()}, torch {torch.__version__}")
    files = collect("gpu")
    if not files:
        print("gpu-check: no test carries the gpu marker; nothing was checked.")
        return 5
    index, parts = (int(number) for number in options.part.split("/")) if options.part else (0, options.parts)
    shares = split(files, parts)
    results = []
    for number, share in enumerate(shares, start=1):
        if index in (0, number):
            results.append(run(f"part {number} of {len(shares)}", [*PYTEST, "-m", "gpu", *share]))
    sanitizer = shutil.which("compute-sanitizer")
    small = collect("gpu and sanitizer") if not index else {}
    if sanitizer and small:
        os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # so that memcheck sees every allocation's end
        checked = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9"]
        results.append(run("compute-sanitizer", [*checked, *PYTEST, "-m", "gpu and sanitizer", *small]))
    elif not index:
        print(
            "compute-sanitizer: left out,",
            "no small case is marked for it" if sanitizer else "it is not installed",
        )
    print("\n=== summary")
    for title, verdict, seconds in results:
        print(f"{title:24} {verdict:24} {seconds:6.0f} s")
    return int(any("FAILED" in verdict for _, verdict, _ in results))


if __name__ == "__main__":
    sys.exit(main())
