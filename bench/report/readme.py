"""The table of a step's costs, for README and for the page, every number with its row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..plot import model_name, rank, whole_models
from .sources import Entry, configuration, latest, machine, places, spans

BEGIN = "<!-- step costs: written by `make figures`, from the rows in bench/results -->"
END = "<!-- end of step costs -->"
#: variant -> its heading; those that no row has are left out
HEADINGS = {
    "exact": "exact penalty",
    "exact, fused": "exact, after `fuse`",
    "finite differences": "finite differences",
    "double backward": "double backward",
    "torch.func.jvp": "`torch.func.jvp`",
    "jvp-flash-attention": "jvp-flash-attention",
    "exact, compiled reference": "compiled reference",
}


@dataclass(frozen=True)
class Line:
    """One model at one length.

    Attributes:
        model: with its dtype.
        machine: what it was measured on.
        cells: heading -> the row whose ratio stands there; the base under "plain step".
    """

    model: str
    machine: str
    length: int
    cells: dict[str, Entry]

    def text(self, heading: str) -> str:
        entry = self.cells.get(heading)
        return "–" if entry is None else f"{entry.number('ratio') or 0:.2f}"


@dataclass(frozen=True)
class Costs:
    """The table: its headings and its lines."""

    headings: list[str]
    lines: list[Line]

    @property
    def several_machines(self) -> bool:
        return len({line.machine for line in self.lines}) > 1


def costs(entries: Sequence[Entry]) -> Costs:
    """What a penalty step of every model costs, from the latest rows that are compared with a plain step."""
    wanted = {id(row) for row in whole_models([entry.row for entry in latest(entries)])}
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in latest(entries):
        row = entry.row
        if id(row) in wanted:
            key = (row.family, configuration(row.config), row.dtype, machine(row), str(row.length))
            groups.setdefault(key, []).append(entry)
    found = []
    for group in groups.values():
        row = group[0].row
        cells = {HEADINGS[e.row.variant]: e for e in group if e.row.variant in HEADINGS}
        base = next((e for e in group if e.row.variant == e.row.base), None)
        if HEADINGS["exact, fused"] in cells and base is not None:
            line = Line(
                f"{model_name(row)}, {row.dtype}", machine(row), row.length, {"plain step": base} | cells
            )
            found.append(line)
    machines = list(dict.fromkeys(line.machine for line in found))
    found.sort(
        key=lambda line: (machines.index(line.machine), rank(line.cells["plain step"].row), line.length)
    )
    used = {heading for line in found for heading in line.cells}
    return Costs(["plain step", *(h for h in HEADINGS.values() if h in used)], found)


def markdown(table: Costs) -> str:
    """The table in Markdown; its last column says which lines of which files the numbers are from."""
    best = HEADINGS["exact, fused"]
    several = table.several_machines
    head = ["model", *(["machine"] if several else []), "S", *table.headings, "rows"]
    lines = [head, ["---"] * len(head)]
    for line in table.lines:
        numbers = [f"**{line.text(h)}**" if h == best else line.text(h) for h in table.headings]
        machines = [line.machine] if several else []
        lines.append([line.model, *machines, str(line.length), *numbers, links(line.cells.values())])
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines)


def links(entries: Iterable[Entry], prefix: str = "") -> str:
    """Links to the files of rows, named by the lines; `prefix` leads from the page to where files are named from."""
    by_file: dict[str, set[int]] = {}
    for entry in entries:
        by_file.setdefault(entry.file, set()).add(entry.line)
    return "; ".join(
        f"[{Path(file).stem} {spans(numbers)}]({prefix}{file})" for file, numbers in by_file.items()
    )


def source(line: Line) -> str:
    """Where the numbers of a line are from."""
    return places(line.cells.values())


def rewrite(path: Path, table: Costs) -> bool:
    """Put the table between the two marks of a file; whether that changed it.

    Raises:
        OSError: the file cannot be read or written.
        ValueError: it has not exactly one pair of marks, or there is nothing to write.
    """
    if not table.lines:
        raise ValueError(
            "no row has the ratio of an exact, fused step: run `python -m bench step --rows FILE` first."
        )
    return between(path, BEGIN, END, markdown(table))


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
    path.write_text(new, encoding="utf-8")
    return True
