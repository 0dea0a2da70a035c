"""`python -m bench` beside itself: files of rows, baselines; and cases that fail or are interrupted."""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path

import pytest
import torch
from toy_bench import Toy, invoke
from typer.testing import CliRunner

from bench import compare, peers, suites
from bench.case import Selection, Suite
from bench.row import environment, read_rows
from bench.run import run_case
from common.command import application


@pytest.fixture
def rows(toy: Toy, tmp_path):
    file = tmp_path / "before.jsonl"
    invoke("toy", "--rows", file)
    return read_rows(file)


def scaled(rows, factor, **changes):
    """The same measurement with every ratio of `dual` times `factor`."""
    return [
        dataclasses.replace(
            row,
            ratio=row.ratio * factor,
            round_ratios=[r * factor for r in row.round_ratios],
            **changes,
        )
        if row.variant == "dual"
        else row
        for row in rows
    ]


def write(path, rows):
    path.write_text("".join(row.line() + "\n" for row in rows))
    return path


def changes(before, after):
    return compare.compare(before, after).changes


def rounds(rows, *ratios):
    """The same measurement with these rounds of `dual`."""
    return [
        dataclasses.replace(row, round_ratios=list(ratios), ratio=min(ratios))
        if row.variant == "dual"
        else row
        for row in rows
    ]


def test_a_ratio_is_compared_round_by_round_with_an_interval(rows):
    base, dual = rows
    assert base.round_ratios == [1.0] * 4 and len(dual.round_ratios) == 4
    (same,) = changes(rows, rows)
    assert same.growth == 0 and not same.differs and not same.exceeds(0.0)
    steady = rounds(rows, *[1.6, 1.61, 1.62] * 3)
    (slower,) = changes(steady, scaled(steady, 1.3, commit="another", torch="3.0"))
    assert slower.growth == pytest.approx(0.3) and slower.interval[0] <= 0.3 <= slower.interval[1]
    assert slower.before == 1.61 and slower.exceeds()
    noisy = rounds(rows, 0.5, 0.6, 1.0, 1.1, 2.0, 3.0, 4.0)
    (unclear,) = changes(noisy, scaled(noisy, 1.2))
    assert unclear.growth == pytest.approx(0.2) and not unclear.differs and not unclear.exceeds()
    # with few rounds an interval would excuse anything: the growth alone decides
    (few,) = changes(rounds(rows, 1.0, 1.0, 2.1), rounds(rows, 2.0, 2.0, 2.0))
    assert few.interval is None and few.growth == pytest.approx(1.0) and few.exceeds()
    # but not of a peer that is given a few rounds only
    slow = compare.compare(rows, scaled(rows, 2.0))
    assert slow.changes[0].exceeds() and slow.changes[0].rounds == 4 and slow.slower == []
    (bare,) = changes(
        [base, dataclasses.replace(dual, round_ratios=[])],
        [base, dataclasses.replace(dual, ratio=2 * dual.ratio)],
    )
    assert bare.interval is None and bare.growth == pytest.approx(1.0) and bare.exceeds()


def test_another_base_does_not_change_what_is_compared(rows):
    base, dual = rows
    faster = dataclasses.replace(base, variant="plain, compiled", base="plain, compiled", ratio=1.0)
    now = [
        dataclasses.replace(base, base="plain, compiled", ratio=2.0),
        faster,
        dataclasses.replace(dual, base="plain, compiled", ratio=2 * dual.ratio),
    ]
    by_name = {change.name.split()[-1]: change for change in changes(rows, now)}
    assert by_name["dual"].growth == pytest.approx(0.0) and by_name["dual"].interval is None


def test_only_what_measures_the_same_is_compared(rows):
    for change in (
        {"length": 9},
        {"cpu": "another"},
        {"threads": 3},
        {"dtype": "bfloat16"},
        {"config": {"a": 2}},
        {"native_capability": "another"},
    ):
        comparison = compare.compare(rows, [dataclasses.replace(row, **change) for row in rows])
        assert comparison.changes == [] and comparison.lost == [] and comparison.unmatched == (2, 2)


def test_the_last_row_counts_even_if_it_failed(rows):
    failed = dataclasses.replace(rows[1], ratio=None, round_ratios=[], failure="out of memory")
    comparison = compare.compare(rows, [*rows, failed])
    assert comparison.changes == [] and comparison.lost == ["toy:only float32 8 dual"]


