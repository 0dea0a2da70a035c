"""scripts/gpu_first.py: a dry run of every stage, stages whose device goes, and the markers of GPU tests."""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ops.suite import Target

from aajr_kernels.backends import choice, selfcheck
from aajr_kernels.backends.triton import launch as gpu
from bench.row import read_rows as bench_rows
from bench.suites import SUITES
from tests import conftest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import gpu_first  # noqa: E402
from gpu_stages import AGAIN, NAMES, choices, commands, correctness, kernels, warm  # noqa: E402
from gpu_stages.kinds import kinds  # noqa: E402
from gpu_stages.stage import Stage, read_rows  # noqa: E402

needs_triton = pytest.mark.skipif(gpu.missing() is not None, reason=str(gpu.missing()))


def states(rows: list[dict], stage: str) -> dict[str, str]:
    return {row["name"]: row["state"] for row in rows if row["stage"] == stage}


# 40 s on two idle cores; stages run in processes of their own, which a busy machine slows down most
@pytest.mark.timeout(900)
@needs_triton
def test_a_dry_run_writes_the_rows_of_every_stage(tmp_path):
    pytest.importorskip("transformers")
    command = [sys.executable, str(ROOT / "scripts" / "gpu_first.py"), "--dry", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False, timeout=870)
    log = (tmp_path / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log[-5000:]
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [states(rows, name)["stage"] for name in NAMES] == ["done"] * len(NAMES)
    assert all(len(states(rows, name)) > 1 for name in NAMES)
    assert not [row for row in rows if row["state"] in gpu_first.BAD]
    compared = states(rows, "correctness")
    assert list(compared.values()).count("passed") == len(kinds(dry=True)) == 7
    (compiled,) = [row for row in rows if row["stage"] == "warm" and row["name"] != "stage"]
    assert compiled["kernels"] > 1
    names = states(rows, "step")
    for name in ("plain 8", "exact, fused 8 over plain", "finite differences 8", "first-use check"):
        assert names[name] == "done"
    for kind in ("attack", "penalty"):
        assert states(rows, "context")[f"{kind}, last 12.5% of 16 open: over put together"] == "done"
    (check,) = [row for row in rows if row["name"] == "first-use check"]
    assert list(check["kinds"].values()) == ["passed"]
    assert [name for name, state in states(rows, "graphs").items() if state == "passed"] == [
        "penalty",
        "ascent and penalty",
        "packed",
    ]
    assert {f"rms_norm 2048: {n} programs" for n in (132, 528, 1056)} <= set(states(rows, "choices"))
    assert all(row["us"] > 0 and row["kernels"] for row in rows if row["stage"] == "kernels" and "us" in row)
    assert bench_rows(tmp_path / "bench.jsonl") and (tmp_path / "junit-tests.xml").exists()
    assert len(list(tmp_path.iterdir())) <= 8
    assert "exact, fused 8 over plain" in done.stdout and "wall_ms" in done.stdout


def test_without_a_device_nothing_is_checked(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_first.main(["--out", str(tmp_path / "out")]) == 3
    assert "nothing was checked" in capsys.readouterr().out and not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        gpu_first.main(["--again", str(tmp_path), "--out", str(tmp_path)])


def on_device(monkeypatch, tmp_path, runs: list[int | float]) -> list[tuple[str, str, str | None]]:
    """The processes of a run on a pretended device, each of which ends with the next status or runs out of time."""
    started = []

    class Process:
        pid = 2**22 + 1  # no process has it

        def __init__(self, command, env, **_):
            started.append((command[3], command[5], env.get("CUDA_LAUNCH_BLOCKING")))
            self.status = runs.pop(0) if runs else 0

        def wait(self, timeout=None):
            if self.status == math.inf and timeout is not None:
                raise subprocess.TimeoutExpired("", timeout)
            return self.status

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_first.subprocess, "Popen", Process)
    return started


def test_stages_run_in_order_of_value_and_a_stage_out_of_time_costs_only_itself(
    monkeypatch, tmp_path, capsys
):
    started = on_device(monkeypatch, tmp_path, [0, math.inf, 0])
    assert gpu_first.main(["--out", str(tmp_path)]) == 1
    assert [name for name, *_ in started] == list(NAMES)
    assert [float(seconds) for _, seconds, _ in started] == pytest.approx(list(NAMES.values()), abs=1)
    verdicts = {row["stage"]: row["state"] for row in read_rows(tmp_path / "rows.jsonl")}
    assert verdicts == {**dict.fromkeys(NAMES, "done"), "warm": "failed"}
    assert "FAILED stage" in capsys.readouterr().out
    started.clear()
    assert gpu_first.main(["--out", str(tmp_path), "--seconds", "30"]) == 0
    assert [float(seconds) for _, seconds, _ in started] == pytest.approx([20, *[30] * 9], abs=1)
    started.clear()
    again = tmp_path / "second"
    assert gpu_first.main(["--again", str(tmp_path), "--out", str(again)]) == 0
    assert [name for name, *_ in started] == list(AGAIN) and started[0][2] == "1"


def test_correctness_goes_on_after_a_process_that_died_with_blocking_launches(monkeypatch, tmp_path):
    started = on_device(monkeypatch, tmp_path, [1, 1, 0])
    assert gpu_first.main(["--out", str(tmp_path), "--only", "correctness"]) == 0
    assert [blocking for *_, blocking in started] == [None, "1", None]


def test_a_case_that_takes_the_device_along_is_repeated_once(monkeypatch, tmp_path):
    monkeypatch.setattr(correctness, "poison", lambda: None)
    lost = kinds(dry=True)[2].kind
    alive = True

    def difference(kind, length, repeats):
        nonlocal alive
        alive = kind != lost
        if not alive:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return 0.5, "the error of output 0 is small"

    monkeypatch.setattr(selfcheck, "difference", difference)
    monkeypatch.setattr(correctness, "_alive", lambda stage: alive)
    stage = Stage("correctness", tmp_path, time.monotonic() + 100, dry=True)
    for _ in range(2):
        with pytest.raises(SystemExit):
            correctness.run(stage)
    correctness.run(stage)
    names = [one.name for one in kinds(dry=True)]
    assert states(stage.rows(), "correctness") == {**dict.fromkeys(names, "passed"), names[2]: "failed"}
    assert [row["state"] for row in stage.rows() if row["name"] == names[2]] == [
        *("started", "faulted", "started", "failed")
    ]
    second = tmp_path / "second"
    second.mkdir()
    again = Stage("correctness", second, time.monotonic() + 100, dry=True, before=stage.rows())
    with pytest.raises(SystemExit):
        correctness.run(again)
    assert list(states(again.rows(), "correctness")) == [names[2]]


def test_a_process_that_says_nothing_is_left_out_the_third_time(monkeypatch, tmp_path):
    monkeypatch.setattr(correctness, "poison", lambda: None)
    monkeypatch.setattr(selfcheck, "difference", lambda kind, length, repeats: (0.5, ""))
    stage = Stage("correctness", tmp_path, time.monotonic() + 100, dry=True)
    first = kinds(dry=True)[0].name
    for _ in range(2):
        stage.row(first, "started")
    file = tmp_path / "rows.jsonl"
    file.write_text(file.read_text() + '{"stage": "correctness", "na\n')  # cut off
    correctness.run(stage)
    assert states(stage.rows(), "correctness")[first] == "failed"


def test_wrong_results_and_results_that_differ_are_failures(monkeypatch, tmp_path):
    monkeypatch.setattr(correctness, "poison", lambda: None)
    answers = iter([(1.5, "the error of output 0 is 3"), (math.inf, "output 0 differs between two runs")])
    monkeypatch.setattr(selfcheck, "difference", lambda *_, **__: next(answers, (0.1, "")))
    stage = Stage("correctness", tmp_path, time.monotonic() + 100, dry=True)
    correctness.run(stage)
    assert list(states(stage.rows(), "correctness").values())[:3] == ["failed", "failed", "passed"]


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


def test_a_stage_that_takes_too_long_ends_with_all_it_started(monkeypatch, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import subprocess, sys, time, pathlib\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(p.pid)); time.sleep(60)"
    )
    monkeypatch.setattr(gpu_first, "__file__", str(script))
    options = argparse.Namespace(out=tmp_path, dry=False, again=None)
    start = time.monotonic()
    gpu_first.run_stages(options, ["warm"], 3)
    assert time.monotonic() - start < 30
    assert read_rows(tmp_path / "rows.jsonl")[0]["state"] == "failed"
    assert ended(Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat"))


def test_names_of_failed_tests_are_rows_and_what_a_second_run_repeats(monkeypatch, tmp_path):
    said = "F.\nFAILED tests/a.py::test_b[x-1] - AssertionError: 1 - 2\nERROR tests/a.py::test_c\n"
    command = [sys.executable, "-c", f"print({said!r}); raise SystemExit(1)"]
    stage = Stage("tests", tmp_path, time.monotonic() + 100)
    commands.pytest(stage, "tests", command, ["tests"])
    assert states(stage.rows(), "tests") == {
        "tests/a.py::test_b[x-1]": "failed",
        "tests/a.py::test_c": "failed",
        "tests": "failed",
    }
    seen = []
    monkeypatch.setattr(commands, "pytest", lambda stage, name, command, chosen: seen.append(chosen))
    commands.tests(Stage("tests", tmp_path, time.monotonic() + 100, before=stage.rows()))
    assert seen == [["tests/a.py::test_b[x-1]", "tests/a.py::test_c"]]


def test_tests_that_run_out_of_time_are_interrupted_and_report(tmp_path):
    slow = tmp_path / "test_slow.py"
    slow.write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(60)\n")
    stage = Stage("tests", tmp_path, time.monotonic() + 35)
    commands.pytest(stage, "slow", [*commands.PYTEST, "-c", os.devnull, "-n", "0"], [str(slow)])
    (row,) = stage.rows()
    assert row["complete"] is False and row["state"] == "passed" and row["tests"] >= 1, row


def test_tests_that_are_killed_without_a_report_have_failed(tmp_path):
    deaf = tmp_path / "test_deaf.py"
    deaf.write_text("import os, signal\ndef test_a(): os.kill(os.getpid(), signal.SIGKILL)\n")
    stage = Stage("tests", tmp_path, time.monotonic() + 60)
    commands.pytest(stage, "deaf", [*commands.PYTEST, "-c", os.devnull, "-n", "0"], [str(deaf)])
    (row,) = stage.rows()
    assert row["state"] == "failed" and row["status"] == -9 and "tests" not in row


def test_every_family_of_the_suite_is_measured():
    assert sorted(commands.FAMILIES) == sorted(SUITES["gpu"].families)
    assert set(kernels.FAMILIES) < set(SUITES["gpu"].families)


@needs_triton
def test_every_kind_can_be_launched_and_every_alternative_exists():
    everything = kinds(dry=False)
    assert len({one.name for one in everything}) == len(everything) > 25
    for one in everything:
        if one.kind.backend == "triton":
            with gpu.dry_run("sm_90") as launched:
                warm.launch(one)
            assert launched, one.name
    for name, alternatives in choices.choices().items():
        assert name in {one.name for one in everything}
        for patches in alternatives.values():
            assert all(hasattr(owner, attribute) for owner, attribute, _ in patches)
    ops = {one.kind.op for one in everything}
    assert ops == {path.parent.name for path in Path(choice._OPS).glob("*/triton*")}


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
