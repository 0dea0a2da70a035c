"""`python -m bench.report`: rows on the terminal, tables and pictures of a checkout; errors."""

from __future__ import annotations

import json

import benchmark_rows
import pytest
from typer.testing import CliRunner

from bench import report
from common.command import application


def invoke(*arguments: object, exit_code: int = 0) -> str:
    result = CliRunner().invoke(application(report.report), [*map(str, arguments)])
    assert result.exit_code == exit_code, result.output
    return " ".join(result.output.split())


def test_the_terminal_has_the_last_row_of_every_variant(tmp_path):
    file = benchmark_rows.write(tmp_path / "rows.jsonl", benchmark_rows.several())
    text = invoke("--rows", file)
    newest = report.latest(report.read([file], tmp_path))
    assert len(newest) < len(benchmark_rows.several())
    for row, *_ in newest:
        assert f"{row.suite}:{row.family} {row.dtype} {row.length}" in text
        assert row.ratio is None or f"{row.ratio:.2f}" in text
    assert (
        "Some CPU, AVX2, 2 threads, torch 2.13.0" in text and "1.36" in text and "finite differences" in text
    )


def test_the_checkout_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    begin, end = report.marks("step costs")
    (tmp_path / "docs" / "images").mkdir(parents=True)
    (tmp_path / "README.md").write_text(f"{begin}\n{end}\n")
    config = {"suite": "method", "family": "context", "length": 2048}
    context = benchmark_rows.fields(**config, variant="with penalty, shared context", ratio=0.6)
    file = benchmark_rows.write(tmp_path / "rows.jsonl", [*benchmark_rows.several(), context])
    options = ["--rows", file, "--write", tmp_path]
    assert "README.md: new table" in invoke(*options)
    assert {path.name for path in (tmp_path / "docs" / "images").iterdir()} == set(report.PICTURES.values())
    assert "new table" not in invoke(*options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n \n", "rows.jsonl holds no rows"),
        (
            "{}",
            "line 1: a row must have exactly the fields of Row; missing or unknown: aajr_kernels, allocator",
        ),
        (json.dumps(benchmark_rows.PLAIN) + "\n{torn", "rows.jsonl, line 2: Expecting property name"),
    ],
)
def test_files_that_are_no_rows(tmp_path, content, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    output = invoke("--rows", file, exit_code=2)
    assert message in output and output.count("error:") == 1


def test_files_that_cannot_be_read_or_written(tmp_path, monkeypatch):
    assert "none.jsonl: No such file or directory." in invoke("--rows", tmp_path / "none.jsonl", exit_code=2)
    assert "Is a directory." in invoke("--rows", tmp_path, exit_code=2)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert "the folder of results holds no rows" in invoke(exit_code=2)
