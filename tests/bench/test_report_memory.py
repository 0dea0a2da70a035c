"""The table of docs/memory.md is what the committed rows say."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path

import benchmark_rows
import pytest

from bench.report import __main__ as report
from bench.report import memory, sources
from bench.suites.memory import LENGTHS, WAYS

PAGE = report.ROOT / "docs" / "memory.md"
RESULTS = sorted((report.ROOT / "bench" / "results").glob("*.jsonl"))


def table() -> list[list[str]]:
    lines = PAGE.read_text().partition(memory.BEGIN)[2].partition(memory.END)[0].strip().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_is_the_one_that_the_rows_give(tmp_path):
    copy = Path(shutil.copy(PAGE, tmp_path))
    assert memory.rewrite(copy, sources.read(RESULTS, report.ROOT)) is False
    assert copy.read_text() == PAGE.read_text()


def test_every_number_of_the_table_is_in_the_rows_it_names():
    """Without the code that writes the table: its last column leads to lines that say the same."""
    head, _, *body = table()
    assert head[1:-1] == [memory.HEADINGS[name] for name in WAYS] and body
    assert [int(cells[0]) for cells in body] == list(LENGTHS)
    for cells in body:
        ((label, file),) = re.findall(r"\[(.+?)\]\((.+?)\)", cells[-1])
        text = (PAGE.parent / file).read_text().splitlines()
        numbers = []
        for part in label.split(" ", 1)[1].split(", "):
            a, _, b = part.partition("–")
            numbers += range(int(a), int(b or a) + 1)
        rows = [json.loads(text[n - 1]) for n in numbers]
        assert {(r["suite"], r["length"], r["base"]) for r in rows} == {("memory", int(cells[0]), "plain")}
        sizes = {r["variant"]: f"{r['peak_bytes'] / 1e6:,.0f} MB" for r in rows}
        assert [cell.partition(" (")[0] for cell in cells[1:-1]] == [sizes[name] for name in WAYS]
        for name, cell in list(zip(WAYS, cells[1:-1]))[1:]:
            ratio = next(r["peak_ratio"] for r in rows if r["variant"] == name)
            assert cell.endswith(f"({ratio:.2f})")


def test_what_is_there_to_say_is_true_of_the_rows():
    """Each way needs less than the penalty by itself, at every length."""
    for line in memory.lines(sources.read(RESULTS, report.ROOT)):
        peaks = {name: entry.row.peak_bytes or 0 for name, entry in line.items()}
        for name in ("exact, recomputed", "exact, checkpointed", "exact, offloaded"):
            assert peaks[name] < peaks["exact, fused"], line["plain"].where


def test_memory_is_linear_in_the_length():
    """Twice the length, twice the memory: nothing of the size of queries times keys is kept."""
    lines = memory.lines(sources.read(RESULTS, report.ROOT))
    assert len(lines) == len(LENGTHS)
    for name in WAYS:
        peaks = [line[name].row.peak_bytes or 0 for line in lines]
        assert all(b / a < 2.05 for a, b in itertools.pairwise(peaks)), (name, peaks)


def test_only_what_is_between_the_marks_changes(tmp_path):
    fields = benchmark_rows.fields(suite="memory", peak_bytes=200_000_000, peak_ratio=1.0)
    more = benchmark_rows.fields(
        suite="memory", variant="exact, recomputed", peak_bytes=1_300_000_000, peak_ratio=6.5
    )
    file = benchmark_rows.write(tmp_path / "rows.jsonl", [fields, more])
    page = tmp_path / "page.md"
    page.write_text(f"before\n{memory.BEGIN}\nold\n{memory.END}\nafter\n")
    entries = sources.read([file], tmp_path)
    assert memory.rewrite(page, entries) is True and memory.rewrite(page, entries) is False
    line = "| 512 | 200 MB | 1,300 MB (6.50) | [rows 1–2](../rows.jsonl) |"
    assert line in page.read_text().splitlines() and "old" not in page.read_text()
    assert page.read_text().startswith("before\n") and page.read_text().endswith("\nafter\n")
    page.write_text("no marks")
    with pytest.raises(ValueError, match="must have the lines"):
        memory.rewrite(page, entries)
    with pytest.raises(ValueError, match="python -m bench memory"):
        memory.rewrite(page, [])
