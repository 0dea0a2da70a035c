"""`python -m bench`: ratios of the fused ops and of the penalty step, gated, interleaved, written as rows."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.markup import escape

from aajr_kernels.training.progress import Progress
from common.command import run

from . import compare as comparison
from . import suites as registry
from . import tables
from .allocator import keep_memory
from .case import DTYPES, Case, Selection
from .roofline import DEVICES
from .row import append_rows, environment
from .run import Outcome, run_case

#: a name for several suites
GROUPS = {"ops": ("norm", "activation", "rotary")}
Part = Literal["both", "forward", "backward"]
Place = Literal["cpu", "cuda"]
Model = Literal["a100", "h100", "h200", "b200", "mi300x", "rtx4090", "rtx5090"]


def bad(text: str, option: str | None = None) -> typer.BadParameter:
    return typer.BadParameter(text, param_hint=option)


def option(help: str, *names: str, **options: Any) -> Any:
    return typer.Option(*names, help=help, **options)


def bench(
    suites: Annotated[
        list[str] | None, typer.Argument(help="Suites, or SUITE:FAMILY. Default: all that can run here.")
    ] = None,
    dtype: Annotated[list[str] | None, option("Dtype; repeatable. Default: each suite's own.")] = None,
    lengths: Annotated[str | None, option("Lengths, separated by commas. Default: each suite's own.")] = None,
    part: Annotated[Part, option("Passes to be timed (ops and steps).")] = "both",
    device: Annotated[
        Place | None,
        option("Default: suite gpu on a device if there is one, the others on the CPU."),
    ] = None,
    repeats: Annotated[int | None, option("Timed rounds. Default: each case's own.", min=1)] = None,
    threads: Annotated[int | None, option("Threads of torch and ours. Default: 2.", min=1)] = None,
    peak: Annotated[
        bool | None,
        option("Peak memory of every case or of none. Default: where bounded.", "--peak/--no-peak"),
    ] = None,
    rows: Annotated[Path | None, option("Append the rows to this file, one JSON line each.")] = None,
    model: Annotated[
        Model | None, option("Measure nothing: predict the times on this device. Default: suite gpu.")
    ] = None,
    check: Annotated[bool, option("Exit with 1 if a row is outside its bounds.", "--check")] = False,
    quick: Annotated[
        bool, option("One small case of every family, three rounds, no peaks of memory.", "--quick")
    ] = False,
    baseline: Annotated[
        Path | None,
        option("Folder of baselines: exit with 1 if a ratio is 15 % above that of this kind of machine."),
    ] = None,
    update: Annotated[bool, option("With --baseline: write it instead of comparing.", "--update")] = False,
    listed: Annotated[bool, option("List the cases and their bounds.", "--list")] = False,
) -> None:
    """Speed and memory of the fused ops and of the penalty step, as ratios to PyTorch's own.

    The gradients of a case are compared with float64 first; where they are wrong no speed is reported. Then all its
    variants run interleaved in this process, and the minimum counts. Peaks of memory come from fresh processes.

    A variant that runs out of memory has a row with `failure`, and the rest goes on. Rows are written case by case, so
    that an interrupted run keeps those that were finished.

    Exit code 0: done, 1: gradients are wrong, a case failed, with --check a bound is missed, or a ratio is above its
    baseline, 2: bad arguments, 130: interrupted.
    """
    console = tables.wide_console()
    if model is not None:
        _predict(model, suites or ["gpu"], dtype, lengths, console)
        return
    if update and baseline is None:
        raise bad("it goes with --baseline FOLDER.", "--update")
    count = threads or min(2, os.cpu_count() or 1)
    if baseline is not None:
        file = comparison.baseline_file(baseline, {**environment(), "threads": count})
        try:
            expected = comparison.read_baseline(file, update)
        except (OSError, ValueError) as error:
            raise bad(str(error), "--baseline") from error
        repeats = max(repeats or 0, comparison.ROUNDS)
    cases = _cases(suites, dtype, lengths, everything=listed, part=part, device=device)
    if quick:
        cases, repeats, peak = registry.quick(cases), repeats or 3, bool(peak)
        if not cases:
            raise bad("nothing of that is quick: name another suite.", "--quick")
    if listed:
        console.print(tables.listing(cases))
        return
    if rows is not None and not rows.absolute().parent.is_dir():
        raise bad(f"there is no folder {rows.parent}: make it first.", "--rows")
    start, before = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        results = _run(cases, repeats, peak, rows, console)
    finally:
        torch.set_num_threads(before)
    tables.show_verdict(results, time.perf_counter() - start, console)
    failed = any(result.failures or (check and result.missed) for result in results)
    if baseline is not None and update:
        failed |= not comparison.write_baseline(file, expected, results, console)
    elif baseline is not None:
        failed |= not comparison.passes(expected, results, console)
    if failed:
        raise typer.Exit(1)


def _cases(
    names: list[str] | None,
    dtypes: Sequence[str] | None,
    lengths: str | None,
    everything: bool = False,
    part: str = "both",
    device: str | None = None,
) -> list[Case]:
    """The cases of the suites and families that were named; those without a device for them only on request."""
    suites, whole = registry.SUITES, part == "both"
    if unknown := sorted(set(dtypes or ()) - set(DTYPES)):
        raise bad(f"{', '.join(unknown)}: choose from {', '.join(DTYPES)}.", "--dtype")
    if device == "cuda" and not torch.cuda.is_available():
        raise bad("torch sees no CUDA or ROCm device: --model h100 predicts its times.", "--device")
    on_device = device != "cpu" and torch.cuda.is_available()
    absent = [name for name, suite in suites.items() if suite.device != "cpu" and not on_device]
    sizes = _lengths(lengths) if lengths is not None else None
    usual = [n for n, suite in suites.items() if suite.usual and n not in absent and (whole or suite.parts)]
    families: dict[str, set[str]] = {}
    for name in names or (suites if everything else usual):
        for one in GROUPS.get(name, (name,)):
            suite, _, family = one.partition(":")
            if suite not in suites:
                raise bad(f"suite {suite!r} is unknown: choose from {', '.join((*GROUPS, *suites))}.")
            if family and family not in suites[suite].families:
                options = ", ".join(f"{suite}:{one}" for one in suites[suite].families)
                raise bad(f"suite {suite} has no family {family!r}: choose from {options}.")
            if not whole and not suites[suite].parts:
                raise bad(
                    f"suite {suite} is timed as a whole, or has families for either: leave it out.", "--part"
                )
            if suite in absent and not everything:
                raise bad(
                    f"suite {suite} needs a CUDA or ROCm device, and torch sees none (or --device says cpu): "
                    "--model h100 predicts its times."
                )
            families.setdefault(suite, set()).update([family] if family else suites[suite].families)
    shared = (part, device or "cpu")
    selections = {
        n: Selection(tuple(dtypes or ()) or None, sizes, tuple(f), *shared) for n, f in families.items()
    }
    return [case for name, selection in selections.items() for case in suites[name].cases(selection)]


def _lengths(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 2:
        raise bad(f"{text!r} is no list of lengths above 1: write for example 512,2048.", "--lengths")
    return sizes


def _run(
    cases: list[Case], repeats: int | None, peak: bool | None, rows: Path | None, console: Console
) -> list[Outcome]:
    keep_memory()
    facts = environment()
    tables.say(
        console,
        f"{escape(facts['cpu'])}, torch {facts['torch']} ({facts['torch_capability']}), native module: "
        f"{facts['native_capability'] or 'none'}, {facts['threads']} threads",
    )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        tables.say(console, f"[yellow]The machine is busy (load {load:.1f}): ratios may be off.[/]")
    results: list[Outcome] = []
    with Progress() as progress:
        # a gate and a warm-up cost about as much as two rounds
        rounds = [(repeats or case.repeats if case.timed else 0) + 2 for case in cases]
        progress.stage("gates and rounds", sum(rounds))
        try:
            for number, case in enumerate(cases):

                def tell(text: str, name: str = case.name) -> None:
                    step = progress.begin if text.startswith(("round", "gate")) else progress.note
                    step(f"{name}: {text}")

                try:
                    outcome = run_case(case, facts, repeats=repeats, peak=peak, progress=tell)
                except Exception as error:  # the other cases go on
                    outcome = Outcome(case, failures=[f"{type(error).__name__}: {error}"], gate=False)
                results.append(outcome)
                tables.show_outcome(outcome, console)
                if rows is not None:
                    append_rows(rows, outcome.rows)
                progress.reach(sum(rounds[: number + 1]), case.name)
        except KeyboardInterrupt:
            progress.stop()
            kept = f"; their rows are in {escape(str(rows))}" if rows is not None else ""
            console.print(f"[yellow]Interrupted after {len(results)} of {len(cases)} cases{kept}.[/]")
            raise typer.Exit(130) from None
    return results


def _predict(
    model: str, names: list[str], dtypes: Sequence[str] | None, lengths: str | None, console: Console
) -> None:
    cases = [c for c in _cases(names, dtypes, lengths, everything=True) if any(v.work for v in c.variants)]
    if not cases:
        raise bad(
            f"nothing of {', '.join(names)} is modelled: name suite gpu or a family of it, or method:context with "
            "--dtype bfloat16.",
            "--model",
        )
    tables.show_predictions(cases, DEVICES[model], console)


if __name__ == "__main__":
    run(bench, "bench", "bench")
