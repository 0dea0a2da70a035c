"""`python -m bench`: ratios of the fused ops and of the penalty step, gated, interleaved, written as rows."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console

from aajr_kernels.training.progress import Progress
from common.command import run

from . import comparisons as bench_compare

if TYPE_CHECKING:
    from . import Case, Outcome

DTYPES = ("float32", "bfloat16", "float16")
#: rounds of a run that is compared with a baseline, at least
ROUNDS = 7
#: a name for several suites
GROUPS = {"ops": ("norm", "activation", "rotary")}
#: --capability -> what holds every library to it; they read these variables when they start
CAPABILITIES = {
    "avx2": {
        "AAJR_CPU_CAPABILITY": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    "avx512": {
        "AAJR_CPU_CAPABILITY": "avx512",
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
    },
}


def bench(
    ctx: typer.Context,
    suites: Annotated[
        list[str] | None,
        typer.Argument(help="Suites, or SUITE:FAMILY; --list names them. Default: all that can run here."),
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="Dtype to measure; repeatable. Default: each suite's own.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Sequence lengths, separated by commas. Default: each suite's own.")
    ] = None,
    part: Annotated[
        str | None, typer.Option(help="Time forward or backward alone (ops and steps). Default: both.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu or cuda. Default: suite gpu where there is a device for it, the others on the CPU."
        ),
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Timed rounds. Default: each case's own.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of torch and of the native module. Default: 2.")
    ] = None,
    capability: Annotated[
        str | None, typer.Option(help="Hold every library to avx2 or avx512, in a process of its own.")
    ] = None,
    peak: Annotated[
        bool | None,
        typer.Option(
            "--peak/--no-peak", help="Peak memory of every case or of none. Default: where bounded."
        ),
    ] = None,
    rows: Annotated[
        Path | None, typer.Option(help="Append the rows to this file, one JSON line each.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Measure nothing: draw the step ratios in --rows as this picture.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Measure nothing: predict the times on h100, a100, b200, mi300x... (suite gpu)."),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="On a GPU: measure tiles of the attention kernels, write the best."),
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 if a row is outside its bounds.")
    ] = False,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="One small case of every family, three rounds, no peaks of memory."),
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Measure nothing: the ratios of the second file of rows against the first."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Also build this commit in a worktree, time it in turn, and compare."),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            help="Folder of baselines: exit with 1 if a ratio is 15 % above that of this kind of machine."
        ),
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="With --baseline: write it instead of comparing.")
    ] = False,
    listed: Annotated[bool, typer.Option("--list", help="List the cases and their bounds.")] = False,
) -> None:
    """Speed and memory of the fused ops and of the penalty step, as ratios to PyTorch's own.

    The gradients of a case are compared with float64 first; where they are wrong no speed is reported. Then all its
    variants run interleaved in this process, and the minimum counts. Peaks of memory come from fresh processes.

    A variant that runs out of memory has a row that says so, and the rest goes on. Rows are written case by case, so
    that an interrupted run keeps those that were finished.

    Exit code 0: done, 1: gradients are wrong, a case failed, with --check a bound is missed, or a ratio is above its
    baseline, 2: bad arguments, 130: interrupted.
    """
    if plot is not None:
        _draw(rows, plot)
        return
    if tune:
        _tune()
        return
    if model is not None:
        _predict(model, suites or ["gpu"], dtype, lengths)
        return
    if compare is not None:
        _alone(ctx, "compare")
        bench_compare.files(*compare, _console())
        return
    if capability is not None:
        _hold_to(capability, ctx)
    if against is not None:
        _alone(
            ctx,
            "against",
            *("suites", "dtype", "lengths", "part", "device", "repeats", "threads", "rows", "quick"),
            "capability",
        )
        rest = _arguments(ctx, without=("against", "rows", "capability"))
        bench_compare.commit(against, rest, rows, _console())
        return
    from . import quick as quickly
    from . import show

    count = threads or min(2, os.cpu_count() or 1)
    if update and baseline is None:
        raise typer.BadParameter("it goes with --baseline FOLDER.", param_hint="--update")
    standard = None
    if baseline is not None:
        standard = bench_compare.Baseline(baseline, count, update)
        repeats = max(repeats or 0, ROUNDS)
    chosen = _cases(suites, dtype, lengths, everything=listed, part=part, device=device)
    if quick:
        chosen, repeats, peak = quickly(chosen), repeats or 3, bool(peak)
        if not chosen:
            raise typer.BadParameter("nothing of that is quick: name another suite.", param_hint="--quick")
    if listed:
        show.listing(chosen, _console())
        return
    if rows is not None and not rows.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {rows.parent}: make it first.", param_hint="--rows")
    start = time.perf_counter()
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        results = _run(chosen, repeats, peak, rows)
    finally:
        torch.set_num_threads(before)
    show.verdict(results, time.perf_counter() - start, _console())
    slower = standard is not None and standard.judge(results, _console())
    if slower or any(result.failures or (check and result.missed) for result in results):
        raise typer.Exit(1)


def _tune() -> None:
    """Measure tiles on the device and write the best into the table that the kernels read."""
    if not torch.cuda.is_available():
        raise typer.BadParameter(
            "tiles are measured on a CUDA or ROCm device, and torch sees none: edit ops/attention/configs.py and see "
            "what scripts/kernel_budgets.py says.",
            param_hint="--tune",
        )
    from . import tune

    tune.show(tune.on_device(), _console())


def _console() -> Console:
    """Standard output, wide enough for the tables where it is a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def _cases(
    names: list[str] | None,
    dtypes: list[str] | None,
    lengths: str | None,
    everything: bool = False,
    part: str | None = None,
    device: str | None = None,
) -> list[Case]:
    """The cases of the suites and families that were named; those without a device for them only on request."""
    from . import SUITES, Selection
    from .case import PARTS

    part = part or "both"
    _one_of(PARTS, part, "--part")
    _one_of((None, "cpu", "cuda"), device, "--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(
            "torch sees no CUDA or ROCm device: --model h100 predicts its times.", param_hint="--device"
        )
    absent = [
        name
        for name, suite in SUITES.items()
        if suite.device != "cpu" and (device == "cpu" or not torch.cuda.is_available())
    ]
    for name in dtypes or ():
        _one_of(DTYPES, name, "--dtype")
    sizes = _lengths(lengths) if lengths is not None else None
    wanted: dict[str, list[str] | None] = {}
    whole = part == "both"
    usual = [
        name
        for name, suite in SUITES.items()
        if everything or (suite.usual and name not in absent and (whole or suite.parts))
    ]
    for name in [one for given in names or usual for one in GROUPS.get(given, (given,))]:
        suite, _, family = name.partition(":")
        if suite not in SUITES:
            raise typer.BadParameter(
                f"suite {suite!r} is unknown: choose from {', '.join((*GROUPS, *SUITES))}."
            )
        if family and family not in SUITES[suite].families:
            options = ", ".join(f"{suite}:{one}" for one in SUITES[suite].families)
            raise typer.BadParameter(f"suite {suite} has no family {family!r}: choose from {options}.")
        if not whole and not SUITES[suite].parts:
            raise typer.BadParameter(
                f"suite {suite} is timed as a whole, or has families for either: leave it out of this run.",
                param_hint="--part",
            )
        if suite in absent and not everything:
            raise typer.BadParameter(
                f"suite {suite} needs a CUDA or ROCm device, and torch sees none (or --device says cpu): --model h100 "
                "predicts its times."
            )
        families = wanted.setdefault(suite, [])
        if not family or families is None:
            wanted[suite] = None
        else:
            families.append(family)
    found: list[Case] = []
    for suite, families in wanted.items():
        chosen = None if families is None else tuple(families)
        found += SUITES[suite].cases(
            Selection(tuple(dtypes) if dtypes else None, sizes, chosen, part, device or "cpu")
        )
    return found


