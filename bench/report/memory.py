"""The table of peak memory for docs/memory.md, every number with its row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .readme import between, links
from .sources import Entry, latest, machine

BEGIN = "<!-- memory: written by `make figures`, from the rows in bench/results -->"
END = "<!-- end of memory -->"
#: variant -> its heading; those that no row has are left out
HEADINGS = {
    "plain": "plain step",
    "plain, checkpointed": "plain, checkpointed",
    "exact, fused": "penalty",
    "exact, recomputed": "penalty, `recompute`",
    "exact, checkpointed": "penalty, checkpointed",
    "exact, offloaded": "penalty, offloaded",
}


def lines(entries: Sequence[Entry]) -> list[dict[str, Entry]]:
    """One line per length and machine, shortest first: variant -> the latest row with its peak."""
    found: dict[tuple[str, int], dict[str, Entry]] = {}
    for entry in latest(entries):
        row = entry.row
        if row.suite == "memory" and row.peak_bytes is not None and row.variant in HEADINGS:
            found.setdefault((machine(row), row.length), {})[row.variant] = entry
    return [found[key] for key in sorted(found)]


def markdown(table: Sequence[dict[str, Entry]], prefix: str = "") -> str:
    """The table in Markdown: megabytes, and the ratio to the plain step.

    Args:
        table: of :func:`lines`.
        prefix: from the page to the folder that files of rows are named from.
    """
    used = [variant for variant in HEADINGS if any(variant in line for line in table)]
    body = [["S", *(HEADINGS[variant] for variant in used), "rows"]]
    body.append(["---"] * len(body[0]))
    for line in table:
        length = next(iter(line.values())).row.length
        body.append(
            [str(length), *(_cell(line.get(variant)) for variant in used), links(line.values(), prefix)]
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in body)


def _cell(entry: Entry | None) -> str:
    if entry is None or entry.row.peak_bytes is None:
        return "–"
    size = f"{entry.row.peak_bytes / 1e6:,.0f} MB"
    ratio = entry.number("peak_ratio")
    return size if ratio is None or entry.row.variant == entry.row.base else f"{size} ({ratio:.2f})"


def rewrite(path: Path, entries: Sequence[Entry]) -> bool:
    """Put the table between the two marks of a file; whether that changed it.

    Raises:
        OSError: the file cannot be read or written.
        ValueError: it has not exactly one pair of marks, or there is nothing to write.
    """
    table = lines(entries)
    if not table:
        raise ValueError("no row has a peak of suite memory: run `python -m bench memory --rows FILE` first.")
    return between(path, BEGIN, END, markdown(table, prefix="../"))
