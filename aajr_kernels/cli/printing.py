"""Tables, lines and JSON of the sub-commands that check something."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

#: result of a check -> its cell
RESULTS = {
    "pass": "[green]pass[/]",
    "fail": "[bold red]FAIL[/]",
    "skipped": "[yellow]skipped[/]",
    "shown": "[dim]peer[/]",
}


def table(texts: Sequence[str], numbers: Sequence[str], **options: Any) -> Table:
    """An empty table: columns of text, then columns of numbers; options of :class:`rich.table.Table`."""
    sheet = Table(box=SIMPLE_HEAD, header_style="dim", padding=(0, 1), **options)
    for column in texts:
        sheet.add_column(column, no_wrap=True)
    for column in numbers:
        sheet.add_column(column, no_wrap=True, justify="right")
    return sheet


def say(console: Console, text: str) -> None:
    """Print a line with rich's marks, wrapped by the terminal and not by rich."""
    console.print(text, highlight=False, soft_wrap=True)


def print_json(report: dict[str, Any]) -> None:
    """Print a report as one JSON object; a number that is not finite is null."""
    print(json.dumps(_finite(report), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
