"""`python -m bench.report`: one page of all committed rows, the pictures, and README's table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from common.command import fail, run

#: the checkout
ROOT = Path(__file__).resolve().parents[2]


def report(
    rows: Annotated[
        list[Path] | None,
        typer.Option(help="File of rows; repeatable. Default: bench/results/*.jsonl of the checkout."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("runs/report/index.html"),
    images: Annotated[
        Path | None, typer.Option(help="Also draw steps.png and errors.png into this folder.")
    ] = None,
    readme: Annotated[
        Path | None, typer.Option(help="Also rewrite the table of costs between the marks of this file.")
    ] = None,
    memory: Annotated[
        Path | None, typer.Option(help="Also rewrite the table of memory between the marks of this file.")
    ] = None,
) -> None:
    """Draw what `python -m bench` measured: one HTML file that works offline, with the lines every number is from.

    Without --rows the results of the experiments are shown too. Exit code 2: bad arguments, rows that cannot be read,
    or nothing to draw.
    """
    from . import memory as peaks
    from . import page, sources
    from . import readme as table
    from .evidence import evidence

    console = Console()
    try:
        entries = sources.read(rows or sorted((ROOT / "bench" / "results").glob("*.jsonl")), ROOT)
        costs = table.costs(entries)
        text = page.render(entries, costs, [] if rows else evidence(ROOT))
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
        console.print(
            f"{len(entries)} rows, {len(text) / 1e6:.1f} MB: {out}", highlight=False, soft_wrap=True
        )
        if images is not None:
            from ..plot import plot_errors, plot_steps

            images.mkdir(parents=True, exist_ok=True)
            for draw, name in ((plot_steps, "steps.png"), (plot_errors, "errors.png")):
                draw([entry.row for entry in entries], images / name)
                console.print(str(images / name), highlight=False, soft_wrap=True)
        if readme is not None:
            changed = table.rewrite(readme, costs)
            console.print(
                f"{readme}: {'new table' if changed else 'unchanged'}", highlight=False, soft_wrap=True
            )
        if memory is not None:
            changed = peaks.rewrite(memory, entries)
            console.print(
                f"{memory}: {'new table' if changed else 'unchanged'}", highlight=False, soft_wrap=True
            )
    except (OSError, ValueError) as error:
        fail(f"{error.filename}: {error.strerror}." if isinstance(error, OSError) else str(error))


if __name__ == "__main__":
    run(report, "bench.report", "report")
