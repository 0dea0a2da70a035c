"""`python -m bench.report`: committed rows on the terminal; with ``--write`` the tables of pages, and pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from common import pages
from common.command import fail, run

from .plot import finite, is_whole_step, model_name, plot_contexts, plot_errors, plot_steps, rank
from .row import Entry, Row, read_entries
from .tables import measured, say, wide_console

#: the checkout
ROOT = Path(__file__).resolve().parents[1]
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
#: what is left out -> suite, and of every row family, variant and the part that is computed
SAVINGS: Mapping[str, tuple[str, tuple[tuple[str, str, str], ...]]] = {
    "context computed once per step of the method, S = 2,048": (
        "method",
        (
            ("context-open", "with penalty, shared context", "all"),
            ("context", "with penalty, shared context", "last 1/4"),
            ("context-eighth", "with penalty, shared context", "last 1/8"),
        ),
    ),
    "ignored tokens in the head, loss and penalty, 1,024 tokens": (
        "head",
        (("ignored", "fisher and loss, one in 2", "1/2"), ("ignored", "fisher and loss, one in 8", "1/8")),
    ),
    "penalty and attack on every k-th step beside the clean loss, S = 512": (
        "method",
        (("lazy", "every 2nd step", "k = 2"), ("lazy", "every 4th step", "k = 4")),
    ),
}


def read(paths: Sequence[Path], root: Path) -> list[Entry]:
    """The rows of files; those below `root` are named relative to it, others by their name only.

    Raises:
        OSError: a file cannot be read.
        ValueError: a line is no row, or no file holds any.
    """
    entries = []
    for path in map(Path.resolve, paths):
        inside = path.is_relative_to(root.resolve())
        entries += read_entries(path, path.relative_to(root.resolve()).as_posix() if inside else path.name)
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
    groups: dict[tuple[object, ...], dict[str, Entry]] = {}
    for entry in latest(entries):
        if is_whole_step(entry.row):
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


def savings(entries: Sequence[Entry], prefix: str) -> str:
    """Time over that of the same step or head with nothing left out; of several machines the last one.

    Raises:
        ValueError: no row has such a ratio.
    """
    known = {
        (e.row.suite, e.row.family, e.row.variant): e for e in latest(entries) if e.row.ratio is not None
    }
    body = []
    for title, (suite, parts) in SAVINGS.items():
        where = [(part, (suite, family, variant)) for family, variant, part in parts]
        shown = [(part, known[key]) for part, key in where if key in known]
        if shown:
            names, ratios = (part for part, _ in shown), (f"{entry.row.ratio:.2f}" for _, entry in shown)
            sources = links((entry for _, entry in shown), prefix)
            body.append([title, ", ".join(names), ", ".join(ratios), sources])
    if not body:
        raise ValueError(
            "no row has the time of a step that leaves something out: run `python -m bench method:context head:ignored "
            "--rows FILE` first."
        )
    return pages.table(["left out", "computed", "time ÷ without", "rows"], body)


def _peak(entry: Entry | None) -> str:
    if entry is None:
        return "–"
    size, ratio = f"{(entry.row.peak_bytes or 0) / 1e6:,.0f} MB", finite(entry.row.peak_ratio)
    return size if ratio is None or entry.row.variant == entry.row.base else f"{size} ({ratio:.2f})"


#: name of a table, as in its marks -> its Markdown, from all rows and the way from the page to the root
TABLES: Mapping[str, Callable[[Sequence[Entry], str], str]] = {
    "step costs": costs,
    "savings": savings,
    "memory": peaks,
}

#: function that draws -> file in docs/images
PICTURES = {plot_steps: "steps.png", plot_errors: "errors.png", plot_contexts: "context.png"}


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


def report(
    rows: Annotated[
        list[Path] | None,
        typer.Option(help="File of rows; repeatable. Default: bench/results/*.jsonl of the checkout."),
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option(
            help="Checkout: write the tables between marks of README.md and docs/, and docs/images."
        ),
    ] = None,
) -> None:
    """Show what `python -m bench` measured, case by case; of rows that measure the same the last one.

    Exit code 2: bad arguments, rows that cannot be read, or none for a table or picture.
    """
    console = wide_console()
    try:
        entries = read(rows or sorted((ROOT / "bench" / "results").glob("*.jsonl")), ROOT)
        if write is None:
            cases: dict[tuple[object, ...], list[Row]] = {}
            for entry in latest(entries):
                cases.setdefault(entry.row.case_key, []).append(entry.row)
            for group in cases.values():
                row = group[0]
                config = ", ".join(f"{name} {value}" for name, value in row.config.items())
                title = f"{row.suite}:{row.family} {row.dtype} {row.length}"
                say(console, escape(f"\n{title} · {config} · {machine(row)}, torch {row.torch}"))
                console.print(measured(group))
            return
        for path in (write / "README.md", *sorted((write / "docs").rglob("*.md"))):
            if rewrite(path, write, entries):
                say(console, f"{path}: new table")
        for draw, name in PICTURES.items():
            draw([entry.row for entry in entries], write / "docs" / "images" / name)
    except (OSError, ValueError) as error:
        fail(f"{error.filename}: {error.strerror}." if isinstance(error, OSError) else str(error))


if __name__ == "__main__":
    run(report, "bench.report", "bench")
