"""`python -m bench.report`: the page holds every row and nothing from elsewhere; errors."""

from __future__ import annotations

import json
import re

import benchmark_rows
import pytest
from typer.testing import CliRunner

pytest.importorskip("plotly")

from bench import report, tables
from common.command import application


def invoke(*arguments: object, exit_code: int = 0) -> str:
    result = CliRunner().invoke(application(report.report), [*map(str, arguments)])
    assert result.exit_code == exit_code, result.output
    return " ".join(result.output.split())


def entries(*lines: dict) -> list[tables.Entry]:
    rows = [benchmark_rows.row(**line) for line in lines]
    return [tables.Entry(row, "rows.jsonl", n) for n, row in enumerate(rows, start=1)]


def visible(plot) -> dict[str, list[float]]:
    return {trace.name: list(trace.y) for trace in plot.data if trace.visible}


def test_a_plot_of_lines_and_its_menu():
    group = [e for e in entries(*benchmark_rows.several()) if e.row.suite == "step" and e.row.ratio]
    plot = report.figure("title", tables.latest(group), report.colours({e.row.variant for e in group}))
    lines = visible(plot)
    assert lines["exact"] == pytest.approx([1.36, 1.51])
    assert lines["exact, fused"] == pytest.approx([1.74, 1.82])  # the repetition counts, not the first
    assert {t.customdata for t in plot.data if t.visible and t.name == "exact, fused"} == {
        ("rows.jsonl:14", "rows.jsonl:7")
    }
    menu = {button.label: button.args for button in plot.layout.updatemenus[0].buttons}
    assert list(menu) == ["time ÷ base", "minimum, ms", "gradient error"]
    where, axis = menu["gradient error"]
    shown = [t for t, on in zip(plot.data, where["visible"]) if on]
    assert {t.name: list(t.y) for t in shown}["finite differences"] == [9e-4, 9e-4]
    assert axis["yaxis.type"] == "log" and menu["time ÷ base"][1]["yaxis.type"] == "linear"


def test_one_length_gives_bars_and_no_number_no_plot():
    group = entries({"variant": "<b>bold", "ratio": 2.5}, {"variant": "odd", "ratio": float("nan")})
    plot = report.figure("title", group, {"<b>bold": "#000000", "odd": "#000000"})
    assert plot.data[0].type == "bar" and visible(plot) == {"&lt;b&gt;bold": [2.5]}
    nothing = dict.fromkeys(("ratio", "min_ms", "gradient_error"))
    assert report.figure("title", entries({**nothing, "failure": "out of memory"}), {}) is None


def test_the_page_has_every_case_and_fetches_nothing(tmp_path):
    lines = [*benchmark_rows.several(), benchmark_rows.fields(failure="<script>out of memory")]
    file = benchmark_rows.write(tmp_path / "rows.jsonl", lines)
    assert f"{len(lines)} rows" in invoke("--rows", file, "--out", tmp_path / "deep" / "page.html")
    text = (tmp_path / "deep" / "page.html").read_text(encoding="utf-8")
    assert text.count("Plotly.newPlot(") == 3 and "&lt;script&gt;out of memory" in text
    assert not re.search(r'<(script|link|img)[^>]*(src|href)="(?!data:)', text)


def test_the_checkout_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    begin, end = tables.marks("step costs")
    (tmp_path / "docs" / "images").mkdir(parents=True)
    (tmp_path / "README.md").write_text(f"{begin}\n{end}\n")
    file = benchmark_rows.write(tmp_path / "rows.jsonl", benchmark_rows.several())
    options = ["--rows", file, "--out", tmp_path / "page.html", "--write", tmp_path]
    assert "README.md: new table" in invoke(*options)
    assert {path.name for path in (tmp_path / "docs" / "images").iterdir()} == {"steps.png", "errors.png"}
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
    output = invoke("--rows", file, "--out", tmp_path / "page.html", exit_code=2)
    assert message in output and output.count("error:") == 1
    assert not (tmp_path / "page.html").exists()


def test_files_that_cannot_be_read_or_written(tmp_path, monkeypatch):
    assert "none.jsonl: No such file or directory." in invoke("--rows", tmp_path / "none.jsonl", exit_code=2)
    file = benchmark_rows.write(tmp_path / "rows.jsonl", benchmark_rows.several())
    assert "Is a directory." in invoke("--rows", file, "--out", tmp_path, exit_code=2)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert "the folder of results holds no rows" in invoke(exit_code=2)
