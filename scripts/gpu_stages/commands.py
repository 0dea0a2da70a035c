"""Stages that are commands: `tests`, `sanitizer` and `bench`."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

from .stage import ROOT, Stage, read_rows

PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rfE"]
#: cases of the benchmark suite `gpu`, those of most value first
FAMILIES = (
    *("causal-forward", "causal-backward", "rms_norm-forward", "rms_norm-backward", "swiglu-forward"),
    *(
        "swiglu-backward",
        "head",
        "full-forward",
        "full-backward",
        "launches",
        "rotary-forward",
        "rotary-backward",
    ),
    *("layer_norm-forward", "layer_norm-backward", "gelu-forward", "gelu-backward", "step"),
)


def tests(stage: Stage) -> None:
    """The GPU tests; in a second run those that failed."""
    selected = ["-m", "gpu", "tests/backends/test_gpu.py" if stage.dry else "tests"]
    failed = stage.failed_before()
    if failed is not None:
        if not failed:
            stage.row("tests", "left out", reason="none failed")
            return
        selected = [name for name in failed if "::" in name] or selected
    count = 1 if stage.dry else min(16, os.cpu_count() or 1)
    workers = ["-n", str(count)] if count > 1 and importlib.util.find_spec("xdist") else []
    pytest(stage, "tests", [*PYTEST, *workers], selected)


def sanitizer(stage: Stage) -> None:
    """compute-sanitizer on the small cases: memcheck on all, racecheck and initcheck on the kernels in CUDA C++."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        stage.row("sanitizer", "left out", reason="compute-sanitizer is not installed")
        return
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # so that memcheck sees every allocation's end
    collected = subprocess.run(
        [*PYTEST, "--collect-only", "-m", "gpu and sanitizer", "tests/ops/test_suite.py", "tests/backends"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    small = [line for line in collected.stdout.splitlines() if "::" in line]
    ours = [test for test in small if test.endswith("-cuda]")]
    for kind, selected in (("memcheck", small), ("racecheck", ours), ("initcheck", ours)):
        if selected:
            checked = [tool, "--tool", kind, "--target-processes", "all", "--error-exitcode", "9"]
            pytest(stage, kind, [*checked, *PYTEST], selected)


def pytest(stage: Stage, name: str, command: list[str], selected: Sequence[str]) -> None:
    """Run tests with a junit file and a row for every one that failed; they are interrupted in time to report."""
    junit = stage.out / f"junit-{name}.xml"
    ids = [word for word in selected if "::" in word]  # too many for a command line
    listed = stage.out / f"tests-{name}.txt"
    listed.write_text("\n".join(ids))
    arguments = [f"@{listed}"] if ids else list(selected)
    process = subprocess.Popen(
        [*command, f"--junitxml={junit}", *arguments],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        # a shell has its background jobs ignore the interrupt, and they hand that on; there is one thread here
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    timely = True
    try:
        said, _ = process.communicate(timeout=max(1.0, stage.left - 20))
    except subprocess.TimeoutExpired:
        timely = False
        process.send_signal(signal.SIGINT)
        try:
            said, _ = process.communicate(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
    listed.unlink(missing_ok=True)
    print(said, flush=True)
    for kind, test in re.findall(r"^(FAILED|ERROR) (\S+::.*?)(?: - .*)?$", said, re.MULTILINE):
        stage.row(test, "failed", kind=kind.lower())
    counts: dict[str, int] = {}
    if junit.exists():
        suite = ElementTree.parse(junit).getroot().find("testsuite")
        if suite is not None:
            counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    interrupted = not timely and counts and not counts["failures"] and not counts["errors"]
    ok = process.returncode in (0, 5) or interrupted
    state = "passed" if ok else "failed"
    stage.row(name, state, status=process.returncode, complete=timely, **counts)


def bench(stage: Stage) -> None:
    """Gated rows of the benchmark suite, to be committed: ``bench.jsonl`` has their schema."""
    file = stage.out / "bench.jsonl"
    known = 0
    for family in FAMILIES[:1] if stage.dry else FAMILIES:
        names = ["norm:rms_norm", "--lengths", "8", "--dtype", "float32"] if stage.dry else [f"gpu:{family}"]
        if stage.left < 10 and not stage.dry:
            stage.row(family, "left out", reason="no time")
            continue
        start = time.monotonic()
        command = [sys.executable, "-m", "bench", *names, "--repeats", "5", "--no-peak", "--rows", str(file)]
        try:
            status = subprocess.run(
                command, cwd=ROOT, check=False, timeout=max(1.0, stage.left - 3)
            ).returncode
        except subprocess.TimeoutExpired:
            status = None
        rows = read_rows(file)[known:]
        known += len(rows)
        numbers = {row["variant"]: [row["min_ms"], row["ratio"], row["byte_share"]] for row in rows}
        state = "done" if status == 0 else "failed"
        stage.row(family, state, status=status, seconds=time.monotonic() - start, ms_ratio_bytes=numbers)
