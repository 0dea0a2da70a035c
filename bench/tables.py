"""Tables from committed rows: the costs of a step and the peaks of memory, in Markdown between two marks of a page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from common.pages import between

from .plot import finite, model_name, rank, whole_models
from .row import Row

#: variant of a step -> its heading in the table of costs
COSTS = {
    "exact": "exact penalty",
    "exact, fused": "exact, after `fuse`",
    "finite differences": "finite differences",
    "double backward": "double backward",
    "torch.func.jvp": "`torch.func.jvp`",
    "jvp-flash-attention": "jvp-flash-attention",
    "exact, compiled reference": "compiled reference",
}
#: variant of suite `memory` -> its heading in the table of peaks
PEAKS = {
    "plain": "plain step",
    "plain, checkpointed": "plain, checkpointed",
    "exact, fused": "penalty",
    "exact, recomputed": "penalty, `recompute`",
    "exact, checkpointed": "penalty, checkpointed",
    "exact, offloaded": "penalty, offloaded",
}


class Entry(NamedTuple):
    """A row and its place: the file as the tables name it, and the line from 1."""

    row: Row
    file: str
    line: int


def read(paths: Iterable[Path], root: Path) -> list[Entry]:
    """The rows of files; those below `root` are named relative to it, others by their name only.

    Raises:
        OSError: a file cannot be read.
        ValueError: a line is no row, or no file holds any.
    """
    entries: list[Entry] = []
    paths = list(paths)
    for path in paths:
        inside = path.resolve().is_relative_to(root.resolve())
        name = path.resolve().relative_to(root.resolve()).as_posix() if inside else path.name
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                try:
                    entries.append(Entry(Row.parse(line), name, number))
                except ValueError as error:
                    raise ValueError(f"{name}, line {number}: {error}") from error
    if not entries:
        names = ", ".join(path.name for path in paths) or "the folder of results"
        raise ValueError(f"{names} holds no rows: run `python -m bench --rows FILE` first.")
    return entries


def latest(entries: Iterable[Entry]) -> list[Entry]:
    """Of rows that measure the same, the last one."""
    return list({entry.row.key: entry for entry in entries}.values())


def machine(row: Row) -> str:
    """Device, or processor with instruction set and threads."""
    if row.device != "cpu":
        return row.device_name or row.device
    return f"{row.cpu or row.machine}, {row.torch_capability}, {row.threads} thread" + "s" * (
        row.threads != 1
    )


def costs(entries: Sequence[Entry], prefix: str) -> str:
    """Time of a penalty step over the plain step, by model, dtype and length.

    Raises:
        ValueError: no row has the ratio of an exact, fused step.
    """
    newest = latest(entries)
    steps = {id(row) for row in whole_models(entry.row for entry in newest)}
    groups: dict[tuple[object, ...], dict[str, Entry]] = {}
    for entry in newest:
        if id(entry.row) in steps:
            groups.setdefault(entry.row.case_key, {})[entry.row.variant] = entry
    groups = {key: group for key, group in groups.items() if "exact, fused" in group}
    if not groups:
        raise ValueError(
            "no row has the ratio of an exact, fused step: run `python -m bench step --rows FILE` first."
        )
    order = lambda row: (machine(row), *rank(row), row.length)
    lines = sorted(groups.values(), key=lambda group: order(group["exact, fused"].row))
    several = len({machine(line["exact, fused"].row) for line in lines}) > 1
    variants = [variant for variant in COSTS if any(variant in line for line in lines)]
    body = []
    for line in lines:
        row = line["exact, fused"].row
        shown = [line.get(row.base or ""), *(line.get(variant) for variant in variants)]
        numbers = ["–" if entry is None else f"{entry.row.ratio:.2f}" for entry in shown]
        place = 1 + variants.index("exact, fused")
        numbers[place] = f"**{numbers[place]}**"
        where = [machine(row)] if several else []
        sources = links((entry for entry in shown if entry is not None), prefix)
        body.append([f"{model_name(row)}, {row.dtype}", *where, str(row.length), *numbers, sources])
    head = [
        "model",
        *(["machine"] if several else []),
        "S",
        "plain step",
        *(COSTS[v] for v in variants),
        "rows",
    ]
    return markdown(head, body)


def peaks(entries: Sequence[Entry], prefix: str) -> str:
    """Peak memory of suite `memory` in megabytes with the ratio to the plain step, by length.

    Raises:
        ValueError: no row has such a peak.
    """
    lines: dict[tuple[str, int], dict[str, Entry]] = {}
    for entry in latest(entries):
        row = entry.row
        if row.suite == "memory" and row.peak_bytes is not None and row.variant in PEAKS:
            lines.setdefault((machine(row), row.length), {})[row.variant] = entry
    if not lines:
        raise ValueError("no row has a peak of suite memory: run `python -m bench memory --rows FILE` first.")
    used = [variant for variant in PEAKS if any(variant in line for line in lines.values())]
    body = [
        [str(length), *(_peak(line.get(variant)) for variant in used), links(line.values(), prefix)]
        for (_, length), line in sorted(lines.items())
    ]
    return markdown(["S", *(PEAKS[variant] for variant in used), "rows"], body)


def _peak(entry: Entry | None) -> str:
    if entry is None:
        return "–"
    size, ratio = f"{(entry.row.peak_bytes or 0) / 1e6:,.0f} MB", finite(entry.row.peak_ratio)
    return size if ratio is None or entry.row.variant == entry.row.base else f"{size} ({ratio:.2f})"


#: name of a table, as in its marks -> its Markdown, from all rows and the way from the page to the root
TABLES: Mapping[str, Callable[[Sequence[Entry], str], str]] = {"step costs": costs, "memory": peaks}


def marks(name: str) -> tuple[str, str]:
    """The lines of a page around a table."""
    begin = f"<!-- {name}: written by `make figures`, from the rows in bench/results -->"
    return begin, f"<!-- end of {name} -->"


def rewrite(path: Path, root: Path, entries: Sequence[Entry]) -> bool:
    """Write every table whose marks a page has; whether that changed it.

    Raises:
        OSError: the page cannot be read or written.
        ValueError: marks are not in pairs, or there are no rows for a table.
    """
    prefix, text, changed = "../" * (len(path.relative_to(root).parts) - 1), path.read_text("utf-8"), False
    for name, table in TABLES.items():
        if any(mark in text for mark in marks(name)):
            changed |= between(path, *marks(name), table(entries, prefix))
    return changed


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines)


def links(entries: Iterable[Entry], prefix: str = "") -> str:
    """Links to the files of rows, named by the lines: ``[cpu 32–38, 40](bench/results/cpu.jsonl)``."""
    by_file: dict[str, set[int]] = {}
    for entry in entries:
        by_file.setdefault(entry.file, set()).add(entry.line)
    return "; ".join(
        f"[{Path(file).stem} {_spans(lines)}]({prefix}{file})" for file, lines in by_file.items()
    )


def _spans(lines: Iterable[int]) -> str:
    """Line numbers with neighbours joined: ``32–38, 40``."""
    runs: list[list[int]] = []
    for line in sorted(lines):
        if runs and line == runs[-1][1] + 1:
            runs[-1][1] = line
        else:
            runs.append([line, line])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)
