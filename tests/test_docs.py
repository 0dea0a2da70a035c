"""The Python blocks of documentation pages run as they stand, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
#: page -> the optional packages it needs
PAGES = {
    "diagnostics.md": [],
    "guide.md": ["transformers", "peft", "safetensors", "matplotlib"],
    "trainer.md": ["transformers", "accelerate", "peft"],
    "training.md": ["transformers", "safetensors", "matplotlib"],
}


#: Trainer's default, where there is no device
PINNED = "ignore:'pin_memory' argument is set as true:UserWarning"


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # asked for by PEFT
@pytest.mark.filterwarnings(PINNED)
@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page, tmp_path, monkeypatch, capsys):
    for package in PAGES[page]:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert blocks
    exec(compile("\n".join(blocks), page, "exec"), {})
    capsys.readouterr()


@pytest.mark.filterwarnings(PINNED)
def test_a_script_becomes_ours_in_five_lines(tmp_path, monkeypatch, capsys):
    """The first block of the page on Trainer is a plain script; its diff applies, is short, and the result runs."""
    for package in PAGES["trainer.md"]:
        pytest.importorskip(package)
    page = (DOCS / "trainer.md").read_text()
    script = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1].splitlines()
    diff = re.search(r"```diff\n(.*?)```", page, re.DOTALL)[1].splitlines()
    assert sum(line.startswith("+") for line in diff) <= 5
    made, place = [], 0
    for line in diff:
        mark, text = line[:1], line[1:]
        if line == "...":
            continue
        if mark == "+":
            made.append(text)
            continue
        found = script.index(text, place)  # raises where the diff does not fit
        made += script[place:found] + ([text] if mark == " " else [])
        place = found + 1
    names: dict = {}
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(made + script[place:]), "trainer.md, changed", "exec"), names)
    assert type(names["trainer"]).__name__ == "AAJRTrainer" and names["trainer"].state.global_step == 4
    capsys.readouterr()


@pytest.mark.parametrize("page", sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")))
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", (DOCS / page).read_text()):
        if "://" not in target:
            assert ((DOCS / page).parent / target).exists(), target
