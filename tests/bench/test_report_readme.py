"""README's table, figures and pictures are what the committed rows say."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("plotly")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
import benchmark_rows
from PIL import Image

from bench import Row, plot, read_rows
from bench.plot import latest, plot_errors, plot_steps
from bench.report import __main__ as report
from bench.report.readme import BEGIN, END
from common.command import application

README = report.ROOT / "README.md"
RESULTS = sorted((report.ROOT / "bench" / "results").glob("*.jsonl"))
IMAGES = report.ROOT / "docs" / "images"


def invoke(*arguments: object, exit_code: int = 0) -> str:
    result = CliRunner().invoke(application(report.report), [*map(str, arguments)])
    assert result.exit_code == exit_code, result.output
    return " ".join(result.output.split())


# -------------------------------------------------------------------------------------------- what is committed
def test_the_table_is_the_one_that_the_rows_give(tmp_path):
    copy = Path(shutil.copy(README, tmp_path))
    rows = [option for path in RESULTS for option in ("--rows", path)]
    assert "README.md: unchanged" in invoke(*rows, "--out", tmp_path / "page.html", "--readme", copy)
    assert copy.read_text() == README.read_text()


def test_every_number_of_the_table_is_in_the_rows_it_names():
    """Without the code that writes the table: its last column leads to lines that say the same."""
    lines = README.read_text().partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    head, _, *body = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
    first = head.index("S")
    assert len(body) >= 4
    for cells in body:
        named = []
        for label, file in re.findall(r"\[(.+?)\]\((.+?)\)", cells[-1]):
            text = (report.ROOT / file).read_text().splitlines()
            for part in label.split(" ", 1)[1].split(", "):
                a, _, b = part.partition("–")
                named += [json.loads(text[n - 1]) for n in range(int(a), int(b or a) + 1)]
        numbers = [cell for cell in cells[first + 1 : -1] if cell != "–"]
        assert sorted(numbers) == sorted(f"{row['ratio']:.2f}" for row in named)
        assert {row["length"] for row in named} == {int(cells[first])}
        assert all(row["dtype"] in cells[0] and row["suite"] == "step" for row in named)
        by_variant = {row["variant"]: f"{row['ratio']:.2f}" for row in named}
        assert cells[head.index("exact, after `fuse`")] == by_variant["exact, fused"]
        assert cells[head.index("plain step")] == by_variant[named[0]["base"]] == "1.00"


@pytest.mark.parametrize(("name", "draw"), [("steps.png", plot_steps), ("errors.png", plot_errors)])
def test_the_pictures_are_drawn_from_these_rows(name, draw, tmp_path):
    """By the fingerprint of the rows in them: pixels depend on the version of matplotlib."""
    draw([row for path in RESULTS for row in read_rows(path)], tmp_path / name)
    with Image.open(tmp_path / name) as now, Image.open(IMAGES / name) as committed:
        assert now.text["Source"] == committed.text["Source"], "make figures"
        assert now.text["Source"].startswith("rows ")
    assert f"](docs/images/{name})" in README.read_text()


def prose() -> str:
    section = README.read_text().partition("## What it costs")[2].partition("\n## ")[0]
    return " ".join(section.split())


def found(**wanted: object) -> list[Row]:
    """Of the processor that the text speaks of."""
    rows = latest([row for path in RESULTS for row in read_rows(path)])
    wanted = {"device": "cpu", "torch_capability": "AVX2"} | wanted
    chosen = [r for r in rows if all(getattr(r, name) == value for name, value in wanted.items())]
    assert chosen, wanted
    return chosen


def only(**wanted: object) -> Row:
    (row,) = found(**wanted)
    return row


STEP = {"suite": "step", "dtype": "float32"}
#: a sentence of README -> its numbers as the rows give them
CLAIMS: dict[str, Callable[[], set[str]]] = {
    r"The gradient of the exact step differs from float64 by (\S+),": lambda: {
        f"{row.gradient_error:.0e}"
        for variant in ("exact", "exact, fused")
        for row in found(**STEP, variant=variant, base="plain")
    },
    r"that of finite differences by (\S+) \(S = 128": lambda: {
        f"{row.gradient_error:.0e}"
        for family in ("llama", "gpt2")
        for row in found(**STEP, family=family, variant="finite differences")
    },
    r"PyTorch's forward mode takes (\S+) times the plain Llama step at 512": lambda: {
        f"{only(**STEP, family='llama', variant='torch.func.jvp', length=512).ratio:.1f}"
    },
    r"at 512, double backward (\S+) times": lambda: {
        f"{only(**STEP, family='llama', variant='double backward', length=512).ratio:.1f}"
    },
    r"through GPT-2's layer norm, by (\S+) of the gradient": lambda: {
        f"{only(**STEP, family='gpt2', variant=variant, length=512).gradient_error:.1f}"
        for variant in ("torch.func.jvp", "double backward")
    },
    r"At S = 8192 the fused step peaks at (\S+) times the memory of the plain one": lambda: {
        f"{only(**STEP, family='memory', length=8192, variant='exact, fused').peak_ratio:.2f}"
    },
    r"Loss and penalty together cost what the penalty costs alone \((\S+) to (\S+)\)": lambda: {
        f"{row.ratio:.2f}" for row in found(**STEP, family="penalty", variant="loss and penalty")
    },
    r"four directions (\S+) to (\S+) times as much as one": lambda: {
        f"{row.ratio:.1f}" for row in found(**STEP, family="penalty", variant="four directions")
    },
    r"`fisher` metric the fused step is at (\S+), finite differences at (\S+)\.": lambda: {
        f"{only(**STEP, family='head', variant=variant).ratio:.2f}"
        for variant in ("exact, fused", "finite differences")
    },
    r"the Llama step at S = 512 takes (\S+) times the plain one, not (\S+),": lambda: beyond(
        suite="step", family="llama", length=512, variant="exact, fused"
    ),
    r"the Fisher head alone (\S+) times a plain head with its loss, not (\S+)\.": lambda: beyond(
        suite="head", family="fisher", variant="fisher"
    ),
}


def beyond(**wanted: object) -> set[str]:
    """A ratio and the bound that it misses."""
    row = only(dtype="float32", passed=False, **wanted)
    return {f"{row.ratio:.2f}", f"{row.bounds['ratio']:.1f}"}


@pytest.mark.parametrize("sentence", CLAIMS)
def test_every_figure_of_the_text_is_that_of_a_row(sentence):
    match = re.search(sentence, prose())
    assert match, f"README no longer says {sentence!r}: change the sentence here too."
    said = [str(float(text)) for text in match.groups()]
    assert sorted(said) == sorted({str(float(text)) for text in CLAIMS[sentence]()})


def test_the_other_figures_of_the_text():
    assert "the fused step takes a tenth of the plain one's time" in prose()
    for family in ("llama", "gpt2"):
        row = only(suite="step", dtype="bfloat16", family=family, variant="exact, fused")
        assert row.ratio is not None and f"{row.ratio:.1f}" == "0.1"
    assert "Of the bounds set there two are missed: the Llama step at S = 512" in prose()
    missed = {(row.suite, row.family, row.length) for row in found(passed=False)}
    assert missed == {("step", "llama", 512), ("head", "fisher", 512)}


# ------------------------------------------------------------------------------------------------ writing a table
def test_only_what_is_between_the_marks_changes(tmp_path):
    file = benchmark_rows.write(tmp_path / "rows.jsonl", benchmark_rows.several())
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter é\n", encoding="utf-8")
    options = ["--rows", file, "--out", tmp_path / "page.html", "--readme", readme]
    assert "README.md: new table" in invoke(*options)
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"before\n\n{BEGIN}\n| model | S |") and text.endswith(f"|\n{END}\n\nafter é\n")
    row = "| Llama, float32 | 512 | 1.00 | 1.36 | **1.74** | 1.98 | 3.81 | [rows 1–2, 4, 9, 14](rows.jsonl) |"
    assert row in text.splitlines() and "old" not in text
    assert "README.md: unchanged" in invoke(*options)


@pytest.mark.parametrize(
    "text",
    ["no marks", BEGIN, END, f"{END}\n{BEGIN}\n", f"{BEGIN}\n{BEGIN}\n{END}", 2 * (BEGIN + END)],
)
def test_files_without_one_pair_of_marks_are_left_alone(tmp_path, text):
    file = benchmark_rows.write(tmp_path / "rows.jsonl", benchmark_rows.several())
    readme = tmp_path / "README.md"
    readme.write_text(text)
    output = invoke("--rows", file, "--out", tmp_path / "page.html", "--readme", readme, exit_code=2)
    assert "README.md must have the lines" in output and readme.read_text() == text


def test_rows_without_steps_write_no_table_and_no_picture(tmp_path):
    lines = [benchmark_rows.fields(suite="norm", family="rms_norm")]
    options = [
        "--rows",
        benchmark_rows.write(tmp_path / "rows.jsonl", lines),
        "--out",
        tmp_path / "page.html",
    ]
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\nold\n{END}")
    assert "no row has the ratio of an exact, fused step" in invoke(*options, "--readme", readme, exit_code=2)
    assert readme.read_text() == f"{BEGIN}\nold\n{END}"
    assert "no row has the ratio of a step" in invoke(*options, "--images", tmp_path / "images", exit_code=2)


def test_pictures_hold_every_point_and_models_in_order(tmp_path, monkeypatch):
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