def test_compare_files(rows, tmp_path):
    def beside(*files, exit_code=0):
        result = CliRunner().invoke(application(compare.files), [*map(str, files)])
        assert result.exit_code == exit_code, result.output
        return " ".join(result.output.split())

    a, b = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", scaled(rows, 1.4))
    text = beside(a, b)
    assert "toy:only float32 8 dual" in text and "+40.0%" in text and "slower" in text
    c = write(tmp_path / "c.jsonl", [dataclasses.replace(row, length=1) for row in rows])
    assert "a ratio in common" in beside(a, c, exit_code=2)
    assert "No such file" in beside(a, tmp_path / "nothing.jsonl", exit_code=2)


def said(*arguments):
    return " ".join(invoke(*arguments, exit_code=2).replace("│", "").split())


def test_a_baseline_holds_until_a_ratio_grows(toy: Toy, tmp_path):
    folder = tmp_path / "baselines"
    text = said("toy", "--baseline", folder)
    assert "for this kind of machine" in text and "--update" in text and not toy.calls
    assert "Baseline of 2 rows" in invoke("toy", "--baseline", folder, "--update")
    assert "1 ratios compared" in invoke("toy", "--baseline", folder)
    toy.variants[1] = toy.variant("dual", seconds=1.5 * 1.5)
    assert "Slower by more than 15%: toy:only float32 8 dual" in invoke(
        "toy", "--baseline", folder, exit_code=1
    )
    toy.variants = toy.variants[:1]
    assert "Without a number now: toy:only float32 8 dual" in invoke("toy", "--baseline", folder, exit_code=1)
    assert "goes with --baseline" in said("toy", "--update")


def test_a_baseline_that_has_nothing_to_say_does_not_pass(toy: Toy, tmp_path, monkeypatch):
    folder = tmp_path / "baselines"
    invoke("toy", "--baseline", folder, "--update")
    (file,) = folder.iterdir()
    made = toy.cases
    other = lambda selection: [dataclasses.replace(case, config={"a": 2}) for case in made(selection)]
    suite = Suite("toy", "a toy", ("only",), other)
    monkeypatch.setattr(suites, "SUITES", {"toy": suite})
    assert "2 rows of the baseline have no counterpart" in invoke("toy", "--baseline", folder, exit_code=1)
    # another dtype is no loss, but there is nothing to compare either
    invoke("toy", "--dtype", "bfloat16", "--baseline", folder, exit_code=1)
    # a run that fails does not become the baseline
    before = file.read_text()
    monkeypatch.setattr(suites, "SUITES", {"toy": Suite("toy", "a toy", ("only",), made)})
    toy.variants[1] = toy.variant("dual", gradient=3.0)
    assert "was not written" in invoke("toy", "--baseline", folder, "--update", exit_code=1)
    assert file.read_text() == before
    # what was not run stays in it
    toy.variants[1] = toy.variant("dual")
    assert "Baseline of 4 rows" in invoke("toy", "--lengths", "5", "--baseline", folder, "--update")
    file.write_text("{}")
    toy.calls.clear()
    assert "a row" in said("toy", "--baseline", folder) and not toy.calls


def test_kinds_of_machines_have_names_of_their_own():
    facts = {
        "device_name": None,
        "cpu": "AMD EPYC",
        "machine": "x86_64",
        "torch_capability": "AVX2",
        "threads": 2,
    }
    facts |= {"native_capability": "avx2"}
    kind = lambda **more: compare.baseline_file(Path("."), {**facts, **more}).stem
    assert kind() == "amd-epyc-avx2-avx2-2"
    assert kind(device_name="NVIDIA H100") == "nvidia-h100-amd-epyc-avx2-avx2-2"
    assert kind(native_capability=None) == "amd-epyc-avx2-no-native-2"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 10 GB"),
        torch.OutOfMemoryError(),
    ],
)
@pytest.mark.parametrize(
    "length", [3, pytest.param(8, marks=pytest.mark.slow)]
)  # at the gate, at full length
def test_out_of_memory_is_a_row_and_the_rest_goes_on(toy: Toy, tmp_path, error, length):
    made = toy.variants[1].make

    def make(n):
        if n == length:
            raise error
        return made(n)

    toy.variants[1] = dataclasses.replace(toy.variants[1], make=make)
    toy.variants.append(toy.variant("peer"))
    file = tmp_path / "rows.jsonl"
    text = invoke("toy", "--rows", file)
    assert f"dual: out of memory at{' the gate,' if length == 3 else ''} length {length}" in text
    by_variant = {row.variant: row for row in read_rows(file)}
    assert "out of memory" in by_variant["dual"].failure and by_variant["dual"].ratio is None
    assert by_variant["dual"].passed is False  # it has a bound, which was not shown to hold
    assert by_variant["peer"].ratio and not by_variant["peer"].failure
    invoke("toy", "--check", exit_code=1)


