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
    "training.md": ["transformers", "safetensors", "matplotlib"],
}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # asked for by PEFT
@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page, tmp_path, monkeypatch, capsys):
    for package in PAGES[page]:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert blocks
    exec(compile("\n".join(blocks), page, "exec"), {})
    capsys.readouterr()


@pytest.mark.parametrize("page", sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")))
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", (DOCS / page).read_text()):
        if "://" not in target:
            assert ((DOCS / page).parent / target).exists(), target
