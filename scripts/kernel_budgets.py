"""Compile the shipped configurations of the Triton kernels, show what they take, and keep the committed budgets.

    python scripts/kernel_budgets.py                     the pinned ones: what changed against the budgets
    python scripts/kernel_budgets.py --only "head" --all  every configuration and processor with that in its name
    python scripts/kernel_budgets.py --all --write       and make what was compiled the budget
    python scripts/kernel_budgets.py --docs              write the table of docs/triton.md from the budgets

No GPU is needed; two processes compile. Exit code 1: something breaks a rule or exceeds its budget (with --write:
breaks a rule).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from common import pages  # noqa: E402

rules: Any = importlib.import_module("backends.triton.budget_rules")
shipped: Any = importlib.import_module("backends.triton.shipped")
compiler: Any = importlib.import_module("backends.triton.compiler")

DOCS = ROOT / "docs" / "triton.md"
BEGIN, END = (
    "<!-- kernel budgets: python scripts/kernel_budgets.py --docs -->",
    "<!-- end of kernel budgets -->",
)
Kernels = dict[str, dict[str, Any]]


def compile_all(pairs: list[tuple[Any, str]], jobs: int) -> dict[tuple[str, str], Kernels | Exception]:
    """Resources of the kernels of every (configuration, processor), or why they do not compile; in order."""
    local, started = threading.local(), []
    seconds: dict[str, float] = {}

    def ask(config: Any, architecture: str) -> Kernels | Exception:
        if not hasattr(local, "compiler"):
            local.compiler = compiler.Compiler()
            started.append(local.compiler)
        name, start = f"{config.name} {architecture}", time.monotonic()
        try:
            answer: Kernels | Exception = local.compiler.ask(
                "backends.triton.shipped", config.name, architecture
            )
        except Exception as error:
            answer = error
        seconds[name] = time.monotonic() - start
        print(f"\r{len(seconds)}/{len(pairs)}  {name}".ljust(78), end="", file=sys.stderr)
        return answer

    with concurrent.futures.ThreadPoolExecutor(jobs) as threads:
        answers = list(threads.map(lambda pair: ask(*pair), pairs))
    print(file=sys.stderr)
    for process in started:
        process.close()
    slowest = sorted(seconds.items(), key=lambda item: -item[1])[:8]
    print("slowest:", "; ".join(f"{name} {took:.0f} s" for name, took in slowest), file=sys.stderr)
    return {(config.name, architecture): a for (config, architecture), a in zip(pairs, answers)}


def changed(before: dict[str, Any] | None, now: dict[str, Any], name: str) -> str:
    difference = 0 if before is None else now[name] - before[name]
    colour = "red" if difference > 0 else "green"
    return f"{now[name]:,}" + (f" [{colour}]({difference:+,})[/]" if difference else "")


def show(kernels: dict[tuple[str, str], Kernels | Exception], committed: Any) -> None:
    """A line per kernel; in brackets the difference to the budget."""
    title = f"Triton {rules.family()}: registers and stack per thread, spills in hot loops / anywhere, bytes"
    table = Table("configuration", "processor", "kernel", title=title)
    for name in ("registers", "stack", "hot", "spills", "shared", "columns", "matrix"):
        table.add_column(name, justify="right")
    for (config, architecture), rows in kernels.items():
        if isinstance(rows, Exception):
            table.add_row(config, architecture, f"[red]{str(rows).strip().splitlines()[-1]}[/]")
            continue
        for kernel, row in rows.items():
            before = committed.get(config, {}).get(kernel, {}).get(architecture)
            names = ("registers", "stack", "hot_spills", "spills", "shared", "columns")
            numbers = [changed(before, row, name) for name in names]
            matrix = " ".join(f"{count} {kind}" for kind, count in row["matrix"].items())
            table.add_row(
                config, architecture, kernel + ("" if before else " [yellow](new)[/]"), *numbers, matrix
            )
    Console(width=None if sys.stdout.isatty() else 190).print(table)


def write(table: Any, compiled: dict[tuple[str, str], Kernels | Exception]) -> None:
    """Replace the rows of what was compiled; configurations that are no longer shipped go."""
    committed = table.setdefault(rules.family(), {})
    known = shipped.shipped()
    for (name, architecture), kernels in compiled.items():
        if isinstance(kernels, Exception):
            continue
        rows = committed.setdefault(name, {})
        for kernel in list(rows):
            rows[kernel].pop(architecture, None)
        for kernel, row in kernels.items():
            rows.setdefault(kernel, {})[architecture] = {key: row[key] for key in (*rules.BOUNDED, "matrix")}
    for version, configs in table.items():
        kept = {name: configs[name] for name in known if name in configs}
        table[version] = {
            name: {kernel: rows for kernel, rows in kernels.items() if rows} for name, kernels in kept.items()
        }
    rules.save(table)


def write_page(page: Path, table: Any) -> bool:
    """Put the pinned budgets of the newest version between the marks of a page; whether that changed it."""
    version = max(table, default="")
    text = f"Triton {version}; registers per thread / spills in hot loops / KB of shared memory. `-`: not compiled."
    lines = []
    for name, kernels in table.get(version, {}).items():
        for i, (kernel, rows) in enumerate(sorted(kernels.items()) if shipped.CONFIGS[name].pinned else ()):
            cells = [
                f"{row['registers']} / {row['hot_spills']} / {row['shared'] / 1024:.0f}" if row else "-"
                for row in (rows.get(architecture) for architecture in shipped.ALL)
            ]
            lines.append(["" if i else name, f"`{kernel}`", *cells])
    heads = ["configuration", "kernel", *shipped.ALL]
    return pages.between(page, BEGIN, END, f"{text}\n\n{pages.table(heads, lines)}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="every processor, not only the pinned ones")
    parser.add_argument("--only", default="", metavar="TEXT", help="configurations with TEXT in their name")
    parser.add_argument("--arch", action="append", choices=shipped.ALL, help="only these processors")
    parser.add_argument("--write", action="store_true", help="make what was compiled the budget")
    parser.add_argument(
        "--docs", action="store_true", help="compile nothing, write the table of docs/triton.md"
    )
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes that compile (default 2)")
    options = parser.parse_args()
    table = rules.load()
    if options.docs:
        write_page(DOCS, table)
        return 0
    pairs = [
        (config, architecture)
        for config in shipped.shipped().values()
        for architecture in (config.processors if options.all else config.pinned)
        if options.only in config.name and (not options.arch or architecture in options.arch)
    ]
    if not pairs:
        raise SystemExit(
            "kernel_budgets: no shipped configuration is chosen: see tests/backends/triton/shipped.py."
        )
    compiled = compile_all(pairs, options.jobs)
    show(compiled, table.get(rules.family(), {}))
    failures = []
    for config, architecture in pairs:
        kernels = compiled[config.name, architecture]
        if isinstance(kernels, Exception):
            failures.append(str(kernels))
            continue
        broken = [
            x for name, row in kernels.items() for x in rules.broken_rules(config, architecture, name, row)
        ]
        if not options.write:
            broken += rules.over_budget(table, rules.family(), config, architecture, kernels)
        failures += [f"{config.name}: {x}" for x in broken]
    if options.write:
        write(table, compiled)
        print(f"wrote {rules.PATH.relative_to(ROOT)}")
    print("\n".join(failures) or f"{len(pairs)} configurations within their rules")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
