"""The table of docs/trust.md: what a run counted, and that page and rows agree."""

from __future__ import annotations

import json
import shutil

import pytest
from test_packaging import load_script

from common.trust import VARIABLE, count, totals


@pytest.fixture
def trust():
    return load_script("trust")


@pytest.fixture
def counts(monkeypatch, tmp_path):
    file = tmp_path / "counts.jsonl"
    monkeypatch.setenv(VARIABLE, str(file))
    return file


def row(**changed):
    base = dict(name="a", kind="Fuzzing", promise="p", tested="t", command="make test", figures={}, commit="")
    return base | changed


def committed(trust, monkeypatch, tmp_path, *rows):
    """Rows and a page of a test's own."""
    monkeypatch.setattr(trust, "ROWS", tmp_path / "rows.jsonl")
    monkeypatch.setattr(trust, "PAGE", tmp_path / "trust.md")
    trust.ROWS.write_text("".join(json.dumps(one) + "\n" for one in rows))
    trust.PAGE.write_text(f"# Trust\n\n{trust.BEGIN}\n{trust.END}\n")


def test_the_table_is_that_of_its_rows(trust, tmp_path):
    rows, copy = trust.read(), tmp_path / "trust.md"
    shutil.copy(trust.PAGE, copy)
    assert not trust.write(copy, rows)
    assert trust.write(copy, []) and trust.write(copy, rows)
    for one in rows:
        assert one["figures"] and one["commit"], one["name"]
        assert not one["commit"].endswith("+"), f"{one['name']}: the figure is that of no commit"
        assert not any(number for unit, number in one["figures"].items() if unit in ("failures", "survived"))


def test_counts_are_added_up_and_fractions_compared(counts):
    count("a", examples=3, slope=0.5)
    count("a", examples=4, slope=0.25)
    count("b", calls=0)
    assert totals(counts) == {"a": {"examples": 7, "slope": 0.5}, "b": {"calls": 0}}


def test_nothing_is_written_unless_a_run_asks_for_it(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    count("a", examples=3)
    assert list(tmp_path.iterdir()) == []


def test_a_green_run_writes_its_figures(trust, monkeypatch, tmp_path):
    program = "from common.trust import count; count('a', examples=1200)"
    command = f'python -c "{program}"'
    committed(trust, monkeypatch, tmp_path, row(command=command), row(name="b"))
    trust.refresh(["a"])
    first, second = trust.read()
    assert first["figures"] == {"examples": 1200} and first["commit"] and second["figures"] == {}
    trust.write(trust.PAGE, trust.read())
    assert "| 1,200 examples |" in trust.PAGE.read_text() and "| b |" not in trust.PAGE.read_text()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ('python -c "raise SystemExit(3)"', "nothing was written: .* failed"),
        ('python -c "pass"', "counted nothing for a"),
    ],
)
def test_a_failed_or_silent_run_writes_nothing(trust, monkeypatch, tmp_path, command, message):
    committed(trust, monkeypatch, tmp_path, row(command=command, figures={"examples": 5}, commit="abc"))
    before = trust.ROWS.read_text()
    with pytest.raises(SystemExit, match=message):
        trust.refresh(["a"])
    assert trust.ROWS.read_text() == before


def test_an_unknown_name_is_an_error(trust, monkeypatch, tmp_path):
    committed(trust, monkeypatch, tmp_path, row())
    with pytest.raises(SystemExit, match="no row is named x: choose from a"):
        trust.refresh(["x"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"name": "a"}], "must have the fields name, kind"),
        ([row(kind="Luck")], "kind must be one of Fuzzing"),
        ([row(), row()], "a name of its own"),
    ],
)
def test_rows_are_checked(trust, monkeypatch, tmp_path, rows, message):
    committed(trust, monkeypatch, tmp_path, *rows)
    with pytest.raises(ValueError, match=message):
        trust.read()
