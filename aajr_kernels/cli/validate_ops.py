"""`aajr validate`: every op, dtype and backend against the float64 oracle."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from ..backends import choice
from ..backends.errors import BackendUnavailable
from ..testing.cases import OPS
from ..testing.checks import Row, validate_all
from ..testing.targets import DTYPES, Target, find_targets
from ..training.progress import Progress
from .info import package_version
from .printing import RESULTS, print_json, say, table
from .validate import selected

#: failures of one row that are printed; --json has them all
SHOWN = 5


def run(
    op: list[str] | None,
    dtype: list[str] | None,
    backend: list[str] | None,
    device: str,
    seed: int,
    json_wanted: bool,
) -> None:
    """Check and print; see :func:`aajr_kernels.cli.validate.validate`.

    Raises:
        typer.BadParameter: an op, a dtype or a backend is unknown or cannot be checked here.
        typer.Exit: with 1 where a check failed.
    """
    ops = selected("--op", op, list(OPS))
    dtypes = selected("--dtype", dtype, list(DTYPES))
    backends = selected("--backend", backend, list(choice.BACKENDS)) if backend else None
    try:
        targets, left_out = find_targets(backends, device)
    except BackendUnavailable as error:
        raise typer.BadParameter(str(error), param_hint="--backend") from error
    plan, reasons = _plan(dtypes, targets)
    if not plan:
        raise typer.BadParameter(
            f"nothing is left to check: {'; '.join(dict.fromkeys(reasons.values()))}.", param_hint="--dtype"
        )

    start = time.perf_counter()
    with Progress() as progress:
        progress.stage("checks", len(ops) * len(plan))
        rows = validate_all(ops, plan, seed, lambda op, dtype: progress.begin(f"{op} {dtype}"))
    seconds = time.perf_counter() - start
    if not any(row.cases or row.failures for row in rows):
        raise typer.BadParameter(f"nothing was checked: {rows[0].skipped[0]}", param_hint="--backend")
    left_out |= {f"{dtype} on {target}": reason for (dtype, target), reason in reasons.items()}
    if json_wanted:
        print_json(_report(rows, left_out, seed, seconds))
    else:
        _show(rows, left_out, seconds, Console())
    if any(row.failures for row in rows):
        raise typer.Exit(1)


def _plan(
    dtypes: Sequence[str], targets: Sequence[Target]
) -> tuple[dict[str, list[Target]], dict[tuple[str, str], str]]:
    """Targets by dtype, and why a pair is left out."""
    plan: dict[str, list[Target]] = {}
    reasons: dict[tuple[str, str], str] = {}
    for dtype in dtypes:
        for target in targets:
            reason = target.why_not(dtype)
            if reason is None:
                plan.setdefault(dtype, []).append(target)
            else:
                reasons[dtype, str(target)] = reason
    return plan, reasons


def _report(rows: Sequence[Row], left_out: Mapping[str, str], seed: int, seconds: float) -> dict[str, Any]:
    """Everything as plain data."""
    return {
        "passed": not any(row.failures for row in rows),
        "versions": {name: package_version(name) for name in ("aajr_kernels", "torch", "triton")},
        "seed": seed,
        "seconds": round(seconds, 2),
        "rows": [{**asdict(row), "result": row.result} for row in rows],
        "left_out": dict(left_out),
    }


def _show(rows: Sequence[Row], left_out: Mapping[str, str], seconds: float, console: Console) -> None:
    """The table, what failed, what was left out, and the verdict."""
    sheet = table(["op", "dtype", "backend"], ["cases", "worst error", "budget", "result"])
    lines = []
    for row in rows:
        where = row.backend if row.device == "cpu" else f"{row.backend} {row.device}"
        numbers = (f"{row.worst_error:.1e}", f"{row.budget_share:.0%}") if row.cases else ("", "")
        sheet.add_row(row.op, row.dtype, where, str(row.cases), *numbers, RESULTS[row.result])
        name = f"{row.op} {row.dtype} {row.backend}:"
        lines += [f"[red]{name}[/] {escape(failure)}" for failure in row.failures[:SHOWN]]
        if len(row.failures) > SHOWN:
            lines.append(f"[red]{name}[/] {len(row.failures) - SHOWN} more (--json has them all).")
        if row.skipped:
            lines.append(
                f"[yellow]{name}[/] {len(row.skipped)} of {len(row.skipped) + row.cases} cases skipped, the first: "
                f"{escape(row.skipped[0])}"
            )
    console.print(sheet)
    lines += [f"[dim]Left out: {name}: {escape(reason)}.[/]" for name, reason in left_out.items()]
    say(console, "\n".join([*lines, _verdict(rows, seconds)]))


def _verdict(rows: Sequence[Row], seconds: float) -> str:
    failed = [row for row in rows if row.failures]
    if failed:
        ops = ", ".join(dict.fromkeys(row.op for row in failed))
        return f"[bold red]Failed:[/] {ops} ({len(failed)} of {len(rows)} rows), in {seconds:.0f} s."
    ran = [row for row in rows if row.cases]
    where = ", ".join(dict.fromkeys(f"{row.backend} on {row.device}" for row in ran))
    return (
        f"[bold green]Passed:[/] {sum(row.cases for row in ran)} cases of {len({row.op for row in ran})} ops, "
        f"{where}; at most {max(row.budget_share for row in ran):.0%} of an error budget used, in {seconds:.0f} s."
    )
