"""`python -m bench.report`: a page of plots of all committed rows; with ``--write`` also the tables and pictures.

Every plot is one case of a suite on one machine: lines over the length, or bars where there is one length. A menu of
plotly chooses the quantity, the legend hides and shows variants, a point names the line that it is from. The page loads
nothing.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from common.command import fail, run

from .plot import colours, finite, plot_errors, plot_steps
from .row import Row
from .tables import Entry, latest, machine, read, rewrite, say

#: the checkout
ROOT = Path(__file__).resolve().parents[1]
#: quantity of the menu -> its number in a row
QUANTITIES: Mapping[str, Callable[[Row], float | None]] = {
    "time ÷ base": lambda row: row.ratio,
    "minimum, ms": lambda row: row.min_ms,
    "GFLOP/s": lambda row: row.gflop_per_s,
    "GB/s": lambda row: row.gb_per_s,
    "share of the ceiling": lambda row: row.share_of_roof,
    "peak memory, MB": lambda row: None if row.peak_bytes is None else row.peak_bytes / 1e6,
    "peak ÷ base": lambda row: row.peak_ratio,
    "gradient error": lambda row: row.gradient_error,
}


def page(entries: Sequence[Entry]) -> str:
    """One HTML file with a plot for every case that was measured, and every row without a number."""
    newest = latest(entries)
    hues = colours(sorted(entry.row.variant for entry in newest))
    groups: dict[str, list[Entry]] = {}
    for entry in sorted(newest, key=lambda e: (e.row.suite not in ("step", "method"), e.row.suite)):
        row = entry.row
        config = ", ".join(f"{name} {value}" for name, value in row.config.items())
        title = f"{row.suite}:{row.family} · {row.dtype} · {config} · {machine(row)}, torch {row.torch}"
        groups.setdefault(title, []).append(entry)
    plots = [plot for title, group in groups.items() if (plot := figure(title, group, hues)) is not None]
    options = {"full_html": False, "config": {"displaylogo": False}}
    parts = [plot.to_html(include_plotlyjs=i == 0, **options) for i, plot in enumerate(plots)]
    parts += [
        f"<p>{html.escape(f'{e.row.name}: {e.row.failure} ({e.file}:{e.line})')}</p>\n"
        for e in newest
        if e.row.failure
    ]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>aajr_kernels: benchmarks</title><link rel="icon" href="data:,">
<style>body {{ font: 100%/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem }}</style>
</head>
<body><h1>Benchmarks of aajr_kernels</h1>
<p>{len(entries)} rows; of those that measure the same the plots show the last one. A menu chooses the quantity, the
legend hides and shows variants.</p>
{"".join(parts)}</body></html>
"""


def figure(title: str, entries: Sequence[Entry], hues: Mapping[str, str]) -> Any:
    """A plot of one case: a trace per quantity and variant, of which the menu shows one quantity; None without any."""
    import plotly.graph_objects as go

    lengths = sorted({entry.row.length for entry in entries})
    bars, plot = len(lengths) == 1, go.Figure()
    variants: dict[str, list[Entry]] = {}
    for entry in sorted(entries, key=lambda e: e.row.length):
        variants.setdefault(entry.row.variant, []).append(entry)
    shown: list[str] = []  # the quantity of every trace
    for quantity, number in QUANTITIES.items():
        for variant, group in variants.items():
            points = [(e, y) for e in group if (y := finite(number(e.row))) is not None]
            if points:
                name = html.escape(variant, quote=False)  # plotly reads tags
                shown.append(quantity)
                trace = {
                    "type": "bar" if bars else "scatter",
                    "name": name,
                    "x": [name if bars else e.row.length for e, _ in points],
                    "y": [y for _, y in points],
                    "customdata": [html.escape(f"{e.file}:{e.line}", quote=False) for e, _ in points],
                    "hovertemplate": "%{y:.4g}<br>%{customdata}",
                    "marker": {"color": hues[variant]},
                    "visible": quantity == shown[0],
                }
                plot.add_trace(trace)
    if not shown:
        return None
    buttons = []
    for name in dict.fromkeys(shown):
        axis = {"yaxis.title.text": name, "yaxis.type": "log" if "error" in name else "linear"}
        args = [{"visible": [one == name for one in shown]}, axis]
        buttons.append({"label": name, "method": "update", "args": args})
    menu = {"buttons": buttons, "x": 1, "xanchor": "right", "y": 1.15, "yanchor": "bottom"}
    heading = {"text": html.escape(title, quote=False), "font": {"size": 13}}
    plot.update_layout(title=heading, yaxis_title=shown[0], updatemenus=[menu], template="plotly_white")
    if not bars:
        plot.update_xaxes(title="S", type="log", tickvals=lengths, ticktext=[str(n) for n in lengths])
    return plot


def report(
    rows: Annotated[
        list[Path] | None,
        typer.Option(help="File of rows; repeatable. Default: bench/results/*.jsonl of the checkout."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("runs/report/index.html"),
    write: Annotated[
        Path | None,
        typer.Option(
            help="Checkout: write the tables between marks of README.md and docs/, and docs/images."
        ),
    ] = None,
) -> None:
    """Draw what `python -m bench` measured: one HTML file that works offline, with the line every number is from.

    Exit code 2: bad arguments, rows that cannot be read, or nothing to draw.
    """
    console = Console()
    try:
        entries = read(rows or sorted((ROOT / "bench" / "results").glob("*.jsonl")), ROOT)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page(entries), encoding="utf-8")
        say(console, f"{len(entries)} rows: {out}")
        if write is not None:
            for path in (write / "README.md", *sorted((write / "docs").rglob("*.md"))):
                if rewrite(path, write, entries):
                    say(console, f"{path}: new table")
            for draw, name in ((plot_steps, "steps.png"), (plot_errors, "errors.png")):
                draw([entry.row for entry in entries], write / "docs" / "images" / name)
    except (OSError, ValueError) as error:
        fail(f"{error.filename}: {error.strerror}." if isinstance(error, OSError) else str(error))


if __name__ == "__main__":
    run(report, "bench.report", "report")
