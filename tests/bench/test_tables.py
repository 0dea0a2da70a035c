"""The tables and pictures are those that the committed rows give."""

from __future__ import annotations

import itertools
import json
import re

import benchmark_rows
import pytest

from bench import plot, report
from bench.plot import plot_errors, plot_steps
from bench.report import ROOT
from bench.row import read_rows
from bench.suites.memory import LENGTHS, WAYS

RESULTS = sorted((ROOT / "bench" / "results").glob("*.jsonl"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(scope="module")
def entries() -> list[report.Entry]:
    return report.read(RESULTS, ROOT)


@pytest.mark.parametrize("name", report.TABLES)
def test_the_table_is_the_one_that_the_rows_give(name, entries):
    first, last = report.marks(name)
    pages = [path for path in PAGES if first in path.read_text()]
    assert len(pages) == {"savings": 2}.get(name, 1)
    for page in pages:
        prefix = "../" * (len(page.relative_to(ROOT).parts) - 1)
        text = page.read_text()
        assert text.partition(first)[2].partition(last)[0].strip() == report.TABLES[name](entries, prefix)


@pytest.mark.parametrize(("name", "field"), [("step costs", "ratio"), ("memory", "peak_ratio")])
def test_every_number_is_in_the_rows_that_its_line_names(name, field, entries):
    """Without the code that finds the rows: the last column leads to lines that hold the same numbers."""
    _, _, *body = report.TABLES[name](entries, "").splitlines()
    assert len(body) >= 4
    for line in body:
        named = []
        for label, file in re.findall(r"\[([^]]+)\]\((.+?)\)", line):
            text = (ROOT / file).read_text().splitlines()
            for part in label.split(" ", 1)[1].split(", "):
                a, _, b = part.partition("–")
                named += [json.loads(text[n - 1]) for n in range(int(a), int(b or a) + 1)]
        numbers = re.findall(r"\b\d+\.\d\d\b", line.rpartition(" | ")[0])
        expected = [f"{r[field]:.2f}" for r in named if name != "memory" or r["variant"] != r["base"]]
        assert sorted(numbers) == sorted(expected)
        assert all(f"{r['peak_bytes'] / 1e6:,.0f} MB" in line for r in named if name == "memory")
        assert len({r["length"] for r in named}) == 1 and f" {named[0]['length']} |" in line


def test_what_is_saved_is_in_the_rows_that_its_line_names(entries):
    _, _, *body = report.savings(entries, "").splitlines()
    assert len(body) >= 2
    for line in body:
        _, _, parts, ratios, links, _ = line.split("|")
        (label,) = re.findall(r"\[cpu ([^]]+)\]\(bench/results/cpu.jsonl\)", links)
        text = (ROOT / "bench" / "results" / "cpu.jsonl").read_text().splitlines()
        named = []
        for span in label.split(", "):
            a, _, b = span.partition("–")
            named += [json.loads(text[n - 1]) for n in range(int(a), int(b or a) + 1)]
        assert sorted(f"{row['ratio']:.2f}" for row in named) == sorted(ratios.strip().split(", "))
        assert len(parts.split(", ")) == len(named) and all(row["passed"] is not False for row in named)


def test_every_way_to_save_memory_does_and_memory_is_linear_in_the_length(entries):
    rows = {
        (r.length, r.variant): r.peak_bytes or 0 for r, *_ in report.latest(entries) if r.suite == "memory"
    }
    for name in WAYS:
        peaks = [rows[length, name] for length in LENGTHS]
        assert all(b / a < 2.05 for a, b in itertools.pairwise(peaks)), (name, peaks)
        if name.startswith("exact,") and name != "exact, fused":
            assert all(rows[length, name] < rows[length, "exact, fused"] for length in LENGTHS)


@pytest.mark.parametrize(("draw", "name"), report.PICTURES.items())
def test_the_pictures_are_drawn_from_these_rows(name, draw, tmp_path):
    """By the fingerprint of the rows in them: pixels depend on the version of matplotlib."""
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    draw([row for path in RESULTS for row in read_rows(path)], tmp_path / name)
    with image.open(tmp_path / name) as now, image.open(ROOT / "docs" / "images" / name) as committed:
        assert now.text["Source"] == committed.text["Source"], "make figures"
        assert now.text["Source"].startswith("rows ")


# ------------------------------------------------------------------------------------------------ writing a table
def write(page, root, lines):
    rows = benchmark_rows.write(root / "rows.jsonl", lines)
    return report.rewrite(page, root, report.read([rows], root))


def test_only_what_is_between_the_marks_changes(tmp_path):
    begin, end = report.marks("step costs")
    page = tmp_path / "README.md"
    page.write_text(f"before\n\n{begin}\nold\n{end}\n\nafter é\n", encoding="utf-8")
    assert write(page, tmp_path, benchmark_rows.several())
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"before\n\n{begin}\n| model | S |") and text.endswith(f"|\n{end}\n\nafter é\n")
    line = (
        "| Llama, float32 | 512 | 1.00 | 1.36 | **1.74** | 1.98 | 3.81 | [rows 1–2, 4, 9, 14](rows.jsonl) |"
    )
    assert line in text.splitlines() and "old" not in text
    assert not write(page, tmp_path, benchmark_rows.several())


def test_peaks_of_a_page_in_a_folder(tmp_path):
    begin, end = report.marks("memory")
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(f"{begin}\n{end}\n")
    peaks = {"plain": (200_000_000, 1.0), "exact, recomputed": (1_300_000_000, 6.5)}
    lines = [
        benchmark_rows.fields(suite="memory", variant=variant, peak_bytes=peak, peak_ratio=ratio)
        for variant, (peak, ratio) in peaks.items()
    ]
    assert write(page, tmp_path, lines)
    line = "| 512 | 200 MB | 1,300 MB (6.50) | [rows 1–2](../rows.jsonl) |"
    assert line in page.read_text().splitlines()


BEGIN, END = report.marks("step costs")


@pytest.mark.parametrize(
    "text", [BEGIN, END, f"{END}\n{BEGIN}\n", f"{BEGIN}\n{BEGIN}\n{END}", 2 * (BEGIN + END)]
)
def test_files_without_one_pair_of_marks_are_left_alone(tmp_path, text):
    page = tmp_path / "README.md"
    page.write_text(text)
    with pytest.raises(ValueError, match=r"README\.md must have the lines"):
        write(page, tmp_path, benchmark_rows.several())
    assert page.read_text() == text


def test_rows_without_steps_write_no_table(tmp_path):
    entries = [report.Entry(benchmark_rows.row(suite="norm", family="rms_norm"), "rows.jsonl", 1)]
    for table, message in (
        (report.costs, "exact, fused step"),
        (report.peaks, "python -m bench memory"),
        (report.savings, "leaves something out"),
    ):
        with pytest.raises(ValueError, match=message):
            table(entries, "")


# ------------------------------------------------------------------------------------------------------- pictures
def test_pictures_hold_every_point_and_models_in_order(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(plot, "_save", lambda figure, axes, *rest: drawn.extend(axes))
    rows = [
        benchmark_rows.row(config={"model": model}, variant=variant, ratio=ratio * high, length=n)
        for high, model in enumerate(("bert-base", "llama", "unheard-of", "llama-tiny", "gpt2"), start=1)
        for variant, ratio in (("plain", 1 / high), ("exact", 2.0))
        for n in (64, 128)
    ]
    plot_steps(rows, tmp_path / "steps.png")
    shown = [axis for axis in drawn if axis.has_data()]
    titles = [axis.get_title().removesuffix(" float32 AVX2") for axis in shown]
    assert titles == ["Llama tiny", "Llama", "GPT-2", "BERT base", "unheard of"]
    for axis in shown:
        low, high = axis.get_ylim()
        assert low == 0.0 and all(max(line.get_ydata()) < high for line in axis.get_lines())


def test_pictures_of_odd_rows(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        benchmark_rows.row(variant=variant, ratio=ratio, gradient_error=error, dtype=dtype, length=64)
        for dtype in ("float32", "float64")
        for variant, ratio, error in (
            ("plain", 1.0, 0.0),
            ("brand new", 2.0, 1e-9),
            ("odd", float("nan"), None),
        )
    ]
    plot_steps(rows, tmp_path / "steps.png")
    plot_errors(rows, tmp_path / "errors.svg")
    assert (tmp_path / "errors.svg").read_text().count("float64") == 1  # the title of its panel, as a comment
    with pytest.raises(ValueError, match="no row has the gradient error"):
        plot_errors([benchmark_rows.row(gradient_error=None)], tmp_path / "none.png")
