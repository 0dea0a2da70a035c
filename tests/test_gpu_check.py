"""`make gpu-check`: what it runs where there is a device, pretended here, and what it says where there is none."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ops.suite import Target

from bench.suites import SUITES
from tests import conftest

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
gpu_check = importlib.util.module_from_spec(SPEC)
sys.modules["gpu_check"] = gpu_check
SPEC.loader.exec_module(gpu_check)

ROW = (ROOT / "bench" / "results" / "cpu.jsonl").read_text().splitlines()[0]


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A device that is not there, and the commands that would run."""
    commands = []

    def run(title, command):
        ids = [Path(word[1:]).read_text().split("\n") for word in command if word.startswith("@")]
        commands.append((title, command, ids[0] if ids else []))
        if "bench" in command:
            with Path(command[-1]).open("a") as file:
                file.write(json.dumps({**json.loads(ROW), "passed": False, "bounds": {"ratio": 2.0}}) + "\n")
        return gpu_check.Result(title, "passed", 1.0)

    tests = [f"tests/test_a.py::test_{i}[a b]" for i in range(10)]
    tests[1] = "tests/test_a.py::test_1[a-cuda]"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(gpu_check, "collect", lambda marker: tests[:2] if "sanitizer" in marker else tests)
    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/bin/{name}")
    (tmp_path / "bench" / "results").mkdir(parents=True)
    return commands


#: the kernels in Triton, which synchronise by themselves, go through memcheck only
SANITIZED = [
    f"compute-sanitizer {tool}" for tool in ("memcheck, 2 tests", "racecheck, 1 tests", "initcheck, 1 tests")
]


def test_everything_runs_in_order_and_the_summary_is_last(device, capsys):
    assert gpu_check.main([]) == 0
    titles = [title for title, _, _ in device]
    assert titles[:4] == [f"part {i} of 4, {n} tests" for i, n in ((1, 2), (2, 3), (3, 2), (4, 3))]
    assert titles[4:] == [
        *SANITIZED,
        *(f"python -m bench, {name}" for name in gpu_check.BENCHES),
    ]
    run = [test for _, command, tests in device[:4] for test in tests]
    assert run == gpu_check.collect("gpu") and "[a b]" in run[0]
    sanitizer = device[4][1]
    assert sanitizer[0] == "/bin/compute-sanitizer" and "-n" not in sanitizer
    out = capsys.readouterr().out
    summary = out.split("=== summary")[1]
    assert summary.count("MISSED") == len(gpu_check.BENCHES) and summary.rstrip().endswith("1 s")
    file = gpu_check.ROOT / "bench" / "results" / "nvidia-h100-80gb-hbm3.jsonl"
    assert len(file.read_text().splitlines()) == len(gpu_check.BENCHES)


def test_one_part_and_one_kind(device):
    assert gpu_check.main(["--part", "2/5"]) == 0
    assert [title for title, _, _ in device] == ["part 2 of 5, 2 tests"]
    device.clear()
    gpu_check.main(["--only", "sanitizer"])
    assert [title for title, _, _ in device] == SANITIZED
    assert [command[2] for _, command, _ in device] == ["memcheck", "racecheck", "initcheck"]
    assert [tests for *_, tests in device][1:] == 2 * [["tests/test_a.py::test_1[a-cuda]"]]


def test_a_failure_and_a_missing_tool_are_told(device, monkeypatch, capsys):
    monkeypatch.setattr(
        gpu_check, "run", lambda title, command: gpu_check.Result(title, "FAILED (exit 1)", 2.0)
    )
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    assert gpu_check.main(["--parts", "1"]) == 1
    assert "left out: compute-sanitizer is not installed" in capsys.readouterr().out
    monkeypatch.setattr(gpu_check, "collect", lambda marker: [])
    assert gpu_check.main([]) == 5


def test_without_a_device_nothing_is_checked(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 3
    assert "nothing was checked" in capsys.readouterr().out


def ended(status: Path) -> bool:
    """Whether a process that was killed is gone or about to be; the system may take its time about it."""
    for _ in range(100):
        try:
            if status.read_text().split()[2] in "ZX":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_a_part_that_takes_too_long_ends_with_all_it_started(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "LIMIT", 2)
    code = "import subprocess, sys, time, pathlib\n"
    code += "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    code += f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(p.pid)); time.sleep(60)"
    result = gpu_check.run("slow", [sys.executable, "-c", code])
    assert result.verdict == "FAILED (over 2 s)" and result.failed and result.seconds < 30
    assert ended(Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat"))
    assert gpu_check.run("quick", [sys.executable, "-c", "raise SystemExit(4)"]).verdict == "FAILED (exit 4)"


def test_every_family_of_the_suite_is_measured():
    assert sorted(itertools.chain(*gpu_check.BENCHES.values())) == sorted(SUITES["gpu"].families)


def test_tests_of_the_kernels_get_the_marker_where_there_is_a_device():
    def item(file: str, **parameters):
        marks = set()
        collected = SimpleNamespace(path=ROOT / "tests" / file, keywords=marks, add_marker=marks.add)
        if parameters:
            collected.callspec = SimpleNamespace(params=parameters)
        return collected

    case = SimpleNamespace(op="norm")
    suite = [
        item("ops/test_suite.py", target=Target(backend), case=case, k=k, dtype=dtype)
        for backend in ("triton", "cuda", "native")
        for k in (1, 3)
        for dtype in (torch.bfloat16, torch.float16)
        for _ in range(6)
    ]
    files = [
        item(f"backends/triton/{name}") for name in ("test_norm.py", "test_compile.py", "test_choice.py")
    ]
    conftest._mark_for_the_device([*suite, *files])
    assert ["gpu" in one.keywords for one in suite] == 48 * [True] + 24 * [False]
    assert ["gpu" in one.keywords for one in files] == [True, False, False]
    small = [one for one in suite if "sanitizer" in one.keywords]
    assert small == [*suite[: conftest.SANITIZED], *suite[24 : 24 + conftest.SANITIZED]]


@pytest.mark.slow
def test_the_marker_is_there_before_it_chooses(tmp_path):
    """Collected in a process that takes itself to have a device."""
    (tmp_path / "pretended.py").write_text("import torch\ntorch.cuda.is_available = lambda: True\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "TRITON"))}
    command = [sys.executable, "-m", "pytest", "-p", "pretended", "-p", "no:cacheprovider", "-q"]
    command += [
        "--collect-only",
        "-m",
        "gpu and sanitizer",
        "tests/ops/test_suite.py",
        "tests/backends/test_gpu.py",
    ]
    environment = {**kept, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    assert 10 < len(tests) < 60
    assert any(line.endswith("-cuda]") for line in tests)
    assert all(line.endswith(("-triton]", "-cuda]")) or "test_gpu.py" in line for line in tests)
