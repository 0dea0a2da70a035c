"""`python -m bench`: ratios of the fused ops and of the penalty step, gated, interleaved, written as rows."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from aajr_kernels.training.progress import Progress
from common.command import run

from . import compare as comparison
from . import suites as registry
from . import tables
from .allocator import keep_memory
from .case import DTYPES, PARTS, Case, Selection
from .roofline import DEVICES
from .row import append_rows, environment, read_rows
from .run import Outcome, run_case

#: a name for several suites
GROUPS = {"ops": ("norm", "activation", "rotary")}
#: --capability -> values of the variables that hold every library to it; they are read when a process starts
VARIABLES = ("AAJR_CPU_CAPABILITY", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
CAPABILITIES = {
    "avx2": dict(zip(VARIABLES, ("avx2", "avx2", "AVX2", "AVX2"))),
    "avx512": dict(zip(VARIABLES, ("avx512", "avx512", "AVX512", "AVX512_CORE_BF16"))),
}


def bad(text: str, option: str | None = None) -> typer.BadParameter:
    return typer.BadParameter(text, param_hint=option)


def option(help: str, *names: str, **options: Any) -> Any:
    return typer.Option(*names, help=help, **options)


def bench(
    ctx: typer.Context,
    suites: Annotated[
        list[str] | None, typer.Argument(help="Suites, or SUITE:FAMILY. Default: all that can run here.")
    ] = None,
    dtype: Annotated[list[str] | None, option("Dtype; repeatable. Default: each suite's own.")] = None,
    lengths: Annotated[str | None, option("Lengths, separated by commas. Default: each suite's own.")] = None,
    part: Annotated[str, option("Time forward, backward or both (ops and steps).")] = "both",
    device: Annotated[
        str | None,
        option("cpu or cuda. Default: suite gpu on a device if there is one, the others on the CPU."),
    ] = None,
    repeats: Annotated[int | None, option("Timed rounds. Default: each case's own.", min=1)] = None,
    threads: Annotated[int | None, option("Threads of torch and ours. Default: 2.", min=1)] = None,
    capability: Annotated[
        str | None, option("Hold every library to avx2 or avx512, in a process of its own.")
    ] = None,
    peak: Annotated[
        bool | None,
        option("Peak memory of every case or of none. Default: where bounded.", "--peak/--no-peak"),
    ] = None,
    rows: Annotated[Path | None, option("Append the rows to this file, one JSON line each.")] = None,
    model: Annotated[
        str | None, option("Measure nothing: predict the times on h100, a100, b200, mi300x... (suite gpu).")
    ] = None,
    tune: Annotated[
        bool, option("On a GPU: measure tiles of the attention kernels, write the best.", "--tune")
    ] = False,
    check: Annotated[bool, option("Exit with 1 if a row is outside its bounds.", "--check")] = False,
    quick: Annotated[
        bool, option("One small case of every family, three rounds, no peaks of memory.", "--quick")
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        option("Measure nothing: the ratios of the second file of rows against the first."),
    ] = None,
    against: Annotated[
        str | None, option("Also build this commit in a worktree, time it in turn, and compare.")
    ] = None,
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
    console = Console()
    console = console if console.is_terminal else Console(width=140)  # a file or a pipe takes wide tables
    if tune:
        _tune(console)
        return
    if model is not None:
        _predict(model, suites or ["gpu"], dtype, lengths, console)
        return
    if compare is not None:
        _refuse_others(ctx, "compare")
        _compare_files(*compare, console)
        return
    if capability is not None:
        _hold_to(capability, ctx)
    if against is not None:
        sizes = ("suites", "dtype", "lengths", "part", "device", "repeats", "threads", "rows", "quick")
        _refuse_others(ctx, "against", *sizes, "capability")
        _compare_commit(against, _arguments(ctx, ("against", "rows", "capability")), rows, console)
        return
    if update and baseline is None:
        raise bad("it goes with --baseline FOLDER.", "--update")
    count = threads or min(2, os.cpu_count() or 1)
    if baseline is not None:
        file = comparison.baseline_file(baseline, {**environment(), "threads": count})
        try:
            expected = comparison.read_baseline(file, update)
        except comparison.Failed as error:
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
    dtypes: list[str] | None,
    lengths: str | None,
    everything: bool = False,
    part: str = "both",
    device: str | None = None,
) -> list[Case]:
    """The cases of the suites and families that were named; those without a device for them only on request."""
    suites, whole = registry.SUITES, part == "both"
    _one_of(PARTS, part, "--part")
    _one_of((None, "cpu", "cuda"), device, "--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise bad("torch sees no CUDA or ROCm device: --model h100 predicts its times.", "--device")
    on_device = device != "cpu" and torch.cuda.is_available()
    absent = [name for name, suite in suites.items() if suite.device != "cpu" and not on_device]
    for name in dtypes or ():
        _one_of(tuple(DTYPES), name, "--dtype")
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


def _one_of(choices: Sequence[str | None], value: str | None, option: str) -> None:
    if value not in choices:
        known = ", ".join(choice for choice in choices if choice)
        raise bad(f"{value!r} is unknown: choose from {known}.", option)


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
        f"{facts['cpu']}, torch {facts['torch']} ({facts['torch_capability']}), native module: "
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
            kept = f"; their rows are in {rows}" if rows is not None else ""
            console.print(f"[yellow]Interrupted after {len(results)} of {len(cases)} cases{kept}.[/]")
            raise typer.Exit(130) from None
    return results


def _tune(console: Console) -> None:
    if not torch.cuda.is_available():
        raise bad(
            "tiles are measured on a CUDA or ROCm device, and torch sees none: edit ops/attention/configs.py and run "
            "scripts/kernel_budgets.py.",
            "--tune",
        )
    from .tune import on_device, show

    show(on_device(), console)


def _predict(
    model: str, names: list[str], dtypes: list[str] | None, lengths: str | None, console: Console
) -> None:
    _one_of(tuple(DEVICES), model, "--model")
    cases = [c for c in _cases(names, dtypes, lengths, everything=True) if any(v.work for v in c.variants)]
    if not cases:
        raise bad(f"nothing of {', '.join(names)} is modelled: name suite gpu or a family of it.", "--model")
    tables.show_predictions(cases, DEVICES[model], console)


def _compare_files(before: Path, after: Path, console: Console) -> None:
    names = (before.stem, after.stem) if before.stem != after.stem else ("A", "B")
    try:
        comparison.show_change(read_rows(before), read_rows(after), names, console)
    except (OSError, ValueError, comparison.Failed) as error:
        raise bad(str(error), "--compare") from error


def _compare_commit(commit: str, arguments: Sequence[str], rows: Path | None, console: Console) -> None:
    try:
        with Progress() as progress:
            progress.stage(f"{commit} and this code", 1 + 2 * comparison.TURNS)
            other, here = comparison.measure_both(commit, arguments, progress.begin)
        if rows is not None:
            append_rows(rows, [*other, *here])
        comparison.show_change(other, here, (commit, "this code"), console)
    except comparison.Failed as error:
        raise bad(str(error), "--against") from error


def _hold_to(capability: str, ctx: typer.Context) -> None:
    """Go on if the libraries of this process are held to the capability; else do the same in one where they are."""
    _one_of(tuple(CAPABILITIES), capability, "--capability")
    settings = CAPABILITIES[capability]
    if all(os.environ.get(name) == value for name, value in settings.items()):
        return
    command = [sys.executable, "-m", "bench", *_arguments(ctx)]
    raise typer.Exit(subprocess.run(command, check=False, env={**os.environ, **settings}).returncode)


def _refuse_others(ctx: typer.Context, option: str, *also: str) -> None:
    """Refuse options that would be without effect beside this one."""
    without = [p.opts[0] for p in ctx.command.params if _set(ctx, p) and p.name not in (option, *also)]
    if without:
        raise bad(f"it does not go with {', '.join(without)}.", f"--{option}")


def _set(ctx: typer.Context, parameter: Any) -> bool:
    """Whether the user gave a parameter a value other than its default."""
    return ctx.params.get(parameter.name) not in (None, (), [], parameter.default)


def _arguments(ctx: typer.Context, without: Sequence[str] = ()) -> list[str]:
    """The command line that sets these parameters, but for some."""
    options: list[str] = []
    positional: list[str] = []
    for parameter in ctx.command.params:
        value: Any = ctx.params.get(parameter.name or "")
        if not _set(ctx, parameter) or parameter.name in without:
            continue
        values = [str(one) for one in (value if isinstance(value, (list, tuple)) else [value])]
        if parameter.param_type_name == "argument":
            positional += values
        elif isinstance(value, bool):
            options += (parameter.opts if value else parameter.secondary_opts)[:1]
        else:
            options += [word for one in values for word in (parameter.opts[0], one)]
    return options + positional


if __name__ == "__main__":
    run(bench, "bench", "bench")
