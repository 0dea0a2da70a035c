"""`python -m experiments`: the evidence for the method, with fixed seeds, resumable, as rows, figures and pages."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from aajr_kernels.files import write_text
from aajr_kernels.training.progress import Progress
from common.command import fail, run
from common.texts import MissingPackage

from . import EXPERIMENTS, RESULTS, load
from .base import Experiment, run_experiment
from .store import Store, read

#: the checkout
ROOT = Path(__file__).resolve().parent.parent


def experiment(
    name: Annotated[str | None, typer.Argument(help="Which one; without a name they are listed.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of rows, figures and page. Default: runs/experiments/NAME.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small and fast: shows that everything runs.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, of one thread each.")] = 1,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin anew: delete the rows that are there.")
    ] = False,
    draw: Annotated[
        bool, typer.Option("--draw", help="Run nothing: draw figures and page from the committed rows.")
    ] = False,
    publish: Annotated[
        bool, typer.Option("--publish", help="Also put rows, figures and page where they are committed.")
    ] = False,
) -> None:
    """Run an experiment, or go on with one that was interrupted.

    Rows are appended as JSON lines while it runs; run again with the same folder it computes what is missing. Results
    depend only on the configuration, not on the number of jobs. Exit code 2: bad arguments, or something that is
    not installed. `evaluate` in the place of NAME attacks a model of yours, with options of its own.
    """
    if name is None:
        _list()
        return
    try:
        selected = load(name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="NAME") from error
    if publish and quick:
        raise typer.BadParameter(
            "results of --quick are not evidence: publish a full run.", param_hint="--publish"
        )
    folder = out or Path("runs/experiments") / (f"{name}-quick" if quick else name)
    rows = folder / "rows.jsonl"
    committed = RESULTS / f"{name}.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if draw:
            rows = committed
        else:
            if fresh:
                rows.unlink(missing_ok=True)
            opened = Store(rows, name, selected.config(quick))
            _run(selected, opened, quick, jobs)
        header, lines = read(rows)
    except (OSError, ValueError, MissingPackage) as error:
        fail(str(error))
    page = folder / f"{name}.md"
    write_text(page, selected.report(header, lines, folder))
    _tell(f"{len(lines)} rows in {rows}; the page is {page}.")
    if publish:
        pages = ROOT / "docs" / "experiments"
        for place in (pages, committed.parent):
            place.mkdir(exist_ok=True)
        if not draw:
            shutil.copyfile(rows, committed)
        for file in [page, *sorted(folder.glob("*.png"))]:
            shutil.copyfile(file, pages / file.name)
        _tell(f"Copied to {committed.parent} and {pages}.")


def _tell(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def _list() -> None:
    table = Table("experiment", "what it shows", "committed rows", box=None)
    for name, (_, summary) in EXPERIMENTS.items():
        table.add_row(name, summary, "yes" if (RESULTS / f"{name}.jsonl").exists() else "no")
    Console().print(table)
    Console().print("evaluate, with --help: attacks on a model and texts of your own.")


def _run(selected: Experiment, store: Store, quick: bool, jobs: int) -> None:
    with Progress() as progress:

        def tell(done: int, total: int, key: str) -> None:
            if key:
                progress.reach(done, key)
            else:
                progress.stage("tasks", total, done)

        run_experiment(selected, store, quick=quick, jobs=jobs, progress=tell)


def main() -> None:
    """``python -m experiments``: an experiment, or ``evaluate`` with options of its own."""
    if sys.argv[1:2] == ["evaluate"]:
        from .evaluate.command import command

        del sys.argv[1]
        run(command, "experiments evaluate", "experiments")
    else:
        run(experiment, "experiments", "experiments")


if __name__ == "__main__":
    main()
