"""Tables on the terminal: of cases, rows and predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import roofline
from .case import Case, Variant
from .row import Row
from .run import Outcome

#: parts of the work that can be left out -> heading of the share that was computed; flops are modelled by count
COMPUTED = {"tokens": "head tokens", "positions": "positions", "arithmetic": "forward flops"}


def grid(
    header: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[str] = (), wrap: Sequence[str] = ()
) -> Table:
    """A table without empty columns; cells to the right but for `left`, on one line but for `wrap`."""
    table = Table(box=SIMPLE_HEAD, header_style="dim", padding=(0, 1))
    columns = [(name, cells) for name, cells in zip(header, zip(*rows)) if any(cells)]
    for name, _ in columns:
        justify: Literal["left", "right"] = "left" if name in left else "right"
        table.add_column(escape(name), no_wrap=name not in wrap, justify=justify)
    for line in zip(*(cells for _, cells in columns)):
        table.add_row(*line)
    return table


def wide_console() -> Console:
    """The terminal; a file or a pipe takes lines of 140 characters."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def say(console: Console, text: str) -> None:
    """Print text with markup, on one line however long."""
    console.print(text, highlight=False, soft_wrap=True)


def listing(cases: Sequence[Case]) -> Table:
    """Every case with its variants and bounds."""
    header = ("suite:family", "dtype", "length", "variants", "bounds")
    rows = []
    for case in cases:
        names = ", ".join(v.name for v in case.variants)
        bounds = "\n".join(line for v in case.variants for line in _bounds(v))
        rows.append((f"{case.suite}:{case.family}", case.dtype, str(case.length), names, bounds))
    return grid(header, rows, left=header, wrap=header[3:])


def _bounds(variant: Variant) -> list[str]:
    limits = [_limit(name, value) for name, value in variant.bounds.items()]
    limits += [f"ratio below {variant.peer}"] if variant.peer else []
    return [f"{variant.name}: {escape(limit)}" for limit in limits]


def _limit(name: str, value: float) -> str:
    if name == "extra_bytes":
        return f"≤ {value / 1e6:.0f} MB extra"
    if name.startswith("ratio of "):
        return f"< {value:.2f} ({name.removeprefix('ratio of ')})"
    if name.startswith("over "):
        return f"≤ {value:g} of {name.removeprefix('over ')}"
    units = {"ratio": "", "peak_ratio": " peak", "ms": " ms", "copy_ratio": " of a copy"}
    return f"≤ {value:g}{units[name]}"


def show_outcome(outcome: Outcome, console: Console) -> None:
    """The rows of one case, or why there are none."""
    say(console, f"\n[bold]{escape(outcome.case.name)}[/]  [dim]{escape(outcome.case.why)}[/]")
    for failure in outcome.failures:
        text = "gate red, no speed" if outcome.gate else "failed"
        say(console, f"[bold red]{text}:[/] {escape(failure)}")
    if outcome.rows:
        console.print(measured(outcome.rows))
    for name, reason in outcome.broken.items():
        say(console, f"[bold red]{escape(name)}:[/] {escape(reason)}")
    for name, reason in outcome.left_out.items():
        say(console, f"[yellow]{escape(name)} left out:[/] [dim]{escape(reason.splitlines()[0])}[/]")


def measured(rows: Sequence[Row]) -> Table:
    def column(form: str, number: Callable[[Row], float | None], scale: float = 1.0) -> list[str]:
        values = [number(row) for row in rows]
        return ["" if value is None else format(value * scale, form) for value in values]

    digits = ".4f" if all((row.min_ms or 0.0) < 1.0 for row in rows) else ".2f"
    columns = {
        "variant": [row.variant for row in rows],
        "backend": [row.backend for row in rows],
        "min ms": column(digits, lambda row: row.min_ms),
        "median": column(digits, lambda row: row.median_ms),
        "ratio": column(".2f", lambda row: row.ratio),
        **{
            name: column(".0%", lambda row: row.computed.get(part))  # noqa: B023  called at once
            for part, name in COMPUTED.items()
            if any(row.computed.get(part, 1.0) < 1.0 for row in rows)
        },
        "GFLOP/s": column(".0f", lambda row: row.gflop_per_s),
        "GB/s": column(".1f", lambda row: row.gb_per_s),
        "of ceiling": column(".0%", lambda row: row.share_of_roof),
        "peak MB": column(".0f", lambda row: row.peak_bytes, 1e-6),
        "extra MB": column(".0f", lambda row: row.extra_bytes if row.gradient_bytes else None, 1e-6),
        "peak ratio": column(".2f", lambda row: row.peak_ratio),
        "grad error": column(".0e", lambda row: row.gradient_error),
        "bound": [_verdict(row) for row in rows],
    }
    return grid(list(columns), zip(*columns.values()), left=("variant", "backend", "bound"), wrap=("bound",))


