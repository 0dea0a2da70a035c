"""Rows with the place they come from, so that every figure can name the lines it is drawn from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..plot import finite, identity
from ..row import Row


@dataclass(frozen=True)
class Entry:
    """One row and its place.

    Attributes:
        row: as parsed.
        file: of the row, as the report names it.
        line: in the file, from 1.
    """

    row: Row
    file: str
    line: int

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"

    def number(self, name: str) -> float | None:
        """A field of the row, or None where there is no finite number."""
        return finite(getattr(self.row, name))


def read(paths: Iterable[Path], root: Path) -> list[Entry]:
    """The rows of files, in order.

    Args:
        paths: results files of `python -m bench`.
        root: files below it are named relative to it, others by their name alone.

    Raises:
        OSError: a file cannot be read.
        ValueError: a line is no row, or no file holds any.
    """
    found: list[Entry] = []
    paths = list(paths)
    for path in paths:
        inside = path.resolve().is_relative_to(root.resolve())
        name = path.resolve().relative_to(root.resolve()).as_posix() if inside else path.name
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                try:
                    found.append(Entry(Row.parse(line), name, number))
                except ValueError as error:
                    raise ValueError(f"{name}, line {number}: {error}") from error
    if not found:
        names = ", ".join(path.name for path in paths) or "the folder of results"
        raise ValueError(f"{names} holds no rows: run `python -m bench --rows FILE` first.")
    return found


def latest(entries: Iterable[Entry]) -> list[Entry]:
    """Of rows that measure the same, the last one."""
    return list({identity(entry.row): entry for entry in entries}.values())


def machine(row: Row) -> str:
    """What the row was measured on, in words."""
    if row.device != "cpu":
        return row.device_name or row.device
    threads = f"{row.threads} thread" + "s" * (row.threads != 1)
    return f"{row.cpu or row.machine}, {row.torch_capability}, {threads}"


def configuration(config: Mapping[str, Any]) -> str:
    """The sizes and options of a case, in words."""
    words = []
    for name, value in config.items():
        if value is True:
            words.append(name)
        else:
            words.append(str(value) if name == "sizes" else f"{name} {value}")
    return ", ".join(words)


def places(entries: Iterable[Entry]) -> str:
    """Files and lines, neighbours joined: ``cpu.jsonl:32–38, 40``."""
    by_file: dict[str, set[int]] = {}
    for entry in entries:
        by_file.setdefault(entry.file, set()).add(entry.line)
    return "; ".join(f"{file}:{spans(lines)}" for file, lines in by_file.items())


def spans(lines: Iterable[int]) -> str:
    """Line numbers with neighbours joined: ``32–38, 40``."""
    runs: list[list[int]] = []
    for line in sorted(set(lines)):
        if runs and line == runs[-1][1] + 1:
            runs[-1][1] = line
        else:
            runs.append([line, line])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)


def versions(entries: Sequence[Entry]) -> str:
    """Software of rows; where they differ, all of it."""
    names = {"torch": "torch", "transformers": "transformers", "triton": "Triton", "python": "Python"}
    names["aajr_kernels"] = "aajr_kernels"
    found = []
    for field, name in names.items():
        values = dict.fromkeys(value for e in entries if (value := getattr(e.row, field)) is not None)
        if values:
            found.append(f"{name} {' and '.join(values)}")
    return ", ".join(found)


def commits(entries: Sequence[Entry]) -> str:
    """Commits of rows, with a mark where the code was changed since."""
    found = dict.fromkeys(
        (e.row.commit or "unknown") + (", with changes" if e.row.dirty else "") for e in entries
    )
    return "; ".join(found)
