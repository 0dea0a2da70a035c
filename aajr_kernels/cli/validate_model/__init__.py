"""`aajr validate --model`: the acceptance test of a user's own model."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import asdict

import typer
from rich.console import Console
from rich.markup import escape

from ...training.progress import Progress
from ..info import package_version
from ..printing import RESULTS, print_json, say, table
from .checks import CONFIRMED, DTYPES, Report, validate_model
from .loading import CannotValidate, load, prepare

__all__ = ["DTYPES", "run"]

BATCH = 2


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
    with Progress() as progress:
        progress.stage("the model is loaded")
        try:
            subject = prepare(load(spec, layers), BATCH, length, seed)
            progress.stage("checks")
            report = validate_model(subject, dtypes, device, progress.begin)
        except CannotValidate as error:
            raise typer.BadParameter(str(error), param_hint="--model") from error
    seconds = time.perf_counter() - start
    if json_wanted:
        packages = ("aajr_kernels", "torch", "transformers", "triton")
        settings = {"spec": spec, "batch": BATCH, "length": length, "layers": layers, "seed": seed}
        versions = {name: package_version(name) for name in packages}
        facts = settings | {"seconds": round(seconds, 2), "versions": versions}
        print_json({"passed": not report.failures, "failures": report.failures, **asdict(report), **facts})
    else:
        console = Console()
        _show(report, length, seconds, console if console.is_terminal else Console(width=140))
    if report.failures:
        raise typer.Exit(1)


def _show(report: Report, length: int, seconds: float, console: Console) -> None:
    """The model, a table of the checks, failures, what is fused and what is not, and the verdict."""
    model = escape(report.model)
    say(
        console,
        f"{model}, {report.parameters / 1e6:.3g} M parameters; penalty in the metric {report.metric} along the "
        f"ascent direction of the loss, {BATCH} rows of {length} tokens, "
        f"{'one of them padded' if report.padded else 'without padding, as it takes no attention_mask'}.",
    )
    sheet = table(["step", "dtype"], ["penalty", "output", "gradients", "budget", "s", "result"])
    for check in report.checks:
        errors = (check.penalty_error, check.output_error, check.gradient_error)
        numbers = ["-" if error != error else f"{error:.1e}" for error in errors]
        share = f"{check.share:.0%}" if check.judged and check.share == check.share else ""
        sheet.add_row(
            escape(check.name), check.dtype, *numbers, share, f"{check.seconds:.2g}", RESULTS[check.result]
        )
    console.print(sheet)
    lines = [
        "[dim]Relative errors against the model in float64 with written-out layers; gradients: of all parameters, "
        "the input and the direction together, the larger one of the penalty's and those of a loss of the output.[/]"
    ]
    for check in report.checks:
        if check.result == "fail" or (check.result == "shown" and check.share != check.share):
            lines.append(f"[yellow]{escape(check.name)} {check.dtype}:[/] {escape(check.failure)}")
    lines.append(
        f"Finite differences of the oracle's penalty confirm its gradient to {report.finite_differences:.1e}."
        if report.finite_differences <= CONFIRMED
        else f"Finite differences do not confirm the oracle: {report.finite_differences:.1e}."
    )
    lines += [
        "[dim]Fused:[/] " + escape("{what}, {count} x {modules}".format_map(row)) for row in report.fused
    ]
    lines += [
        f"[yellow]Not fused:[/] {escape(f'{module}: {reason}')}"
        for module, reason in report.not_fused.items()
    ]
    judged = [check for check in report.checks if check.judged]
    last = judged[-1]
    shares: dict[str, float] = defaultdict(float)
    for operation in last.operations:
        shares[operation["backend"]] += operation["share"]
    parts = ", ".join(f"{share:.1%} {backend}" for backend, share in shares.items() if share > 0)
    if parts:
        lines.append(f"Arithmetic of the {last.name} step in {last.dtype}: {parts}.")
    if report.fallbacks:
        names = ", ".join(map(escape, report.fallbacks))
        lines.append(f"[yellow]By the generic fallback (exact, slower):[/] {names}.")
    if report.failures:
        lines.append(f"[bold red]Failed[/] in {seconds:.0f} s: {escape(' '.join(report.failures))}")
    else:
        steps = ", ".join(dict.fromkeys(f"{check.name} on {check.device}" for check in judged))
        lines.append(
            f"[bold green]Passed:[/] {model}, {steps}; at most {max(c.share for c in judged):.0%} of an error "
            f"budget used, in {seconds:.0f} s."
        )
    say(console, "\n".join(lines))
