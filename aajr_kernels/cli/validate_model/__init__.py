"""`aajr validate --model`: the acceptance test of a user's own model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...training.progress import Progress
from ..info import package_version
from .checks import CONFIRMED, Check, Report, as_json, steps, validate_model
from .loading import CannotValidate, load, prepare

BATCH = 2
_STYLES = {"pass": "[green]pass[/]", "fail": "[bold red]FAIL[/]", "shown": "[dim]peer[/]"}


def run(
    spec: str,
    dtypes: tuple[str, ...],
    device: str,
    length: int,
    layers: int | None,
    seed: int,
    json_wanted: bool,
) -> None:
    """Load, check, print; see :func:`aajr_kernels.cli.validate.validate`.

    Raises:
        typer.BadParameter: the model cannot be loaded or called.
        typer.Exit: with 1 where a check failed.
    """
    start = time.perf_counter()
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    with Progress() as progress:
        progress.stage("the model is loaded")
        try:
            subject = prepare(load(spec, layers), BATCH, length, seed)
            progress.stage("checks", steps(dtypes))
            report = validate_model(subject, dtypes, device, progress.begin)
        except CannotValidate as error:
            raise typer.BadParameter(str(error), param_hint="--model") from error
    seconds = time.perf_counter() - start
    if json_wanted:
        packages = ("aajr_kernels", "torch", "transformers", "triton")
        settings = {"spec": spec, "batch": BATCH, "length": length, "layers": layers, "seed": seed}
        run_facts = {
            "seconds": round(seconds, 2),
            "versions": {name: package_version(name) for name in packages},
        }
        print(json.dumps({**as_json(report), **settings, **run_facts}, indent=2))
    else:
        _show(report, length, seconds, console)
    if report.failures:
        raise typer.Exit(1)


def _show(report: Report, length: int, seconds: float, console: Console) -> None:
    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    say(
        f"{report.model}, {report.parameters / 1e6:.3g} M parameters; penalty in the metric {report.metric} along the "
        f"ascent direction of the loss, {BATCH} rows of {length} tokens, "
        f"{'one of them padded' if report.padded else 'without padding, as it takes no attention_mask'}."
    )
    table = Table(box=SIMPLE_HEAD, header_style="dim", padding=(0, 1))
    for column in ("step", "dtype"):
        table.add_column(column, no_wrap=True)
    for column in ("penalty", "output", "gradients", "budget", "s", "result"):
        table.add_column(column, no_wrap=True, justify="right")
    for check in report.checks:
        numbers = [_number(x) for x in (check.penalty_error, check.output_error, check.gradient_error)]
        share = f"{check.share:.0%}" if check.judged and check.share == check.share else ""
        table.add_row(check.name, check.dtype, *numbers, share, f"{check.seconds:.2g}", _STYLES[check.result])
    console.print(table)
    say(
        "[dim]Relative errors against the model in float64 with written-out layers; gradients: of all parameters, "
        "the input and the direction together, the larger one of the penalty's and those of a loss of the output.[/]"
    )
    for check in report.checks:
        if check.result == "fail" or (check.result == "shown" and check.share != check.share):
            say(f"[yellow]{check.name} {check.dtype}:[/] {escape(check.failure)}")
    say(
        f"Finite differences of the oracle's penalty confirm its gradient to {report.confirmed:.1e}."
        if report.confirmed <= CONFIRMED
        else f"Finite differences do not confirm the oracle: {report.confirmed:.1e}."
    )
    _show_coverage(report, say)
    say(_verdict(report, seconds))


def _show_coverage(report: Report, say: Callable[[str], None]) -> None:
    for what, count, modules in report.fused:
        say(f"[dim]Fused:[/] {what}, {count} x {modules}")
    for module, reason in report.left.items():
        say(f"[yellow]Not fused:[/] {module}: {escape(reason)}")
    last: Check | None = next(
        (c for c in reversed(report.checks) if c.judged and c.coverage is not None), None
    )
    if last is not None and last.coverage is not None:
        shares: dict[str, float] = {}
        for _, backend, _, share in last.coverage.rows():
            shares[backend] = shares.get(backend, 0.0) + share
        parts = ", ".join(f"{share:.1%} {backend}" for backend, share in shares.items() if share > 0)
        say(f"Arithmetic of the {last.name} step in {last.dtype}: {parts}.")
    if report.fallbacks:
        say(
            f"[yellow]By the generic fallback (exact, slower):[/] {', '.join(map(escape, report.fallbacks))}."
        )


def _number(value: float) -> str:
    return f"{value:.1e}" if value == value else "-"


def _verdict(report: Report, seconds: float) -> str:
    if report.failures:
        return f"[bold red]Failed[/] in {seconds:.0f} s: " + escape(" ".join(report.failures))
    judged = [check for check in report.checks if check.judged]
    steps = ", ".join(dict.fromkeys(f"{check.name} on {check.device}" for check in judged))
    return (
        f"[bold green]Passed:[/] {report.model}, {steps}; at most {max(c.share for c in judged):.0%} of an error "
        f"budget used, in {seconds:.0f} s."
    )
