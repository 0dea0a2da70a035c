"""What `python -m bench` compares: files of rows, this code and another commit, a run and its baseline."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from aajr_kernels.training.progress import Progress

if TYPE_CHECKING:
    from . import Outcome

NOTHING = "the two have no ratio in common: the same case on the same kind of machine."


def files(before: Path, after: Path, console: Console) -> None:
    """`--compare`: one file of rows against another.

    Raises:
        typer.BadParameter: a file cannot be read, or they have nothing in common.
    """
    from . import compare, read_rows

    try:
        found = compare.compare(read_rows(before), read_rows(after))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--compare") from error
    if not found.changes and not found.lost:
        raise typer.BadParameter(NOTHING, param_hint="--compare")
    compare.show(found, (before.stem, after.stem) if before.stem != after.stem else ("A", "B"), console)


def commit(name: str, arguments: Sequence[str], rows: Path | None, console: Console) -> None:
    """`--against`: another commit, built and timed in turn with this code.

    Raises:
        typer.BadParameter: there is no such commit, it cannot be built or timed, or has nothing in common.
    """
    from . import against, append_rows, compare

    with Progress() as progress:
        progress.stage(f"{name} and this code", 1 + 2 * against.TURNS)
        try:
            other, here = against.measure_both(name, arguments, progress.begin)
        except against.Failed as error:
            raise typer.BadParameter(str(error), param_hint="--against") from error
    if rows is not None:
        append_rows(rows, [*other, *here])
    found = compare.compare(other, here)
    if not found.changes and not found.lost:
        raise typer.BadParameter(NOTHING, param_hint="--against")
    compare.show(found, (name, "this code"), console)


class Baseline:
    """`--baseline`: the rows of a quick run on this kind of machine.

    Args:
        folder: of the baselines.
        threads: of this run.
        update: write it instead of comparing.

    Raises:
        typer.BadParameter: there is none to compare with, or it cannot be read.
    """

    def __init__(self, folder: Path, threads: int, update: bool) -> None:
        from . import compare, environment, read_rows

        self.update = update
        self.file = compare.baseline_file(folder, {**environment(), "threads": threads})
        if not update and not self.file.exists():
            raise typer.BadParameter(
                f"there is no {self.file.name} for this kind of machine in {folder}: make one with --update on a "
                "commit that is known to be good.",
                param_hint="--baseline",
            )
        try:
            self.rows = read_rows(self.file) if self.file.exists() else []
        except (OSError, ValueError) as error:
            raise typer.BadParameter(str(error), param_hint="--baseline") from error

    def judge(self, results: Sequence[Outcome], console: Console) -> bool:
        """Whether a ratio is too far above the baseline, or is gone; or write it. True is a failure."""
        from . import compare

        now = [row for result in results for row in result.rows]
        say = functools.partial(console.print, highlight=False, soft_wrap=True)
        if self.update:
            if not now or any(result.failures or result.broken for result in results):
                say("[bold red]The baseline was not written:[/] a case failed, or nothing was measured.")
                return True
            self.file.parent.mkdir(parents=True, exist_ok=True)
            whole = self.file.with_suffix(".part")
            lines = [row.line() + "\n" for row in compare.merged(self.rows, now)]
            whole.write_text("".join(lines), encoding="utf-8")
            os.replace(whole, self.file)
            say(f"Baseline of {len(lines)} rows in {self.file}.")
            return False
        # a case of the baseline that was asked for, under whatever configuration it runs now
        asked = {(r.case.suite, r.case.family, r.case.dtype, r.case.length) for r in results}
        expected = [row for row in self.rows if (row.suite, row.family, row.dtype, row.length) in asked]
        found = compare.compare(expected, now)
        compare.show(found, ("baseline", "now"), console)
        gone = found.unmatched[0] - len(found.lost)
        if gone > 0:
            say(f"[bold red]{gone} rows of the baseline have no counterpart:[/] write it anew with --update.")
        return bool(found.slower or found.lost or gone > 0 or not found.changes)
