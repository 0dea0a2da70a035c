"""Tables: of cases, rows and predictions on the terminal, and of committed rows in Markdown between marks of a page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common import pages

from . import roofline
from .case import Case, Variant
from .plot import finite, model_name, rank, whole_models
from .row import Row
from .run import Outcome

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
    return pages.table(head, body)


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
    return pages.table(["S", *(PEAKS[variant] for variant in used), "rows"], body)


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
            changed |= pages.between(path, *marks(name), table(entries, prefix))
    return changed


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


# --------------------------------------------------------------------------------------------------- on a terminal
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
    units = {"ratio": "", "peak_ratio": " peak", "ms": " ms", "copy_ratio": " of a copy"}
    return f"≤ {value:g}{units[name]}"


def show_outcome(outcome: Outcome, console: Console) -> None:
    """The rows of one case, or why there are none."""
    say(console, f"\n[bold]{outcome.case.name}[/]  [dim]{escape(outcome.case.why)}[/]")
    for failure in outcome.failures:
        text = "gate red, no speed" if outcome.gate else "failed"
        say(console, f"[bold red]{text}:[/] {escape(failure)}")
    if outcome.rows:
        console.print(_measured(outcome.rows))
    for name, reason in outcome.broken.items():
        say(console, f"[bold red]{escape(name)}:[/] {escape(reason)}")
    for name, reason in outcome.left_out.items():
        say(console, f"[yellow]{escape(name)} left out:[/] [dim]{escape(reason.splitlines()[0])}[/]")


def _measured(rows: Sequence[Row]) -> Table:
    def column(form: str, number: Callable[[Row], float | None], scale: float = 1.0) -> list[str]:
        values = [number(row) for row in rows]
        return ["" if value is None else format(value * scale, form) for value in values]

    columns = {
        "variant": [row.variant for row in rows],
        "backend": [row.backend for row in rows],
        "min ms": column(".2f", lambda row: row.min_ms),
        "median": column(".2f", lambda row: row.median_ms),
        "ratio": column(".2f", lambda row: row.ratio),
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
            ms, flops = times[variant.name], sum(one.flops for one in variant.work)
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
