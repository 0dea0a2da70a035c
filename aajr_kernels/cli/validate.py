"""`aajr validate`: every op, dtype and backend against the float64 oracle, or a model of the user's."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape

from ..backends import choice
from ..backends.errors import BackendUnavailable
from ..testing.cases import OPS
from ..testing.checks import Row, validate_all
from ..testing.targets import DEVICES, DTYPES, Target, find_targets
from ..training.progress import Progress
from .info import package_version, why_no_accelerator
from .printing import RESULTS, print_json, say, table

#: failures of one row that are printed; --json has them all
SHOWN = 5


def validate(
    model: Annotated[
        str | None,
        typer.Option(
            help="Check this model instead of the ops: a folder or cached name of transformers, or MODULE:NAME of a "
            "model, of a function that returns one, or of a class of transformers (built small)."
        ),
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=4, help="With --model: tokens in a row of the batch. Default: 16.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="With --model: only so many of its layers, to save memory.")
    ] = None,
    op: Annotated[list[str] | None, typer.Option(help="Op to check; repeatable. Default: all.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Dtype to check; repeatable. Default: all.")] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="Backend to check; repeatable. Default: all that can run here.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random inputs.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a table.")
    ] = False,
) -> None:
    """Check every op against a float64 oracle: all outputs and all gradients, per dtype and backend.

    The oracle is plain formulas under PyTorch's forward mode and autograd.
    float64 must agree to 1e-10; a lower dtype may be off by twice the error of
    the same formula in eager PyTorch plus a few units in the last place.

    With --model a small batch goes through the model, unmodified and after fuse(): penalty,
    output and all gradients against the same model in float64 with written-out layers,
    beside finite differences and PyTorch's own forward mode; and what is not fused, and why.

    Exit code 0: everything passed, 1: something failed, 2: bad arguments.
    """
    _selected("--device", [device], DEVICES)
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(f"there is no such device: {why_no_accelerator()}.", param_hint="--device")
    if model is not None:
        from . import validate_model
        from .validate_model.checks import DTYPES as MODEL_DTYPES

        if op or backend:
            raise typer.BadParameter("--model checks a whole model: leave --op and --backend out.")
        place = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
        usual = ["float64", "float32", *(["bfloat16"] if place == "cuda" else [])]
        dtypes = _selected("--dtype", dtype or usual, list(MODEL_DTYPES))
        validate_model.run(model, tuple(dtypes), place, length or 16, layers, seed, as_json)
        return
    if length is not None or layers is not None:
        raise typer.BadParameter("they go with --model.", param_hint="--length and --layers")
    ops = _selected("--op", op, list(OPS))
    dtypes = _selected("--dtype", dtype, list(DTYPES))
    backends = _selected("--backend", backend, list(choice.BACKENDS)) if backend else None
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
    if as_json:
        print_json(_report(rows, left_out, seed, seconds))
    else:
        _show(rows, left_out, seconds, Console())
    if any(row.failures for row in rows):
        raise typer.Exit(1)


def _selected(option: str, names: Sequence[str] | None, choices: Sequence[str]) -> list[str]:
    """`names` without repetitions, in the order of `choices`; all of them if None."""
    unknown = [name for name in names or () if name not in choices]
    if unknown:
        raise typer.BadParameter(
            f"{unknown[0]!r} is unknown: choose from {', '.join(choices)}.", param_hint=option
        )
    return [name for name in choices if not names or name in names]


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
