"""The experiments' committed results, as the page shows them: heading, figure, and where the rows are."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Evidence:
    """One experiment.

    Attributes:
        name, title: on the command line, and of its page.
        file, rows: of its results, and how many there are.
        page: in Markdown, relative to the checkout; None without one.
        picture: as a data URI; None without one.
        source: machine, versions and commit of its header.
    """

    name: str
    title: str
    file: str
    rows: int
    page: str | None
    picture: str | None
    source: str


def evidence(root: Path) -> list[Evidence]:
    """The experiments of a checkout that have committed results; none outside a checkout.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file does not start with the header of an experiment.
    """
    return [_one(path, root) for path in sorted((root / "experiments" / "results").glob("*.jsonl"))]


def _one(path: Path, root: Path) -> Evidence:
    name = path.relative_to(root).as_posix()
    header, *rows = path.read_bytes().splitlines() or [b""]
    try:
        facts: dict[str, Any] = json.loads(header)["environment"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name} does not start with the header of an experiment.") from error
    page, picture = (root / "docs" / "experiments" / f"{path.stem}{suffix}" for suffix in (".md", ".png"))
    title = page.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") if page.exists() else path.stem
    encoded = base64.b64encode(picture.read_bytes()).decode() if picture.exists() else None
    changed = ", with changes" if facts.get("dirty") else ""
    threads = facts.get("threads")
    said = [
        f"{facts.get('cpu') or facts.get('machine')}, {facts.get('torch_capability')}, {threads} thread(s)",
        f"torch {facts.get('torch')}, Python {facts.get('python')}",
        f"commit {facts.get('commit') or 'unknown'}{changed}",
    ]
    return Evidence(
        path.stem,
        title,
        name,
        len(rows),
        page.relative_to(root).as_posix() if page.exists() else None,
        f"data:image/png;base64,{encoded}" if encoded else None,
        " · ".join(said),
    )
