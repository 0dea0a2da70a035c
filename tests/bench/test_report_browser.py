"""The report's page in a headless browser without a network: plots, filter, colours, a phone, no script."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("plotly")
pytest.importorskip("jinja2")
pytest.importorskip("playwright")
import benchmark_rows
from playwright import sync_api as api

from bench.report.__main__ import report
from common.command import application

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")
#: no look-ups of its own: the test has no network
QUIET = """--disable-gpu --disable-quic --no-first-run --disable-sync --disable-background-networking
    --disable-component-update"""
ODD = "<b>bold</b> & <img src=x>"


def executable(playwright) -> str | None:
    """A browser of the machine, or the one that playwright has downloaded."""
    found = os.environ.get("AAJR_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
    own = playwright.chromium.executable_path
    return found or (own if Path(own).exists() else None)


@pytest.fixture(scope="module")
def browser() -> Iterator[api.Browser]:
    with api.sync_playwright() as playwright:
        path = executable(playwright)
        if path is None:
            pytest.skip(
                "no Chromium or Chrome here: apt-get install chromium, or playwright install chromium; "
                "AAJR_BROWSER=PATH names another"
            )
        options = [
            *QUIET.split(),
            *(["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []),
        ]
        launched = playwright.chromium.launch(executable_path=path, args=options)
        api.expect.set_options(timeout=30_000)  # of a busy machine
        yield launched
        api.expect.set_options(timeout=5_000)
        launched.close()


def page(folder: Path, *rows: object) -> Path:
    out = folder / "page.html"
    result = CliRunner().invoke(application(report), [*map(str, rows), "--out", str(out)])
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    odd = [benchmark_rows.fields(variant=ODD, ratio=2.5, threads=1, length=n) for n in (512, 2048)]
    return page(
        folder, "--rows", benchmark_rows.write(folder / "rows.jsonl", [*benchmark_rows.several(), *odd])
    )


class View:
    """A page that is open, with everything it said and asked for."""

    def __init__(self, browser: api.Browser, file: Path, **options: object) -> None:
        self.context = browser.new_context(**options)
        self.context.set_offline(True)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())

    def draw_all(self) -> int:
        plots = self.page.locator(".plot")
        for i in range(plots.count()):
            plots.nth(i).scroll_into_view_if_needed()
            plots.nth(i).locator("svg.main-svg").first.wait_for()
        api.expect(self.page.locator(".plot:not([data-drawn])")).to_have_count(0)
        return plots.count()

    def shown(self) -> tuple[int, str]:
        return self.page.locator("#all tbody tr:visible").count(), self.page.locator("#shown").inner_text()


@pytest.fixture(scope="module")
def opened(browser, small) -> Iterator[View]:
    found = View(browser, small)
    yield found
    found.context.close()


@pytest.fixture
def view(opened, small) -> Iterator[View]:
    """The page, opened once for all tests that leave it as it was; nothing may be logged or fetched in any."""
    yield opened
    assert opened.said == []
    assert opened.asked == [small.as_uri()]


def test_plots_are_drawn_with_every_point(view):
    drawn = view.draw_all()
    assert drawn > 8
    counts = view.page.evaluate(
        """() => [...document.querySelectorAll(".plot")].map((plot) => [
            plot.querySelectorAll(".scatterlayer .point, .barlayer .point").length,
            figures[plot.dataset.figure].data.reduce((sum, trace) => sum + trace.x.length, 0),
        ])"""
    )
    assert len(counts) == drawn and all(points == wanted > 0 for points, wanted in counts)


def test_a_key_hides_its_line(view):
    view.draw_all()
    key = view.page.locator(".keys").first.locator("button", has_text="finite differences")
    lines = view.page.locator(".plot").first.locator(".scatterlayer .trace")
    before = lines.count()
    for pressed, wanted in (("false", before - 1), ("true", before)):
        key.press("Enter")
        assert key.get_attribute("aria-pressed") == pressed
        api.expect(lines).to_have_count(wanted)


def test_hovering_names_the_row(view):
    view.draw_all()
    plot = view.page.locator(".plot").first
    plot.scroll_into_view_if_needed()
    plot.locator(".scatterlayer .point").first.hover(force=True)
    said = plot.locator(".hoverlayer .hovertext").first
    said.wait_for()
    assert "rows.jsonl:" in (said.text_content() or "")


def test_odd_names_are_shown_as_they_are(view):
    view.draw_all()
    labels = view.page.locator(".ytick text").all_text_contents()
    keys = view.page.locator(".keys button").all_inner_texts()
    assert ODD in labels and ODD in [key.split(" ", 1)[1] for key in keys]
    assert view.page.locator("img").count() == 0
    assert view.page.locator("#all td", has_text=ODD).count() == 2


def test_filter(view):
    total = view.page.locator("#all tbody tr").count()
    assert view.shown() == (total, f"{total} of {total} rows") and total == 16
    view.page.fill("[name=words]", "DIFFERENCES 2048")
    assert view.shown() == (1, "1 of 16 rows")
    view.page.fill("[name=words]", "")
    view.page.select_option("[name=variant]", "exact, fused")
    assert view.shown()[0] == 4
    view.page.check("[name=newest]")
    assert view.shown()[0] == 3
    view.page.select_option("[name=suite]", "norm")
    assert view.shown() == (0, "0 of 16 rows")
    view.page.click("button[type=reset]")
    api.expect(view.page.locator("#shown")).to_have_text("16 of 16 rows")
    view.page.select_option("[name=machine]", "Some CPU, AVX2, 1 thread")
    assert view.shown()[0] == 2
    view.page.click("button[type=reset]")


def test_sorting(view):
    heading = view.page.locator("#all th", has_text="min ms")
    column = f"#all tbody tr td:nth-child({heading.evaluate('cell => cell.cellIndex + 1')})"
    for order in ("ascending", "descending"):
        heading.locator("button").click()
        assert heading.get_attribute("aria-sort") == order
        cells = view.page.locator(column).all_inner_texts()
        numbers = [float(cell) for cell in cells if cell]
        assert numbers == sorted(numbers, reverse=order == "descending") and len(set(numbers)) > 5
        assert cells[len(numbers) :] == [""] * 2  # what is missing comes last


def test_light_and_dark(view):
    view.draw_all()
    tick = view.page.locator(".plot .xtick text").first

    ground = view.page.locator("body")
    for scheme, background, text in (
        ("light", "rgb(253, 253, 252)", "rgb(28, 33, 38)"),
        ("dark", "rgb(18, 22, 27)", "rgb(227, 231, 235)"),
        ("light", "rgb(253, 253, 252)", "rgb(28, 33, 38)"),
    ):
        view.page.emulate_media(color_scheme=scheme)
        api.expect(ground).to_have_css("background-color", background)
        api.expect(tick).to_have_css("fill", text)


@pytest.mark.slow
def test_a_phone(browser, small):
    phone = View(browser, small, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    assert phone.draw_all() > 8
    assert phone.page.evaluate("document.documentElement.scrollWidth") <= 360
    widths = phone.page.evaluate(
        "[...document.querySelectorAll('.plot .main-svg')].map((plot) => plot.getBoundingClientRect().right)"
    )
    assert max(widths) <= 360
    phone.context.close()
    assert phone.said == []


def test_without_javascript_the_numbers_are_there(browser, small):
    view = View(browser, small, java_script_enabled=False)
    assert view.page.locator(".plot:visible, .controls:visible").count() == 0
    details = view.page.locator("details").first
    details.locator("summary").click()
    assert details.locator("td:visible", has_text="rows.jsonl:14").count() == 1
    assert view.page.locator("#all tbody tr:visible").count() == 16
    view.context.close()


def test_the_keyboard_reaches_tables_and_headings(view):
    for region in view.page.locator(".scroll:visible").all():
        assert region.get_attribute("tabindex") == "0" and region.get_attribute("role") == "region"
    heading = view.page.locator("#all th", has_text="ratio").first
    heading.locator("button").press("Enter")
    assert heading.get_attribute("aria-sort") == "ascending"


@pytest.mark.slow
def test_the_page_of_the_committed_rows(browser, tmp_path):
    file = page(tmp_path)
    view = View(browser, file)
    assert view.draw_all() > 20
    view.page.locator("img").last.scroll_into_view_if_needed()
    widths = "Promise.all([...document.images].map((image) => image.decode().then(() => image.naturalWidth)))"
    assert min(view.page.evaluate(widths)) > 100
    view.context.close()
    assert view.said == [] and [url for url in view.asked if not url.startswith("data:")] == [file.as_uri()]
