"""`aajr bench` beside itself: files of rows, baselines, another commit; and cases that fail or are interrupted."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import types

import pytest
import torch
from cli.toy_bench import Toy, invoke

from aajr_kernels.cli import benchmarks
from aajr_kernels.cli.benchmarks import Selection, against, compare, peers, run_case
from aajr_kernels.cli.benchmarks import case as cases


@pytest.fixture
def rows(toy: Toy, tmp_path):
    file = tmp_path / "before.jsonl"
    invoke("toy", "--rows", file)
    return benchmarks.read_rows(file)


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


def test_a_ratio_is_compared_round_by_round_with_an_interval(rows):
    base, dual = rows
    assert base.round_ratios == [1.0] * 4 and len(dual.round_ratios) == 4
    (same,) = compare.compared(rows, rows)
    assert same.growth == 0 and not same.differs and not same.exceeds(0.0)
    (slower,) = compare.compared(rows, scaled(rows, 1.3, commit="another", torch="3.0"))
    assert slower.growth == pytest.approx(0.3) and slower.interval[0] <= 0.3 <= slower.interval[1]
    noisy = [dataclasses.replace(dual, round_ratios=[0.5, 1.0, 2.0, 4.0], ratio=1.5)]
    (unclear,) = compare.compared(noisy, scaled(noisy, 1.2))
    assert unclear.growth == pytest.approx(0.2) and not unclear.differs and not unclear.exceeds(0.15)
    (bare,) = compare.compared(
        [dataclasses.replace(dual, round_ratios=[])], [dataclasses.replace(dual, ratio=2 * dual.ratio)]
    )
    assert bare.interval is None and bare.growth == pytest.approx(1.0) and bare.exceeds(0.15)


def test_only_what_measures_the_same_is_compared(rows):
    for change in (
        {"length": 9},
        {"cpu": "another"},
        {"threads": 3},
        {"dtype": "bfloat16"},
        {"config": {"a": 2}},
    ):
        assert compare.compared(rows, [dataclasses.replace(row, **change) for row in rows]) == []


def test_compare_files(rows, tmp_path):
    a, b = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", scaled(rows, 1.4))
    text = invoke("--compare", a, b)
    assert "toy:only float32 8 dual" in text and "+40.0%" in text and "slower" in text
    c = write(tmp_path / "c.jsonl", [dataclasses.replace(row, length=1) for row in rows])
    assert "no ratio in common" in " ".join(invoke("--compare", a, c, exit_code=2).replace("│", "").split())
    invoke("--compare", a, tmp_path / "nothing.jsonl", exit_code=2)


def test_a_baseline_holds_until_a_ratio_grows(toy: Toy, tmp_path):
    folder = tmp_path / "baselines"
    text = " ".join(invoke("toy", "--baseline", folder, exit_code=2).replace("│", "").split())
    assert "for this kind of machine" in text and "--update" in text and not toy.calls
    assert "Baseline of 2 rows" in invoke("toy", "--baseline", folder, "--update")
    invoke("toy", "--baseline", folder)
    toy.variants[1] = toy.variant("dual", seconds=1.5 * 1.5)
    assert "Slower by more than 15%: toy:only float32 8 dual" in invoke(
        "toy", "--baseline", folder, exit_code=1
    )
    toy.variants = toy.variants[:1]
    assert "Without a number now: toy:only float32 8 dual" in invoke("toy", "--baseline", folder, exit_code=1)
    assert "goes with --baseline" in invoke("toy", "--update", exit_code=2)


def test_kinds_of_machines_have_names_of_their_own():
    facts = {
        "device_name": None,
        "cpu": "AMD EPYC",
        "machine": "x86_64",
        "torch_capability": "AVX2",
        "threads": 2,
    }
    assert compare.machine_kind(facts) == "amd-epyc-avx2-2"
    assert compare.machine_kind({**facts, "device_name": "NVIDIA H100"}) == "nvidia-h100-avx2-2"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 10 GB"),
        torch.OutOfMemoryError(),
    ],
)
@pytest.mark.parametrize("length", [3, 8])  # at the gate, and at full length
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
    found = {row.variant: row for row in benchmarks.read_rows(file)}
    assert "out of memory" in found["dual"].failure and found["dual"].ratio is None
    assert found["dual"].passed is False  # it has a bound, which was not shown to hold
    assert found["peer"].ratio and not found["peer"].failure
    invoke("toy", "--check", exit_code=1)


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
    suite = cases.Suite("toy", "a toy", ("only",), TwoCases(toy, error).cases)
    monkeypatch.setattr(benchmarks, "SUITES", {"toy": suite})
    file = tmp_path / "rows.jsonl"
    text = invoke("toy", "--rows", file, exit_code=code)
    lengths = {row.length for row in benchmarks.read_rows(file)}
    if code == 1:
        assert "OSError: no such library" in text and lengths == {8, 5}  # the others went on
    else:
        assert "Interrupted after 1 of 3 cases" in text and lengths == {8}


def test_quick_is_the_smallest_case_of_every_family_without_compilation(toy: Toy):
    toy.variants.append(toy.variant("compiled", compiled=True))
    three = [*toy.cases(Selection(None, (8, 5))), dataclasses.replace(toy.cases(Selection())[0], timed=False)]
    three = [dataclasses.replace(case, base=("plain", "compiled")) for case in three]
    three.append(dataclasses.replace(three[1], family="huge", large=True))
    (found,) = benchmarks.quick(three)
    assert (
        found.length == 5
        and [v.name for v in found.variants] == ["plain", "dual"]
        and found.base == ("plain",)
    )
    assert len(run_case(found, benchmarks.environment()).rows) == 2


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
    with (
        pytest.raises(ModuleNotFoundError, match="pip install jvp-flash-attention"),
        peers.jvp_flash_attention(),
    ):
        pass
    monkeypatch.setattr(peers, "installed", lambda name: True)
    monkeypatch.setitem(sys.modules, "jvp_flash_attention", types.ModuleType("jvp_flash_attention"))
    monkeypatch.setitem(sys.modules, "jvp_flash_attention.jvp_attention", module)
    attention = torch.nn.functional.scaled_dot_product_attention
    with peers.jvp_flash_attention(), pytest.raises(RuntimeError, match="CUDA devices alone"):
        attention(q, k, k)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with peers.jvp_flash_attention():
        found = attention(q, k, k, is_causal=True, enable_gqa=True)
    assert calls == [((1, 4, 5, 8), None, True, None)]
    torch.testing.assert_close(found, expected)


# ------------------------------------------------------------------------------------------------- another commit
def git(folder, *arguments):
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=folder, check=True)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository whose `aajr bench` writes one row with the ratio that a file of the commit names."""
    root = tmp_path / "repository"
    root.mkdir()
    git(root, "init", "-q")
    monkeypatch.setattr(against, "ROOT", root)
    return root