def _one_of(choices: Sequence[str | None], value: str | None, option: str) -> None:
    if value not in choices:
        known = ", ".join(choice for choice in choices if choice)
        raise typer.BadParameter(f"{value!r} is unknown: choose from {known}.", param_hint=option)


def _lengths(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 2:
        raise typer.BadParameter(
            f"{text!r} is no list of lengths above 1: write for example 512,2048.", param_hint="--lengths"
        )
    return sizes


def _run(cases: list[Case], repeats: int | None, peak: bool | None, rows: Path | None) -> list[Outcome]:
    from . import Outcome, append_rows, environment, keep_memory, run_case, show

    keep_memory()
    facts = environment()
    console = _console()
    native = facts["native_capability"] or "none"
    console.print(
        f"{facts['cpu']}, torch {facts['torch']} ({facts['torch_capability']}), native module: {native}, "
        f"{facts['threads']} threads",
        highlight=False,
        soft_wrap=True,
    )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        console.print(
            f"[yellow]The machine is busy (load {load:.1f}): ratios may be off.[/]", highlight=False
        )
    results: list[Outcome] = []
    with Progress() as progress:
        # a gate and a warm-up cost about as much as two rounds
        rounds = [(repeats or case.repeats if case.timed else 0) + 2 for case in cases]
        progress.stage("gates and rounds", sum(rounds))
        try:
            for number, case in enumerate(cases):

                def tell(text: str, name: str = case.name) -> None:
                    tell_of = progress.begin if text.startswith(("round", "gate")) else progress.note
                    tell_of(f"{name}: {text}")

                try:
                    result = run_case(case, facts, repeats=repeats, peak=peak, progress=tell)
                except Exception as error:  # the other cases go on
                    result = Outcome(case, failures=[f"{type(error).__name__}: {error}"], gate=False)
                results.append(result)
                show.outcome(result, console)
                if rows is not None:
                    append_rows(rows, result.rows)
                progress.reach(sum(rounds[: number + 1]), case.name)
        except KeyboardInterrupt:
            progress.stop()
            kept = f"; their rows are in {rows}" if rows is not None else ""
            console.print(f"[yellow]Interrupted after {len(results)} of {len(cases)} cases{kept}.[/]")
            raise typer.Exit(130) from None
    return results


def _predict(model: str, suites: list[str], dtypes: list[str] | None, lengths: str | None) -> None:
    from . import modelled
    from .roofline import DEVICES

    if model not in DEVICES:
        raise typer.BadParameter(
            f"{model!r} is unknown: choose from {', '.join(DEVICES)}.", param_hint="--model"
        )
    cases = [c for c in _cases(suites, dtypes, lengths, everything=True) if any(v.work for v in c.variants)]
    if not cases:
        raise typer.BadParameter(
            f"nothing of {', '.join(suites)} is modelled: name suite gpu or a family of it.",
            param_hint="--model",
        )
    modelled.show(cases, DEVICES[model], _console())


def _draw(rows: Path | None, picture: Path) -> None:
    from . import read_rows
    from .plot import plot_steps

    if rows is None:
        raise typer.BadParameter("it draws from rows: name their file with --rows.", param_hint="--plot")
    try:
        plot_steps(read_rows(rows), picture)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--rows") from error


def _hold_to(capability: str, ctx: typer.Context) -> None:
    """Go on if the libraries of this process are held to the capability; else do the same in one where they are."""
    if capability not in CAPABILITIES:
        raise typer.BadParameter(
            f"{capability!r} is unknown: choose from {', '.join(CAPABILITIES)}.", param_hint="--capability"
        )
    settings = CAPABILITIES[capability]
    if all(os.environ.get(name) == value for name, value in settings.items()):
        return
    command = [sys.executable, "-m", "bench", *_arguments(ctx)]
    raise typer.Exit(subprocess.run(command, check=False, env={**os.environ, **settings}).returncode)


def _alone(ctx: typer.Context, option: str, *also: str) -> None:
    """Refuse options that would be without effect beside this one."""
    given = [
        parameter.opts[0]
        for parameter in ctx.command.params
        if parameter.name not in (option, *also)
        and ctx.params.get(parameter.name or "") not in (None, (), [], False)
    ]
    if given:
        raise typer.BadParameter(f"it does not go with {', '.join(given)}.", param_hint=f"--{option}")


def _arguments(ctx: typer.Context, without: Sequence[str] = ()) -> list[str]:
    """The command line that gives these parameters, but for some."""
    found: list[str] = []
    positional: list[str] = []
    for parameter in ctx.command.params:
        value: Any = ctx.params.get(parameter.name or "")
        if value is None or value == () or value == [] or parameter.name in without:
            continue
        values = [str(one) for one in (value if isinstance(value, (list, tuple)) else [value])]
        if parameter.param_type_name == "argument":
            positional += values
        elif isinstance(value, bool):
            names = parameter.opts if value else parameter.secondary_opts
            found += names[:1]
        else:
            for one in values:
                found += [parameter.opts[0], one]
    return found + positional


if __name__ == "__main__":
    run(bench, "bench", "bench")
