"""What `aajr bench` compares: files of rows, this code and another commit, a run and its baseline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from .benchmarks import Outcome


def files(before: Path, after: Path, console: Console) -> None:
    """`--compare`: one file of rows against another.

    Raises:
        typer.BadParameter: a file cannot be read, or they have nothing in common.
    """
    from .benchmarks import compare, read_rows

    try:
        changes = compare.compared(read_rows(before), read_rows(after))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--compare") from error
    if not changes:
        raise typer.BadParameter(
            "the files have no ratio in common: the same case on the same kind of machine.",
            param_hint="--compare",
        )
    compare.show(changes, (before.stem, after.stem) if before.stem != after.stem else ("A", "B"), console)


def commit(name: str, arguments: Sequence[str], console: Console) -> None:
    """`--against`: another commit, built and timed in turn with this code.

    Raises:
        typer.BadParameter: there is no such commit, or it cannot be built or timed.
    """
    from .benchmarks import against, compare

    with Console(stderr=True).status("") as status:
        try:
            other, here = against.measure_both(name, arguments, status.update)
        except against.Failed as error:
            raise typer.BadParameter(str(error), param_hint="--against") from error
    compare.show(compare.compared(other, here), (name, "this code"), console)


def expect_baseline(folder: Path, threads: int, update: bool) -> None:
    """Before anything is measured.

    Raises:
        typer.BadParameter: there is no baseline for this kind of machine, and none is to be written.
    """
    from .benchmarks import compare, environment

    file = compare.baseline_file(folder, {**environment(), "threads": threads})
    if not update and not file.exists():
        raise typer.BadParameter(
            f"there is no {file.name} for this kind of machine in {folder}: make one with --update on a commit that is "
            "known to be good.",
            param_hint="--baseline",
        )


def baseline(folder: Path, threads: int, results: Sequence[Outcome], update: bool, console: Console) -> bool:
    """`--baseline`: whether a ratio is too far above that of this kind of machine, or gone; or write it."""
    from .benchmarks import compare, environment, read_rows

    rows = [row for result in results for row in result.rows]
    file = compare.baseline_file(folder, {**environment(), "threads": threads})
    if update:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(row.line() + "\n" for row in rows), encoding="utf-8")
        console.print(f"Baseline of {len(rows)} rows in {file}.", highlight=False, soft_wrap=True)
        return False
    before = read_rows(file)
    changes = compare.compared(before, rows)
    compare.show(changes, ("baseline", "now"), console)
    slower, gone = [change.name for change in compare.worsened(changes)], compare.lost(before, rows)
    for names, what in ((slower, f"Slower by more than {compare.LIMIT:.0%}"), (gone, "Without a number now")):
        if names:
            console.print(f"[bold red]{what}:[/] {'; '.join(map(escape, names))}.", soft_wrap=True)
    return bool(slower or gone)