def test_another_commit_is_built_and_measured_in_turn(checkout, rows, monkeypatch, tmp_path):
    line = next(row for row in rows if row.variant == "dual").line()
    (checkout / "setup.py").write_text("open('built', 'w').write('yes')")
    package = checkout / "aajr_kernels"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(
        "import json, pathlib, sys\n"
        f"row = json.loads({line!r})\n"
        "factor = float(pathlib.Path('factor').read_text())\n"
        "row['ratio'] *= factor; row['round_ratios'] = [r * factor for r in row['round_ratios']]\n"
        "assert sys.argv[1:3] == ['bench', 'toy'] and sys.argv[-2] == '--rows'\n"
        "pathlib.Path(sys.argv[-1]).write_text(json.dumps(row) + '\\n')\n"
    )
    for factor in ("1.0", "2.0"):
        (checkout / "factor").write_text(factor)
        git(checkout, "add", "-A")
        git(checkout, "commit", "-qm", factor)
    told = []
    before, now = against.measure_both("HEAD~1", ["toy"], told.append)
    (change,) = compare.compared(before, now)
    assert change.growth == pytest.approx(1.0) and len(now[0].round_ratios) == 8  # two turns of four rounds
    assert [text.split(",")[0] for text in told[1:]] == ["this code", "HEAD~1", "HEAD~1", "this code"]
    listed = subprocess.run(
        ["git", "worktree", "list"], cwd=checkout, capture_output=True, text=True, check=True
    )
    assert len(listed.stdout.splitlines()) == 1  # the worktree is gone


def test_what_cannot_be_compared_against_says_why(checkout):
    (checkout / "setup.py").write_text("raise SystemExit('no compiler likes this')")
    git(checkout, "add", "-A")
    git(checkout, "commit", "-qm", "one")
    with pytest.raises(against.Failed, match="finding commit 'no-such'"):
        against.measure_both("no-such", [], lambda text: None)
    with pytest.raises(against.Failed, match="building the other commit failed:\nno compiler likes this"):
        against.measure_both("HEAD", [], lambda text: None)