def _verdict(row: Row) -> str:
    if row.passed is None:
        return ""
    mark = "[green]✓[/]" if row.passed else "[bold red]✗[/]"
    return f"{mark} {escape(', '.join(_limit(name, value) for name, value in row.bounds.items()))}"


def show_verdict(results: Sequence[Outcome], seconds: float, console: Console) -> None:
    """One sentence on the whole run."""
    red = [result.case.name for result in results if result.failures]
    missed = [f"{result.case.name} {row.variant}" for result in results for row in result.missed]
    held = sum(row.passed is True for result in results for row in result.rows)
    text = f"{sum(len(result.rows) for result in results)} rows of {len(results)} cases in {seconds:.0f} s"
    if held or missed:
        text += f"; {held} of {held + len(missed)} bounded rows within their bounds"
    text += "."
    if missed:
        text += f" [bold red]Outside:[/] {escape('; '.join(missed))}."
    if red:
        text += f" [bold red]Gate red:[/] {escape('; '.join(red))}."
    say(console, "\n" + text)


def show_predictions(cases: Sequence[Case], device: roofline.Device, console: Console) -> None:
    """Predicted times beside the bounds that they would have to meet, and the assumptions."""
    names = ("suite:family", "dtype", "length", "variant")
    numbers = ("ms", "ratio", "TFLOP", "GB", "limited by", "bound")
    rows = []
    for case in cases:
        times = {v.name: 1e3 * roofline.seconds(v.work, device) for v in case.variants if v.work}
        base = min((times[name] for name in case.base if name in times), default=None)
        for variant in (v for v in case.variants if v.work):
            ms, flops = times[variant.name], roofline.flops_of(variant.work)
            longest = max(variant.work, key=lambda one: one.seconds(device))
            arithmetic = longest.flops and longest.seconds(device) == longest.flops / device.rate(
                longest.kind
            )
            cells = (
                *(f"{case.suite}:{case.family}", case.dtype, str(case.length), variant.name, f"{ms:.3g}"),
                "" if base is None else f"{ms / base:.2f}",
                f"{flops / 1e12:.3g}" if flops else "",
                f"{sum(one.bytes for one in variant.work) / 1e9:.3g}",
                "arithmetic" if arithmetic else "memory",
                ", ".join(f"{name} ≤ {limit:g}" for name, limit in variant.bounds.items()),
            )
            rows.append(cells)
    say(console, f"Modelled, not measured: {device.name}")
    console.print(grid((*names, *numbers), rows, left=names, wrap=numbers))
    say(
        console,
        f"Assumed: attention at {device.rate('attention') / 1e12:.0f} TFLOP/s ({roofline.ATTENTION_SHARE:.1%} of "
        f"{device.tflops:g} dense bfloat16), other products at {device.rate('product') / 1e12:.0f} "
        f"({roofline.PRODUCT_SHARE:.0%}), memory at {roofline.COPY_SHARE * device.bandwidth / 1e12:.2f} TB/s "
        f"({roofline.COPY_SHARE:.0%} of {device.bandwidth / 1e12:g}).\n"
        "Counted: the work of our kernels (the backward of attention takes 24 products, 15 would be the least), every "
        "stream once; the plain step's row-wise layers as if they were fused too. Launches, tails and waiting are "
        "left out, so short kernels take longer than this.",
    )
