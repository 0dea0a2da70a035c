"""`python -m bench`: no speed on a red gate, the schema of the rows, bounds and exit status, peaks of memory."""

from __future__ import annotations

import dataclasses
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy_bench import FACTS, invoke

import aajr_kernels
from aajr_kernels.backends import cpu
from bench import gate
from bench.case import Run, Selection
from bench.row import Row, read_rows
from bench.run import peak_in_new_process, run_case
from bench.suites import SUITES
from common import machine

FOLDER = Path(__file__).parents[2] / "bench"
RESULTS = FOLDER / "results"


@pytest.mark.slow
def test_the_allocator_keeps_memory_in_a_process_that_measures():
    code = (
        "from bench import allocator; before = allocator.in_use(); "
        "print(before, '|', allocator.keep_memory(), '|', allocator.in_use())"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    before, got, after = done.stdout.strip().split(" | ")
    assert before == "default" and got == after
    assert got == ("glibc, freed memory kept" if platform.libc_ver()[0] == "glibc" else "default")


def test_rows_have_the_schema_and_are_appended(toy, tmp_path):
    file = tmp_path / "rows.jsonl"
    text = invoke("toy", "--rows", file, "--threads", 1)
    invoke("toy:only", "--lengths", "5,9", "--dtype", "bfloat16", "--repeats", 2, "--rows", file)
    rows = read_rows(file)
    assert [(r.variant, r.length, r.dtype, r.repeats) for r in rows] == [
        *[(name, 8, "float32", 4) for name in ("plain", "dual")],
        *[(name, n, "bfloat16", 2) for n in (5, 9) for name in ("plain", "dual")],
    ]
    plain, dual = rows[:2]
    assert plain.ratio == 1.0 and dual.base == "plain"
    assert dual.ratio == pytest.approx(dual.min_ms / plain.min_ms, rel=1e-3)
    assert dual.median_ms > dual.min_ms > 1000 and dual.min_ms < 5000 and dual.gradient_error == 0.0
    assert dual.bounds == {"ratio": 2.0} and dual.passed is True and plain.passed is None
    assert dual.threads == 1 and dual.torch == torch.__version__ and dual.config == {"a": 1}
    assert "✓ ≤ 2" in text and "1 of 1 bounded rows within" in text


def test_every_call_is_timed_once_and_gradients_are_freed(toy):
    result = toy.run(repeats=3)
    assert not result.failures
    assert toy.calls.count("plain") == toy.calls.count("dual") == 1 + 1 + 3  # gate, warm-up, rounds
    assert toy.calls[-4:] == ["dual", "plain", "plain", "dual"]  # the order rotates
    assert toy.resets == 2 * (1 + 3)


def test_a_red_gate_gives_no_speed(toy, tmp_path):
    toy.variants[1] = toy.variant("dual", gradient=2.01)
    file = tmp_path / "rows.jsonl"
    text = invoke("toy", "--rows", file, exit_code=1)
    assert "gate red, no speed: dual: the gradients are wrong by 5.0e-03" in text
    assert "Gate red: toy:only float32 8." in text and "min ms" not in text
    assert file.read_text() == ""


@pytest.mark.parametrize("gradient", [float("nan"), 0.0])
def test_nan_and_missing_gradients_are_red(toy, gradient):
    toy.variants[1] = toy.variant("dual", gradient=gradient)
    assert gate.check(toy.cases(Selection())[0]).failures


def test_one_wrong_tensor_among_large_ones_is_red():
    big, small = torch.ones(10**4, dtype=torch.float64), 1e-2 * torch.ones(4, dtype=torch.float64)
    total, worst = gate.errors([big, 1.5 * small], [big, small])
    assert total < 2e-4 and worst == pytest.approx(0.5)
    assert gate.errors([big, None], [big, small])[1] == pytest.approx(1.0)
    assert gate.errors([big, torch.zeros(4)], [big, None]) == (0.0, 0.0)
    assert gate.errors([big], [big, small])[0] == float("inf")


def test_what_is_not_exact_is_reported_and_what_is_optional_may_fail(toy, tmp_path):
    def broken(length: int) -> Run:
        raise ValueError("no such kernel [here]")

    toy.variants += [
        toy.variant("rough", gradient=2.2, exact=False),
        dataclasses.replace(toy.variants[0], name="absent", make=broken, optional=True),
    ]
    file = tmp_path / "rows.jsonl"
    text = invoke("toy", "--rows", file)
    assert "absent left out: ValueError: no such kernel [here]" in text
    assert {r.variant: r.gradient_error for r in read_rows(file)} == {
        "plain": 0.0,
        "dual": 0.0,
        "rough": pytest.approx(0.1, rel=1e-2),
    }
    toy.variants[-1] = dataclasses.replace(toy.variants[-1], optional=False)
    assert "absent raised ValueError" in invoke("toy", exit_code=1)


def test_check_sets_the_exit_status(toy):
    assert "Outside" not in invoke("toy", "--check")
    toy.variants[1] = toy.variant("dual", seconds=3.0, bounds={"ratio": 2.0})
    text = invoke("toy")
    assert "✗ ≤ 2" in text and "Outside: toy:only float32 8 dual." in text
    invoke("toy", "--check", exit_code=1)


def test_a_peer_has_to_be_beaten(toy):
    toy.variants = [toy.variant("plain"), toy.variant("slow", seconds=9.0), toy.variant("dual", peer="slow")]
    result = toy.run()
    slow, dual = result.rows[1:]
    assert dual.bounds == {"ratio of slow": slow.ratio} and dual.passed is True
    toy.variants[2] = toy.variant("dual", seconds=20.0, peer="slow")
    assert [r.variant for r in toy.run().missed] == ["dual"]


def test_slow_peers_run_fewer_rounds_and_the_faster_base_counts(toy):
    toy.variants = [toy.variant("plain", seconds=9.0), toy.variant("other"), toy.variant("peer", rounds=1)]
    case = dataclasses.replace(toy.cases(Selection())[0], base=("plain", "other"))
    rows = {r.variant: r for r in run_case(case, FACTS).rows}
    assert rows["peer"].repeats == 1 and rows["plain"].repeats == 4
    assert {r.base for r in rows.values()} == {"other"} and rows["plain"].ratio > 1


def test_memory_bounds(toy, monkeypatch):
    peaks = {"plain": 100, "dual": 230}
    monkeypatch.setattr("bench.run.peak_in_new_process", lambda case, v: peaks[v.name])
    toy.variants[1] = toy.variant("dual", gradient_bytes=200, bounds={"peak_ratio": 2.2, "extra_bytes": 40.0})
    case = dataclasses.replace(toy.cases(Selection())[0], timed=False, peak=True)
    plain, dual = run_case(case, FACTS).rows
    assert (dual.peak_bytes, dual.peak_ratio, dual.passed) == (230, 2.3, False)
    assert dual.min_ms is None and dual.ratio is None and dual.repeats == 0 and plain.peak_ratio == 1.0
    peaks["dual"] = 215
    assert run_case(case, FACTS).rows[1].passed is True
    assert run_case(case, FACTS, peak=False).rows[1].passed is None


# ------------------------------------------------------------------------------------------------------- the rows
@pytest.mark.parametrize("path", sorted(FOLDER.glob("[rb]*/*.jsonl")), ids=lambda path: path.name)
def test_committed_rows_parse(path):
    rows = read_rows(path)
    assert rows
    for one in rows:
        assert one.suite in SUITES and one.family in SUITES[one.suite].families
        assert Row.parse(one.line()) == one


def test_a_row_refuses_what_is_not_in_the_schema(tmp_path):
    (line, *_) = (RESULTS / "cpu.jsonl").read_text().splitlines()
    good = json.loads(line)
    for change, message in (
        ({"extra": 1}, "unknown: extra"),
        ({"threads": "two"}, "threads of a row must be"),
        ({"dirty": 1}, "dirty of a row"),
        ({"repeats": True}, "repeats of a row"),
        ({"bounds": {"ratio": "low"}}, "bounds of a row"),
        ({"config": None}, "config of a row"),
    ):
        with pytest.raises(ValueError, match=message):
            Row.parse(json.dumps({**good, **change}))
    with pytest.raises(ValueError, match="must be a JSON object"):
        Row.parse("[]")
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{line}\n\n{{}}\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 3"):
        read_rows(file)


def test_environment_records_what_decides_the_speed(monkeypatch):
    facts = machine.describe(environ={"MKL_ENABLE_INSTRUCTIONS": "AVX2", "HOME": "/root"})
    assert facts["settings"] == {"MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    assert set(facts) < {field.name for field in dataclasses.fields(Row)}
    assert facts["device_name"] is None or torch.cuda.is_available()
    assert facts["torch_capability"] == torch.backends.cpu.get_cpu_capability()
    if aajr_kernels.backends()["native"] is None:
        assert facts["native_capability"] == cpu.info()["capability"]
    else:
        assert facts["native_capability"] is None
    monkeypatch.setattr(machine, "ROOT", Path("/nowhere"))
    assert machine._commit(["aajr_kernels"]) == (None, None)


# ------------------------------------------------------------------------------------------------ the command line
def test_list_names_every_suite_and_its_bounds():
    text = " ".join(invoke("--list").split())
    for suite in SUITES.values():
        for family in suite.families:
            assert f"{suite.name}:{family}" in text
    assert "dual: ≤ 1.25" in text and "64 MB extra" in text and "≤ 2.2 peak" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "suite 'nothing' is unknown"),
        (["step:rwkv"], "no family 'rwkv'"),
        (["--dtype", "int8"], "int8: choose from float32, bfloat16, float16"),
        (["--lengths", "512,x"], "no list of lengths"),
        (["--part", "sideways"], "'sideways' is not one of 'both', 'forward', 'backward'"),
        (["method", "--part", "forward"], "suite method is timed as a whole"),
        (["--device", "tpu"], "'tpu' is not one of 'cpu', 'cuda'"),
        (["--lengths", "1"], "no list of lengths"),
        (["--rows", "/nowhere/rows.jsonl"], "no folder"),
    ],
)
def test_bad_arguments(arguments, message):
    text = " ".join(invoke(*arguments, exit_code=2).replace("│", " ").split())
    assert message in text


def test_a_peak_that_cannot_be_measured_says_why(toy, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="no memory left")
    monkeypatch.setattr("bench.run.subprocess.run", lambda *a, **k: failed)
    with pytest.raises(RuntimeError, match=r"peak memory of plain was not measured: no memory left"):
        peak_in_new_process(toy.cases(Selection())[0], toy.variants[0])
