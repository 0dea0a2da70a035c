"""`python -m bench.report`: what is on the page, where it is from, what odd rows do to it, and errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("plotly")
pytest.importorskip("jinja2")

import benchmark_rows
from pages import Page, parsed

from aajr_kernels.cli import main
from bench import plot
from bench.report import __main__ as report
from bench.report import page, sources
from bench.report.panels import plain_text
from bench.report.sections import DTYPES, SIZES, sections
from bench.report.sweeps import size_of
from common.command import application

RESULTS = sorted((report.ROOT / "bench" / "results").glob("*.jsonl"))


def invoke(*arguments: object, exit_code: int = 0) -> str:
    result = CliRunner().invoke(application(report.report), [*map(str, arguments)])
    assert result.exit_code == exit_code, result.output
    return result.output


def page_of(folder: Path, lines: list[dict], *more: list[dict]) -> Page:
    """The page of one file of rows, or of several."""
    options: list[object] = []
    for i, rows in enumerate([lines, *more]):
        options += ["--rows", benchmark_rows.write(folder / f"rows{i or ''}.jsonl", rows)]
    invoke(*options, "--out", folder / "deep" / "page.html")
    return parsed((folder / "deep" / "page.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Page:
    return page_of(tmp_path_factory.mktemp("report"), benchmark_rows.several())


def traces(found: Page, alt: str) -> list[dict]:
    """The traces of the one plot whose words begin like this."""
    (plot_,) = [a for a in found.find("div", **{"class": "plot"}) if str(a["aria-label"]).startswith(alt)]
    return found.figures[int(plot_["data-figure"] or "")]["data"]


# ----------------------------------------------------------------------------------------------------- content
def test_time_against_length_has_every_variant(small):
    lines = {
        t["name"]: t for t in traces(small, "Time over that of the base against S, step llama, float32.")
    }
    assert list(lines) == ["exact, fused", "exact", "finite differences", "torch.func.jvp", "plain"]
    assert lines["exact"]["x"] == [512, 2048] and lines["exact"]["y"] == pytest.approx([1.36, 1.51])
    assert lines["exact, fused"]["y"] == pytest.approx([1.74, 1.82])  # the repetition counts, not the first
    assert lines["exact, fused"]["customdata"] == ["rows.jsonl:14", "rows.jsonl:7"]
    assert lines["torch.func.jvp"]["x"] == [512]


def test_memory_has_megabytes(small):
    lines = {t["name"]: t["y"] for t in traces(small, "Peak memory against S, step memory")}
    assert lines == {"exact, fused": [1347.0], "plain": [1000.0]}


def test_bars_have_a_colour_per_length(small):
    short, long = traces(small, "Time over that of the base, step llama, float32.")
    assert (short["name"], long["name"]) == ("S 512", "S 2048")
    assert short["marker"]["color"] != long["marker"]["color"]
    assert dict(zip(short["y"], short["text"]))["torch.func.jvp"] == "3.81"
    assert "torch.func.jvp" not in long["y"]


def test_errors_are_on_a_logarithmic_axis_with_the_gate_s_limit(small):
    (label,) = [
        a for a in small.find("div", **{"class": "plot"}) if "Gradient error, step llama" in a["aria-label"]
    ]
    figure = small.figures[int(label["data-figure"])]
    assert figure["layout"]["xaxis"]["type"] == "log"
    assert [shape["x0"] for shape in figure["layout"]["shapes"]] == [plot.LIMITS["float32"]]
    assert "finite differences: 9.0e-04 in float32 at S 512" in label["aria-label"]


def test_machines_without_ceilings_are_told_apart_from_those_with(small, tmp_path):
    assert "Some CPU, AVX2, 2 threads carry no measured ceilings" in small.words
    (rate,) = [t for t in traces(small, "Rates in GB/s") if t["name"] == "dual"]
    assert rate["x"] == [22.9]
    gpu = {"device": "cuda", "device_name": "Some GPU", "suite": "gpu", "dtype": "bfloat16"}
    with_ceilings = benchmark_rows.fields(
        **gpu, gflop_per_s=400e3, flop_share=0.5, ceilings={"gflop_per_s": 800e3, "gb_per_s": 3000.0}
    )
    found = page_of(tmp_path, [with_ceilings])
    by_name = {t["name"]: t["x"] for t in traces(found, "Rates in GFLOP/s, bfloat16, Some GPU")}
    assert by_name == {"plain": [400e3], "ceiling": [800e3]}
    assert "carry no measured ceilings" not in found.words and "50%" in found.cells


def test_all_rows_are_in_the_table_and_repeated_ones_are_marked(small):
    rows = [a for t, a in small.elements if t == "tr" and "data-newest" in a]
    assert [a["data-newest"] for a in rows] == ["no" if i == 2 else "yes" for i in range(14)]
    for cell in ("rows.jsonl:3", "rows.jsonl:14", "1347.0", "4.1e-07", "22.9", "def5678"):
        assert cell in small.cells


def test_the_table_of_costs_names_its_rows(small):
    at = small.cells.index("Llama, float32")
    assert small.cells[at : at + 8] == [
        *("Llama, float32", "512", "1.00", "1.36", "1.74", "1.98", "3.81", "rows.jsonl:1–2, 4, 9, 14"),
    ]
    assert small.cells[at + 8 : at + 16][-2:] == ["–", "rows.jsonl:5–8"]


def test_every_plot_says_what_it_is_drawn_from(small):
    places = re.findall(r"rows\.jsonl:[\d–, ]+ · Some CPU, AVX2, 2 threads · ([^\n]+)", small.words)
    assert len(places) == len(small.figures) == 8
    for said in places:
        assert said.startswith(
            "torch 2.13.0, transformers 5.23.0, Python 3.11.7, aajr_kernels 0.1.0 · commit "
        )
    assert sum("abc1234; def5678" in said for said in places) == 3


def test_the_spread_of_the_rounds(tmp_path):
    found = page_of(
        tmp_path,
        [
            benchmark_rows.fields(),
            benchmark_rows.fields(variant="exact", ratio=2.0, round_ratios=[2.5, 2.0, 2.25, 2.125, 9.0]),
            benchmark_rows.fields(variant="few", ratio=3.0, round_ratios=[3.0, 4.0]),
        ],
    )
    assert found.cells.count("2.12–2.50") == 2 and not any("3.00–" in cell for cell in found.cells)


def test_plots_have_words_and_tables(small):
    assert len(small.find("details")) == len(small.figures)
    for plot_ in small.find("div", **{"class": "plot"}):
        assert plot_["role"] == "img" and re.search(r"\d", plot_["aria-label"])


def test_rows_of_several_machines(tmp_path):
    other = [line | {"cpu": "Other CPU", "torch_capability": "AVX512"} for line in benchmark_rows.several()]
    found = page_of(tmp_path, benchmark_rows.several(), other)
    assert {"Some CPU, AVX2, 2 threads", "Other CPU, AVX512, 2 threads"} <= set(found.cells)
    assert "rows.jsonl:1–14" in found.words and "rows1.jsonl:1–14" in found.words
    assert len(found.figures) == 16  # nothing of one machine stands beside the other's
    at = found.cells.index("machine")
    assert found.cells[at - 1] == "model"


def test_sweeps_over_other_sizes(tmp_path):
    heads = [
        benchmark_rows.fields(suite="sweep", family=f"D-{d}", variant=v, ratio=r * d, config={"D": d})
        for d in (64, 32)
        for v, r in (("plain", 1 / d), ("dual", 0.05))
    ]
    directions = [
        benchmark_rows.fields(
            suite="sweep", family="K", variant=f"K = {k}", ratio=0.5 + 0.5 * k, base="K = 1"
        )
        for k in (1, 2, 4)
    ]
    found = page_of(tmp_path, [*heads, *directions, benchmark_rows.fields(suite="sweep", family="Q-3")])
    by_name = {
        t["name"]: (t["x"], t["y"]) for t in traces(found, "Time over that of the base against features")
    }
    assert by_name == {
        "dual": ([32, 64], pytest.approx([1.6, 3.2])),
        "plain": ([32, 64], pytest.approx([1.0, 1.0])),
    }
    (line,) = traces(found, "Time over that of the base against directions")
    assert (line["x"], line["y"]) == ([1, 2, 4], [1.0, 1.5, 2.5])
    assert line["customdata"] == ["rows.jsonl:5", "rows.jsonl:6", "rows.jsonl:7"]
    assert "No row has a ratio." in found.words  # sweeps are not shown as bars too


def test_suites_and_variants_that_nobody_knows(tmp_path):
    lines = [
        benchmark_rows.fields(suite="new", family="thing", variant=v, ratio=r, length=n)
        for v, r in (("plain", 1.0), ("something else", 2.5))
        for n in (8, 16)
    ]
    found = page_of(tmp_path, lines)
    assert [t["name"] for t in traces(found, "Time over that of the base against S, new thing")] == [
        *("something else", "plain"),
    ]
    assert "costs" not in {a.get("id") for _, a in found.elements}  # no step, no table of its costs


def test_missing_numbers_leave_gaps(tmp_path):
    nothing = benchmark_rows.fields(
        min_ms=None, median_ms=None, ratio=None, gradient_error=None, commit=None, cpu=None
    )
    found = page_of(tmp_path, [nothing])
    assert found.figures == []
    for reason in ("No row has a ratio.", "No row has a peak of memory.", "No row has a rate."):
        assert reason in found.words
    assert "unknown" in found.cells and "x86_64, AVX2, 2 threads" in found.cells
    odd = benchmark_rows.fields(ratio=float("nan"), gradient_error=0.0, dirty=True, peak_bytes=5)
    found = page_of(tmp_path, [odd])  # figures are strict JSON: NaN would not be parsed
    assert "no error at all (rows.jsonl:1)" in found.words and "abc1234, with changes" in found.cells


def test_a_row_that_failed_is_told(tmp_path):
    failed = benchmark_rows.fields(
        variant="double backward",
        ratio=None,
        min_ms=None,
        gradient_error=None,
        failure="out of memory at length 512",
    )
    found = page_of(tmp_path, [*benchmark_rows.several(), failed])
    assert "double backward at S 512: out of memory at length 512 (rows.jsonl:15)." in found.words
    assert "out of memory at length 512" in found.cells


EVIL = '</script><img src=x onerror="alert(1)"> & <b>bold</b> | \u2028 {{ 7 * 7 }}'


def test_odd_names_are_text(tmp_path):
    lines = [
        benchmark_rows.fields(),
        benchmark_rows.fields(variant=EVIL, ratio=2.0, cpu=EVIL, config={EVIL: EVIL}),
    ]
    found = page_of(tmp_path, lines)
    assert len(found.scripts) == 3 and not found.find("img") and not found.find("b")
    assert EVIL in found.cells
    names = {
        y for figure in found.figures for trace in figure["data"] for y in trace["y"] if isinstance(y, str)
    }
    assert "<b>" not in "".join(names) and any("&lt;b&gt;bold" in name for name in names)


# ----------------------------------------------------------------------------------------------- self-contained
def test_nothing_is_fetched(small):
    for tag, attributes in small.elements:
        for name in {"src", "href", "srcset", "data", "poster", "action", "xlink:href"} & set(attributes):
            assert (attributes[name] or "").startswith(("#", "data:")), (tag, attributes)
    assert not re.search(r"url\(|@import|https?:", small.styles)
    assert not re.search(r"https?:|fetch\(|XMLHttpRequest|import\(", small.scripts[0] + small.scripts[2])
    (policy,) = small.find("meta", **{"http-equiv": "Content-Security-Policy"})
    assert str(policy["content"]).startswith("default-src 'none'; ") and "http" not in str(policy["content"])
    assert sum("Plotly.register" in s or "plotly.js v" in s for s in small.scripts) == 1


def test_colours_can_be_seen_in_light_and_dark():
    style = (page.HERE / "page.css").read_text()
    grounds = [c for name in ("--page", "--panel") for c in re.findall(rf"{name}: (#\w{{6}})", style)]
    assert len(grounds) == 4

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))

    for colour in {*plot.COLOURS.values(), *plot.FURTHER, *SIZES, *(c for c, _ in DTYPES.values())}:
        for ground in grounds:
            light, dark = sorted((luminance(colour), luminance(ground)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 3, (colour, ground)


# ----------------------------------------------------------------------------------------------- committed rows
def test_every_committed_number_is_that_of_its_row():
    entries = sources.read(RESULTS, report.ROOT)
    rows = {entry.where: entry.row for entry in entries}
    seen = set()
    for section in sections(entries):
        assert section.panels
        for panel in section.panels:
            drawn = [e.where for e in panel.entries]
            for trace in panel.data:
                across = section.key in ("time", "memory", "sweeps")
                if section.key == "rooflines":
                    check_roofline(trace, rows, panel)
                    seen.add(section.key)
                    continue
                for value, other, said in zip(
                    *(trace[k] for k in ("yx" if across else "xy")), trace["customdata"]
                ):
                    where = said.split(", ")[-1]
                    row = rows[where]
                    assert where in drawn
                    sizes = {row.length, (size_of(sources.Entry(row, "", 0)) or ("", 0))[1]}
                    names = {plain_text(row.variant), f"{row.suite} {row.family}, S {row.length}"}
                    assert other in (sizes if across else names)
                    fields = {
                        "time": [row.ratio],
                        "sweeps": [row.ratio],
                        "memory": [(row.peak_bytes or 0) / 1e6],
                        "ratios": [row.ratio],
                        "rates": [row.gflop_per_s, row.gb_per_s, *row.ceilings.values()],
                        "errors": [row.gradient_error],
                    }[section.key]
                    assert value in fields, (panel.title, where)
                    seen.add(section.key)
    assert seen == {section.key for section in sections(entries)}
    # a rate is on a roofline where its row has the ceilings, else on its own
    assert seen >= {"time", "memory", "ratios", "errors"} and seen & {"rates", "rooflines"}


def check_roofline(trace, rows, panel):
    """Points are those of their rows; the roof is the lower of both ceilings, and bends where they meet."""
    limits = [entry.row.ceilings for entry in panel.entries]
    peak, bandwidth = (max(one[name] for one in limits) for name in ("gflop_per_s", "gb_per_s"))
    for x, y, said in zip(trace["x"], trace["y"], trace["customdata"]):
        if trace["name"] == "roof":
            assert y == min(peak, bandwidth * x)
        else:
            row = rows[said.split(", ")[-1]]
            assert (x, y) == (row.gflop_per_s / row.gb_per_s, row.gflop_per_s)
            allowed = min(row.ceilings["gflop_per_s"], row.ceilings["gb_per_s"] * x)
            assert f"{y / allowed:.0%} of the roof" in said
    assert trace["name"] != "roof" or peak / bandwidth in trace["x"]


def test_rows_with_both_rates_are_on_a_roofline(tmp_path):
    ceilings = {"gflop_per_s": 100.0, "gb_per_s": 20.0}
    fields = [
        benchmark_rows.fields(
            suite=suite, family=family, variant=variant, gflop_per_s=flops, gb_per_s=moved, ceilings=ceilings
        )
        for suite, family, variant, flops, moved in (
            ("attention", "d64", "plain", 80.0, 0.5),
            ("attention", "d64", "dual", 90.0, 0.4),
            ("norm", "rms_norm", "dual", 30.0, 15.0),
        )
    ]
    found = page_of(tmp_path, fields)
    names = [trace["name"] for trace in traces(found, "Roofline, float32")]
    assert names == ["dual", "plain", "roof"]
    (roof,) = [t for t in traces(found, "Roofline, float32") if t["name"] == "roof"]
    assert roof["x"] == [1.0, 5.0, 450.0] and roof["y"] == [20.0, 100.0, 100.0]
    assert "90% of the roof" in str(traces(found, "Roofline, float32")[0]["customdata"])
    assert len(found.find("div", **{"class": "plot"})) == len(found.figures)
    assert not any("Rates in" in str(a["aria-label"]) for a in found.find("div", **{"class": "plot"}))


def test_the_page_of_the_checkout_shows_the_experiments(tmp_path):
    output = invoke("--out", tmp_path / "index.html")
    found = parsed((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert f"{sum(len(path.read_text().splitlines()) for path in RESULTS)} rows" in output
    names = {path.stem for path in (report.ROOT / "experiments" / "results").glob("*.jsonl")}
    assert names and all(f"python -m experiments {name}," in found.words for name in names)
    for picture in found.find("img"):
        assert str(picture["src"]).startswith("data:image/png;base64,") and picture["alt"]


# ------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "rows.jsonl holds no rows"),
        ("\n \n", "rows.jsonl holds no rows"),
        (
            "{}",
            "line 1: a row must have exactly the fields of Row; missing or unknown: aajr_kernels, allocator",
        ),
        ("[1]", "line 1: a row must be a JSON object, got list"),
        (json.dumps(benchmark_rows.PLAIN) + "\n{torn", "rows.jsonl, line 2: Expecting property name"),
        (
            json.dumps(benchmark_rows.fields(ratio="fast")),
            "line 1: ratio of a row must be float | None, got 'fast'",
        ),
    ],
)
def test_files_that_are_no_rows(tmp_path, content, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    output = " ".join(invoke("--rows", file, "--out", tmp_path / "page.html", exit_code=2).split())
    assert message in output and output.count("error:") == 1
    assert not (tmp_path / "page.html").exists()


def test_files_that_cannot_be_read_or_written(tmp_path):
    output = " ".join(invoke("--rows", tmp_path / "none.jsonl", exit_code=2).split())
    assert "none.jsonl: No such file or directory." in output
    assert "Is a directory." in " ".join(invoke("--rows", tmp_path, exit_code=2).split())
    file = benchmark_rows.write(tmp_path / "rows.jsonl", benchmark_rows.several())
    assert "Is a directory." in " ".join(invoke("--rows", file, "--out", tmp_path, exit_code=2).split())


def test_no_checkout_no_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert "the folder of results holds no rows" in " ".join(invoke(exit_code=2).split())


def test_a_missing_package_is_named(monkeypatch, capsys):
    def app(prog_name: str) -> None:
        raise ModuleNotFoundError("No module named 'plotly'", name="plotly")

    with pytest.raises(SystemExit):
        main.run(app, "python -m bench.report", "report")
    assert "pip install 'aajr_kernels[report]'" in capsys.readouterr().err


def test_experiments_without_a_header_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    for folder in ("bench/results", "experiments/results"):
        (tmp_path / folder).mkdir(parents=True)
    benchmark_rows.write(tmp_path / "bench/results/cpu.jsonl", benchmark_rows.several())
    (tmp_path / "experiments/results/odd.jsonl").write_text("")
    text = " ".join(invoke("--out", tmp_path / "page.html", exit_code=2).split())
    assert "experiments/results/odd.jsonl does not start with the header of an experiment." in text
