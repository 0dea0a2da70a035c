"""Names and texts of somebody else in pages, pictures and tables: shown as they are, and nothing they say is done."""

from __future__ import annotations

import html.parser
import io
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aajr_kernels.cli.main import application, run
from aajr_kernels.cli.validate_model import _show
from aajr_kernels.cli.validate_model.checks import Check, Report
from aajr_kernels.files import markdown, one_line
from aajr_kernels.method.evaluation import Evaluation
from aajr_kernels.training.report import write_report
from common.trust import count
from demo.report import Section, page
from experiments.evaluate.page import page as evaluation_page

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "`code` ``` ~~~",
    "a\n\n# heading\n- list\n| cell |",
    "[link](javascript:alert(1)) ![picture](http://host/x.png)",
    "$(touch made) `touch made` ; touch made | touch made && touch made",
    r"$\frac{1$ and \input{file}",
    "../../made",
    "/made",
    "[/] [bold]x[/bold] [red",
    "{0} {name} %s %(x)s",
    "end --> <!-- begin ]]> <![CDATA[",
    "\x1b[31mred\x00",
]
#: what Markdown and HTML in it would make of a text
ACTIVE = re.compile(r"<[a-zA-Z!/]|(?<!\\)\]\(|(?<!\\)`")


class Tags(html.parser.HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(autouse=True)
def nothing_is_made(tmp_path, monkeypatch):
    """Every test runs in a folder that has only what it says it wrote."""
    inner = tmp_path / "a" / "b" / "run"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    yield
    outside = [path for path in tmp_path.rglob("*") if path.is_file() and inner not in path.parents]
    assert not outside and not Path("/made").exists() and not list(inner.rglob("made"))


def evaluation(name: str, rows: int = 4) -> Evaluation:
    clean = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = {name: [torch.zeros(rows, 3, dtype=torch.int64)]}
    return Evaluation(
        clean, {name: clean + 1}, {name: torch.stack([clean, clean + 1])}, {name: (1, 2)}, tokens=tokens
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_a_page_of_an_evaluation(text):
    harmless = evaluation_page("model", {"model": "m"}, evaluation("a"), {"clean": ["x"] * 4, "a": ["x"] * 4})
    made = evaluation_page(text, {"model": text}, evaluation(text), {"clean": [text] * 4, text: [text] * 4})
    assert len(ACTIVE.findall(made)) == len(ACTIVE.findall(harmless))
    heads = [line for line in made.splitlines() if line.startswith("#")]
    assert heads == [f"# {markdown(text)}", f"## Texts of {markdown(text)}"]
    assert sum(line.startswith("| ") for line in made.splitlines()) == sum(
        line.startswith("| ") for line in harmless.splitlines()
    )
    count("texts", texts=1)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_table_and_a_picture_of_an_evaluation(text):
    made = evaluation(text)
    console = Console(file=io.StringIO(), width=400)
    console.print(made.table())
    assert one_line(text) in console.file.getvalue()
    made.save_picture(Path("evaluation.png"))
    made.save_picture(Path("evaluation.svg"))
    drawn = Tags(Path("evaluation.svg").read_text())
    assert not {"script", "img", "image"} & set(drawn.tags)
    assert not [name for name in drawn.attributes if name.startswith("on")]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_report_of_a_training(text, monkeypatch):
    monkeypatch.setattr("aajr_kernels.training.report._figure", lambda *_: False)
    row = {"step": 1, "loss": 1.0, "seconds": 0.1, "skipped": 0, "tokens": 3, "radius": 0.0}

    def outside(name: str) -> str:
        """Everything but the configuration, which is JSON between two marks."""
        rows = [row, {"step": 1, f"eval/{name}": 0.5}]
        config = {"objective": {"penalty": {}}, "note": name}
        before, block = write_report(Path.cwd(), rows, config, unshared=name).read_text().split("```json\n")
        inner, after = block.split("\n```\n")
        assert json.loads(inner) == config
        return before + after

    made, harmless = outside(text), outside("a")
    assert not ACTIVE.search(made.replace("`pip install 'aajr_kernels[train]'`", ""))
    for mark in ("\n", "|", "#"):
        assert made.count(mark) - markdown(text).count(mark) * 2 == harmless.count(mark)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_page_of_the_demonstration(text):
    picture = Path("picture.png")
    picture.write_bytes(b"png")

    def tags(name: str) -> Tags:
        sheet = Table("name")
        sheet.add_row(escape(name))
        return Tags(page(name, [Section(name, name, picture, [sheet])], name))

    made = tags(text)
    assert made.tags == tags("a").tags and made.attributes == tags("a").attributes
    assert made.text.count(text) >= 3


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_validation_prints(text):
    """Names of classes and modules, and messages."""
    text = one_line(text)
    fused = [{"what": text, "count": 1, "modules": text}]
    for failure, share in (("", 0.5), (text, 2.0)):
        check = Check("fused", "float64", "cpu", "fail" if failure else "pass", share=share, failure=failure)
        made = Report(text, 1, "fisher", True, [check], 0.0, fused, {text: text}, [text])
        console = Console(file=io.StringIO(), width=1000)
        _show(made, 8, 0.1, console)
        assert console.file.getvalue().count(text) >= 6


@pytest.mark.parametrize("text", HOSTILE)
def test_an_error_of_a_command(text, capsys, monkeypatch):
    """Of the file system, too."""
    monkeypatch.setenv("COLUMNS", "1000")

    def command() -> None:
        raise OSError(28, f"{one_line(text)} could not be written")

    monkeypatch.setattr("sys.argv", ["command"])
    with pytest.raises(SystemExit) as ended:
        run(application(command), "command", "test")
    assert ended.value.code == 2 and one_line(text) in capsys.readouterr().err


def test_nothing_else_is_drawn_as_a_formula():
    import matplotlib

    before = matplotlib.rcParams["text.parse_math"]
    evaluation("$x$").save_picture(Path("x.png"))
    assert matplotlib.rcParams["text.parse_math"] == before
