"""What `python -m bench` prints: the list of cases, a table per case, the verdict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .case import Case
from .row import Row
from .run import Outcome


def listing(cases: Iterable[Case], console: Console) -> None:
    """Every case with its variants and bounds."""
    table = Table(box=SIMPLE_HEAD, header_style="dim", padding=(0, 1))
    for column in ("suite:family", "dtype", "length", "variants", "bounds"):
        table.add_column(column, no_wrap=column not in ("variants", "bounds"))
    for case in cases:
        bounds = [f"{v.name}: {escape(text)}" for v in case.variants for text in _limits(v.bounds, v.rival)]
        names = ", ".join(v.name for v in case.variants)
        table.add_row(f"{case.suite}:{case.family}", case.dtype, str(case.length), names, "\n".join(bounds))
    console.print(table)


def _limits(bounds: object, rival: str | None) -> list[str]:
    found = [_limit(name, value) for name, value in dict(bounds).items()]  # type: ignore[call-overload]
    return found + ([f"ratio below {rival}"] if rival else [])


def _limit(name: str, value: float) -> str:
    if name == "extra_bytes":
        return f"≤ {value / 1e6:.0f} MB extra"
    if name.startswith("ratio of "):
        return f"< {value:.2f} ({name.removeprefix('ratio of ')})"
    units = {"ratio": "", "peak_ratio": " peak", "ms": " ms", "copy_ratio": " of a copy"}
    return f"≤ {value:g}{units[name]}"


def outcome(result: Outcome, console: Console) -> None:
    """The rows of one case, or why there are none."""
    case = result.case

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    say(f"\n[bold]{case.name}[/]  [dim]{escape(case.why)}[/]")
    for failure in result.failures:
        say(f"[bold red]{'gate red, no speed' if result.gate else 'failed'}:[/] {escape(failure)}")
    if result.rows:
        console.print(_table(result.rows))
    for name, reason in result.broken.items():
        say(f"[bold red]{escape(name)}:[/] {escape(reason)}")
    for name, reason in result.left_out.items():
        say(f"[yellow]{escape(name)} left out:[/] [dim]{escape(reason.splitlines()[0])}[/]")


def _table(rows: Sequence[Row]) -> Table:
    columns = {
        "variant": [row.variant for row in rows],
        "backend": [row.backend for row in rows],
        "min ms": [_number(row.min_ms, "{:.2f}") for row in rows],
        "median": [_number(row.median_ms, "{:.2f}") for row in rows],
        "ratio": [_number(row.ratio, "{:.2f}") for row in rows],
        "GFLOP/s": [_number(row.gflop_per_s, "{:.0f}") for row in rows],
        "GB/s": [_number(row.gb_per_s, "{:.1f}") for row in rows],
        "of ceiling": [_number(share_of_roof(row), "{:.0%}") for row in rows],
        "peak MB": [_number(row.peak_bytes, "{:.0f}", 1e-6) for row in rows],
        "extra MB": [
            _number(
                None if row.peak_bytes is None else row.peak_bytes - (row.gradient_bytes or 0), "{:.0f}", 1e-6
            )
            if row.gradient_bytes
            else ""
            for row in rows
        ],
        "peak ratio": [_number(row.peak_ratio, "{:.2f}") for row in rows],
        "grad error": [_number(row.gradient_error, "{:.0e}") for row in rows],
        "bound": [_bound(row) for row in rows],
    }
    table = Table(box=SIMPLE_HEAD, header_style="dim", padding=(0, 1))
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    for name in shown:
        table.add_column(
            name,
            no_wrap=name != "bound",
            justify="left" if name in ("variant", "backend", "bound") else "right",
        )
    for cells in zip(*shown.values()):
        table.add_row(*cells)
    return table


def share_of_roof(row: Row) -> float | None:
    """Of what the machine allows at the row's arithmetic intensity; None where nobody measured that."""
    shares = [share for share in (row.flop_share, row.byte_share) if share is not None]
    return max(shares, default=None)


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "" if value is None else form.format(value * scale)


def _bound(row: Row) -> str:
    if row.passed is None:
        return ""
    mark = "[green]✓[/]" if row.passed else "[bold red]✗[/]"
    return f"{mark} {escape(', '.join(_limit(name, value) for name, value in row.bounds.items()))}"


def verdict(results: Sequence[Outcome], seconds: float, console: Console) -> None:
    """One sentence on the whole run."""
    red = [result.case.name for result in results if result.failures]
    missed = [f"{result.case.name} {row.variant}" for result in results for row in result.missed]
    held = sum(row.passed is True for result in results for row in result.rows)
    parts = [f"{sum(len(result.rows) for result in results)} rows of {len(results)} cases in {seconds:.0f} s"]
    if held or missed:
        parts.append(f"{held} of {held + len(missed)} bounded rows within their bounds")
    text = "; ".join(parts) + "."
    if missed:
        text += f" [bold red]Outside:[/] {escape('; '.join(missed))}."
    if red:
        text += f" [bold red]Gate red:[/] {escape('; '.join(red))}."
    console.print("\n" + text, highlight=False, soft_wrap=True)
