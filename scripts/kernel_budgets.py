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

rules: Any = importlib.import_module("gpu_tests.budget_rules")
shipped: Any = importlib.import_module("gpu_tests.shipped")
compiler: Any = importlib.import_module("gpu_tests.compiler")

DOCS = ROOT / "docs" / "triton.md"
BEGIN, END = (
    "<!-- kernel budgets: python scripts/kernel_budgets.py --docs -->",
    "<!-- end of kernel budgets -->",
)
Kernels = dict[str, dict[str, Any]]


def compile_all(pairs: list[tuple[Any, str]], jobs: int) -> dict[tuple[str, str], Kernels | Exception]:
    """What the kernels of every (configuration, processor) take, or why they do not compile."""
    local, started = threading.local(), []
    found: dict[tuple[str, str], Kernels | Exception] = {}
    seconds: dict[str, float] = {}

    def ask(config: Any, architecture: str) -> Kernels:
        if not hasattr(local, "compiler"):
            local.compiler = compiler.Compiler()
            started.append(local.compiler)
        start = time.monotonic()
        try:
            answer: Kernels = local.compiler.ask("gpu_tests.shipped", config.name, architecture)
        finally:
            seconds[f"{config.name} {architecture}"] = time.monotonic() - start
        return answer

    with concurrent.futures.ThreadPoolExecutor(jobs) as threads:
        futures = {threads.submit(ask, *pair): pair for pair in pairs}
        for done, future in enumerate(concurrent.futures.as_completed(futures), start=1):
            config, architecture = futures[future]
            print(f"\r{done}/{len(pairs)}  {config.name} {architecture}".ljust(78), end="", file=sys.stderr)
            error = future.exception()
            found[config.name, architecture] = error if isinstance(error, Exception) else future.result()
    print(file=sys.stderr)
    for process in started:
        process.close()
    slowest = sorted(seconds.items(), key=lambda item: -item[1])[:8]
    print("slowest:", "; ".join(f"{name} {took:.0f} s" for name, took in slowest), file=sys.stderr)
    return found


def changed(before: dict[str, Any] | None, now: dict[str, Any], name: str) -> str:
    if before is None or before[name] == now[name]:
        return f"{now[name]:,}"
    colour = "red" if now[name] > before[name] else "green"
    return f"[{colour}]{now[name]:,} ({now[name] - before[name]:+,})[/]"


def show(
    pairs: list[tuple[Any, str]], found: dict[tuple[str, str], Kernels | Exception], committed: Any
) -> None:
    """A line per kernel; in brackets the difference to the budget."""
    title = f"Triton {rules.family()}: registers and stack per thread, spills in hot loops / anywhere, bytes"
    table = Table(title=title)
    for name in ("configuration", "processor", "kernel"):
        table.add_column(name)
    for name in ("registers", "stack", "hot", "spills", "shared", "columns", "matrix"):
        table.add_column(name, justify="right")
    for config, architecture in pairs:
        kernels = found[config.name, architecture]
        if isinstance(kernels, Exception):
            last = str(kernels).strip().splitlines()[-1]
            table.add_row(config.name, architecture, f"[red]{last}[/]")
            continue
        for kernel, row in kernels.items():
            before = committed.get(config.name, {}).get(kernel, {}).get(architecture)
            numbers = [
                changed(before, row, n)
                for n in ("registers", "stack", "hot_spills", "spills", "shared", "columns")
            ]
            matrix = " ".join(f"{count} {kind}" for kind, count in row["matrix"].items())
            new = "" if before else " [yellow](new)[/]"
            table.add_row(config.name, architecture, kernel + new, *numbers, matrix)
    Console(width=None if sys.stdout.isatty() else 190).print(table)


def write(table: Any, found: dict[tuple[str, str], Kernels | Exception]) -> None:
    """What was compiled replaces its rows; configurations that are no longer shipped go."""
    committed = table.setdefault(rules.family(), {})
    known = shipped.shipped()
    for (name, architecture), kernels in found.items():
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


def markdown(table: Any) -> str:
    """What the kernels take, of the newest version in the table: a row per configuration and kernel."""
    version = max(table, default="")
    lines = [
        f"Triton {version}; registers per thread / spills in hot loops / KB of shared memory. `-`: not compiled.",
        "",
        "| configuration | kernel | " + " | ".join(shipped.ALL) + " |",
        "|---|---|" + "---|" * len(shipped.ALL),
    ]
    for name, kernels in table.get(version, {}).items():
        if not shipped.CONFIGS[name].pinned:
            continue
        for i, (kernel, rows) in enumerate(sorted(kernels.items())):
            cells = [
                f"{row['registers']} / {row['hot_spills']} / {row['shared'] / 1024:.0f}" if row else "-"
                for row in (rows.get(architecture) for architecture in shipped.ALL)
            ]
            lines.append(f"| {name if i == 0 else ''} | `{kernel}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_table(text: str, table: Any) -> str:
    """The page with the table between its marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{markdown(table)}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="every processor, not the pinned ones alone")
    parser.add_argument("--only", default="", metavar="TEXT", help="configurations with TEXT in their name")
    parser.add_argument("--arch", action="append", choices=shipped.ALL, help="these processors alone")
    parser.add_argument("--write", action="store_true", help="make what was compiled the budget")
    parser.add_argument(
        "--docs", action="store_true", help="compile nothing, write the table of docs/triton.md"
    )
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes that compile (default 2)")
    options = parser.parse_args()
    table = rules.load()
    if options.docs:
        DOCS.write_text(with_table(DOCS.read_text(), table))
        return 0
    pairs = [
        (config, architecture)
        for config in shipped.shipped().values()
        for architecture in (config.processors if options.all else config.pinned)
        if options.only in config.name and (not options.arch or architecture in options.arch)
    ]
    if not pairs:
        raise SystemExit(
            "kernel_budgets: no shipped configuration is chosen: see tests/gpu_tests/shipped.py."
        )
    found = compile_all(pairs, options.jobs)
    show(pairs, found, table.get(rules.family(), {}))
    failures = [str(error) for error in found.values() if isinstance(error, Exception)]
    for config, architecture in pairs:
        kernels = found[config.name, architecture]
        if isinstance(kernels, Exception):
            continue
        for kernel, row in kernels.items():
            failures += [f"{config.name}: {x}" for x in rules.broken_rules(config, architecture, kernel, row)]
        if not options.write:
            over = rules.over_budget(table, rules.family(), config, architecture, kernels)
            failures += [f"{config.name}: {x}" for x in over]
    if options.write:
        write(table, found)
        print(f"wrote {rules.PATH.relative_to(ROOT)}")
    print("\n".join(failures) or f"{len(pairs)} configurations within their rules")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
