"""Markdown that programs write: tables, and the part of a page between two marks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from aajr_kernels.files import write_text


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    head, *lines = ("| " + " | ".join(map(str, cells)) + " |" for cells in [header, *rows])
    return "\n".join([head, "|" + "---|" * len(header), *lines])


def between(path: Path, first: str, last: str, middle: str) -> bool:
    """Put text between two marks of a file; whether that changed it.

    Raises:
        OSError: the file cannot be read or written.
        ValueError: it has not exactly one pair of marks.
    """
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end or first in rest or last in before + after:
        raise ValueError(
            f"{path.name} must have the lines {first} and {last} once each, in this order: add them where the table "
            "belongs."
        )
    new = f"{before}{first}\n{middle}\n{last}{after}"
    if new == text:
        return False
    write_text(path, new)
    return True
