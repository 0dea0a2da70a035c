"""Faults of scripts/mutate.py: where they are found, and that a fault in a process that runs already is one."""

from __future__ import annotations

import itertools
import json
import os
import sys
import textwrap

import pytest
from test_packaging import ROOT, load_script

PYTHON = """
def total(x, out, *, scale):
    if x.stride(0) > 1 and scale:
        raise ValueError(f"strides must be 1, got {x.stride(0) - 1}")
    mean = [y.detach() - scale for y in x]
    out += x.sum(-1) * scale
    out.copy(x.stride(0), x.stride(1))
    write(out)
    return lambda y: -y
"""

CPP = """
// a - b stands in no code
#include <a - b>
int x_stride, y_stride;
void f(int n) {
  for (int i = 0; i < n; ++i) sum += x[i] * weight.at(i) + shift;
  if (n) std::fill(out, out + n, 0.0f);
  copy(x_stride, y_stride);
}
"""


@pytest.fixture(scope="module")
def mutate():
    return load_script("mutate")


@pytest.fixture
def sites(mutate, tmp_path):
    def of(name, source):
        (tmp_path / name).write_text(source)
        return mutate.sites_of(tmp_path, name)

    return of


def test_faults_of_python(sites):
    edits = {(site.kind, site.before, site.after) for site in sites("a.py", PYTHON)}
    assert edits == {
        ("branch", "x.stride(0) > 1 and scale", "((x.stride(0) > 1) or (scale))"),
        ("edge", "x.stride(0) > 1", "x.stride(0) >= 1"),
        ("dropped term", "y.detach() - scale", "y.detach()"),
        ("graph", "y.detach()", "y"),
        ("overwritten sum", "out += x.sum(-1) * scale", "out = x.sum(-1) * scale"),
        ("dropped factor", "x.sum(-1) * scale", "x.sum(-1)"),
        ("wrong axis", "-1", "-2"),
        ("swapped stride", "x.stride(0), x.stride(1)", "x.stride(1), x.stride(0)"),
        ("lost row", "write(out)", "pass"),
        ("sign", "-y", "y"),
    }


def test_faults_of_cpp(sites):
    edits = {(site.kind, site.before, site.after) for site in sites("a.cpp", CPP)}
    assert edits == {
        ("edge", " < ", " <= "),
        ("overwritten sum", " += ", " = "),
        ("dropped factor", " * weight.at(i)", ""),
        ("dropped term", " + shift", ""),
        ("dropped term", " + n", ""),
        ("branch", "if (", "if (!"),
        ("stale buffer", "std::fill(out, out + n, 0.0f);", ";"),
        ("swapped stride", "x_stride, y_stride", "y_stride, x_stride"),
    }


def test_a_fault_keeps_its_name_when_lines_move(sites, tmp_path):
    names = [site.name for site in sites("a.py", PYTHON)]
    assert len(set(names)) == len(names)
    assert [site.name for site in sites("a.py", "import torch\n" + PYTHON)] == names
    for site in sites("a.py", PYTHON):
        compile(site.put(tmp_path), "a.py", "exec")


def test_a_fault_knows_its_function(sites, tmp_path):
    source = "x = 1 + a\n@wrap\ndef f(y=1 + b):\n    g = lambda z: z + c\n    return y + d\n"
    lines = {site.after: site.function(tmp_path) for site in sites("a.py", source)}
    assert lines == {"1": 0, "z": 4, "y": 2}


def test_the_draw_is_of_each_room_and_takes_kinds_in_turn(mutate):
    """At least 400 faults to draw from; another one leaves the others in their order."""
    total = 0
    for room in mutate.ROOMS.values():
        drawn = list(mutate.drawn(room, ROOT))
        total += len(drawn)
        assert len(drawn) >= mutate.DRAWN, room.name
        kinds = {site.kind for site in drawn}
        assert {site.kind for site in drawn[: len(kinds)]} == kinds
    assert total >= 400


def test_rows_are_counted_by_the_draw(mutate, monkeypatch, tmp_path):
    """One that does not compile is replaced by the next; a row of no fault of today's sources does not count."""
    room = mutate.ROOMS["rules"]
    names = [site.name for site in itertools.islice(mutate.drawn(room, ROOT), 3)]
    states = zip([*names, "gone"], ["killed", "invalid", "survived", "killed"])
    rows = [json.dumps({"fault": name, "state": state, "by": ""}) + "\n" for name, state in states]
    monkeypatch.setattr(mutate, "ROWS", tmp_path / "rows.jsonl")
    mutate.ROWS.write_text("".join(rows))
    counted, faults = mutate.states(room)
    assert counted == {"killed": 1, "survived": 1, "not tried": mutate.DRAWN - 2} and faults > mutate.DRAWN


def test_a_fault_in_a_process_that_runs_already(request, tmp_path, mutate):
    """The tests that call the function fail; without a fault, and where another one is at fault, they pass."""
    package = tmp_path / "aajr_kernels"
    package.mkdir()
    (package / "__init__.py").touch()
    source = textwrap.dedent(
        """
        import functools
        LIMIT = 1 + 1

        def wrapped(f):
            @functools.wraps(f)
            def g(x):
                return f(x) + 1
            return g

        @wrapped
        def double(x):
            return 2 * x

        class A:
            def half(self, x):
                return x / 2
        """
    )
    (package / "toy.py").write_text(source)
    (tmp_path / "test_toy.py").write_text(
        "from aajr_kernels.toy import A, double\n"
        "def test_double(tmp_path): assert double(2) == 5\n"
        "def test_half(): assert A().half(4) == 2\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT / 'scripts'}"}
    command = [sys.executable, "-m", "pytest", "-p", "mutation.worker", "-s", "-p", "no:cacheprovider"]
    trial = sys.modules["mutation.trial"]
    worker = trial.Worker([*command, "test_toy.py"], tmp_path, environment)
    request.addfinalizer(worker.close)
    tests = ["test_toy.py::test_double", "test_toy.py::test_half"]
    assert worker.ready["tests"] == tests

    def failed(before="", after=""):
        folder = tmp_path / "run"
        fault = dict(path=str(package / "toy.py"), source=source, faulty=source.replace(before, after))
        asked = dict(tests=tests, folder=str(folder), limit=20) | (fault if before else {})
        status = worker.ask(asked)["status"]
        return (folder / "failed").read_text().split("\n")[0] if (folder / "failed").exists() else status

    assert failed() == 0
    assert failed("2 * x", "2") == tests[0]
    assert failed("f(x) + 1", "f(x)") == tests[0]
    assert failed("x / 2", "x") == tests[1]
    assert failed("1 + 1", "1") == trial.ALREADY_RUN
    assert failed("x / 2", "x") == tests[1]
    assert failed() == 0
    worker.ask(dict(tests=tests, folder=str(tmp_path / "run"), limit=20, trace=str(tmp_path / "trace")))
    calls = trial.json.loads((tmp_path / "trace").read_text())
    assert calls[tests[0]][1] == ["aajr_kernels/toy.py:11", "aajr_kernels/toy.py:6"]
    assert calls[tests[1]][1] == ["aajr_kernels/toy.py:16"]
    imported = [name for name in worker.ready["imported"] if "toy" in name]
    assert imported == ["aajr_kernels/toy.py:1", "aajr_kernels/toy.py:15", "aajr_kernels/toy.py:5"]
