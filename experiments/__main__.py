"""`aajr experiment`: the evidence for the method, with fixed seeds, resumable, as rows, figures and pages."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from aajr_kernels.training.progress import Progress

#: the checkout that this package is imported from, or the folder it is installed in
ROOT = Path(__file__).resolve().parents[2]


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
    """Run an experiment of the repository's `experiments/`, or go on with one that was interrupted.

    Rows are appended as JSON lines while it runs; run again with the same folder it computes what is missing. Results
    depend on the configuration alone, not on the number of jobs. Exit code 2: bad arguments, no checkout, or something
    that is not installed.
    """
    from aajr_kernels.cli.main import fail
    from common.texts import MissingPackage

    if (ROOT / "experiments" / "__init__.py").exists():
        experiments = _package()
    else:
        fail(
            "the experiments are part of the repository, not of the installed package: clone it, run "
            "pip install -e '.[experiments]' there, and call this again."
        )
    if name is None:
        _list(experiments)
        return
    try:
        chosen = experiments.load(name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="NAME") from error
    if publish and quick:
        raise typer.BadParameter(
            "results of --quick are not evidence: publish a full run.", param_hint="--publish"
        )
    store = importlib.import_module("experiments.store")
    folder = out or Path("runs/experiments") / (f"{name}-quick" if quick else name)
    rows = folder / "rows.jsonl"
    committed = experiments.RESULTS / f"{name}.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if draw:
            rows = committed
        else:
            if fresh:
                rows.unlink(missing_ok=True)
            opened = store.Store(rows, name, chosen.config(quick))
            _run(chosen, opened, quick, jobs)
        header, found = store.read(rows)
    except (OSError, ValueError, MissingPackage) as error:
        fail(str(error))
    page = folder / f"{name}.md"
    page.write_text(chosen.report(header, found, folder), encoding="utf-8")
    console = Console()
    console.print(f"{len(found)} rows in {rows}; the page is {page}.", highlight=False, soft_wrap=True)
    if publish:
        pages = ROOT / "docs" / "experiments"
        for place in (pages, committed.parent):
            place.mkdir(exist_ok=True)
        if not draw:
            shutil.copyfile(rows, committed)
        for file in [page, *sorted(folder.glob("*.png"))]:
            shutil.copyfile(file, pages / file.name)
        console.print(f"Copied to {committed.parent} and {pages}.", highlight=False, soft_wrap=True)


def _package() -> ModuleType:
    """The package beside this one; an editable installation makes only `aajr_kernels` importable."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module("experiments")


def _list(experiments: ModuleType) -> None:
    table = Table("experiment", "what it shows", "committed rows", box=None)
    for name, (_, summary) in experiments.EXPERIMENTS.items():
        table.add_row(name, summary, "yes" if (experiments.RESULTS / f"{name}.jsonl").exists() else "no")
    Console().print(table)


def _run(chosen: object, store: object, quick: bool, jobs: int) -> None:
    base = importlib.import_module("experiments.base")
    with Progress() as progress:

        def tell(done: int, total: int, key: str) -> None:
            if key:
                progress.reach(done, key)
            else:
                progress.stage("tasks", total, done)

        base.run_experiment(chosen, store, quick=quick, jobs=jobs, progress=tell)