def test_out_of_memory_in_a_round_and_of_a_peak(toy: Toy, monkeypatch):
    made = toy.variants[1].make

    def make(n):
        run, left = made(n), [3]

        def call():
            left[0] -= 1
            if left[0] < 0:
                raise MemoryError
            return run.call()

        return dataclasses.replace(run, call=call)

    toy.variants[1] = dataclasses.replace(toy.variants[1], make=make)
    plain, dual = toy.run().rows
    assert "round 3" in dual.failure and dual.passed is False and plain.repeats == 4

    def peak(case, variant):
        raise RuntimeError("the peak was not measured")

    monkeypatch.setattr("bench.run.peak_in_new_process", peak)
    toy.variants[1] = toy.variant("dual", bounds={"ratio": 9.0})
    plain, dual = toy.run(peak=True).rows  # the times are kept
    assert dual.ratio and "peak was not measured" in dual.failure and dual.passed is False


def test_without_a_base_there_is_nothing_to_compare_with(toy: Toy):
    def make(n):
        raise MemoryError

    toy.variants[0] = dataclasses.replace(toy.variants[0], make=make)
    outcome = toy.run()
    assert outcome.rows == [] and "nothing to compare with (plain: out of memory" in outcome.failures[0]


class TwoCases:
    """A suite of which one case goes wrong."""

    def __init__(self, toy, error):
        self.toy, self.error = toy, error

    def cases(self, selection):
        (good,) = self.toy.cases(Selection())

        def make(n):
            if n == 8:
                raise self.error
            return self.toy.variants[0].make(n)

        bad = dataclasses.replace(
            good, family="bad", variants=(dataclasses.replace(good.variants[0], make=make),)
        )
        return [good, bad, dataclasses.replace(good, length=5)]


@pytest.mark.parametrize(("error", "code"), [(OSError("no such library"), 1), (KeyboardInterrupt(), 130)])
def test_finished_cases_keep_their_rows(toy: Toy, tmp_path, monkeypatch, error, code):
    suite = Suite("toy", "a toy", ("only",), TwoCases(toy, error).cases)
    monkeypatch.setattr(suites, "SUITES", {"toy": suite})
    file = tmp_path / "rows.jsonl"
    text = invoke("toy", "--rows", file, exit_code=code)
    lengths = {row.length for row in read_rows(file)}
    if code == 1:
        assert "OSError: no such library" in text and lengths == {8, 5}  # the others went on
    else:
        assert "Interrupted after 1 of 3 cases" in text and lengths == {8}


def test_quick_is_the_smallest_case_of_every_family_without_compilation(toy: Toy):
    toy.variants.append(toy.variant("compiled", compiled=True))
    three = [*toy.cases(Selection(None, (8, 5))), dataclasses.replace(toy.cases(Selection())[0], timed=False)]
    three = [dataclasses.replace(case, base=("plain", "compiled")) for case in three]
    three.append(dataclasses.replace(three[1], family="huge", large=True))
    (case,) = suites.quick(three)
    assert (
        case.length == 5 and [v.name for v in case.variants] == ["plain", "dual"] and case.base == ("plain",)
    )
    assert len(run_case(case, environment()).rows) == 2


# ------------------------------------------------------------------------------------------------ installed peers
def test_an_installed_peer_takes_the_place_of_attention(monkeypatch):
    calls = []

    class JVPAttn:
        @staticmethod
        def fwd_dual(q, k, v, attn_mask=None, causal=False, sm_scale=None):
            calls.append((tuple(k.shape), attn_mask, causal, sm_scale))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=sm_scale)

    module = types.ModuleType("jvp_flash_attention.jvp_attention")
    module.JVPAttn = JVPAttn
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
    assert peers.device_peers() == ()
    monkeypatch.setitem(sys.modules, "jvp_flash_attention", types.ModuleType("jvp_flash_attention"))
    monkeypatch.setitem(sys.modules, "jvp_flash_attention.jvp_attention", module)
    attention = torch.nn.functional.scaled_dot_product_attention
    with peers.JVPFlashAttention():
        out = attention(q, k, k, is_causal=True, enable_gqa=True)
    assert calls == [((1, 4, 5, 8), None, True, None)]
    torch.testing.assert_close(out, expected)
