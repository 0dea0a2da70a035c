"""Measuring a case: gate, interleaved timing, peak memory in fresh processes, rows."""

from __future__ import annotations

import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from aajr_kernels import coverage

from . import gate
from .case import SEED, Case, Gradients, Run, Variant
from .roofline import Ceilings, measured
from .row import Row


@dataclass
class Outcome:
    """The results of one case.

    Attributes:
        rows: one per variant; none when the gate is red.
        failures: why the gate is red, or why nothing could be measured.
        left_out: optional variant -> why it cannot run here.
        broken: variant -> why it gave no numbers; each has a row with the reason.
        graphed: variants whose calls were replayed from a graph.
        computed: variant -> shares of what its call computed, as in a row.
        gate: whether `failures` are the gate's.
    """

    case: Case
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    graphed: set[str] = field(default_factory=set)
    computed: dict[str, dict[str, float]] = field(default_factory=dict)
    gate: bool = True

    @property
    def missed(self) -> list[Row]:
        """Rows that are outside a bound."""
        return [row for row in self.rows if row.passed is False]


def run_case(
    case: Case,
    environment: Mapping[str, Any],
    *,
    repeats: int | None = None,
    peak: bool | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Measure one case.

    Args:
        environment: the fields of a row that are the same for the whole run.
        repeats: timed rounds in place of the case's own.
        peak: measure memory everywhere, nowhere, or (None) where the case has it by default.
        progress: called with the next stage.
    """
    progress("gate")
    verdict = gate.check(case)
    outcome = Outcome(case, failures=verdict.failures, left_out=verdict.left_out, broken=verdict.broken)
    if outcome.failures:
        return outcome
    variants = [v for v in case.variants if v.name not in verdict.left_out and v.name not in verdict.broken]
    limits = None
    if case.timed and any(v.flops or v.bytes for v in variants):
        progress("ceilings of the machine")
        limits = measured(case.device, case.dtype)
    samples: dict[str, list[float]] = {}
    if case.timed:
        samples = _interleaved(case, variants, repeats or case.repeats, outcome, progress)
        if outcome.failures:
            return outcome
    peaks: dict[str, int | None] = {}
    if case.peak if peak is None else peak:
        for variant in variants:
            if variant.peak and variant.name not in outcome.broken:
                progress(f"memory of {variant.name}")
                try:
                    peaks[variant.name] = peak_in_new_process(case, variant)
                except RuntimeError as error:
                    outcome.broken[variant.name] = str(error)
    bases = [
        v.name
        for v in variants
        if v.name in case.base and (samples.get(v.name) if case.timed else v.name not in outcome.broken)
    ]
    if not bases:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in outcome.broken.items())
        outcome.failures.append(f"there is nothing to compare with ({reasons})")
        outcome.gate = False
        return outcome
    base = min(bases, key=lambda name: min(samples[name], default=math.inf) if samples else 0.0)
    for variant in [v for v in case.variants if v in variants or v.name in outcome.broken]:
        facts = {
            **environment,
            "timing": "graph" if variant.name in outcome.graphed else "calls",
            "ops": verdict.ops.get(variant.name, {}),
            "gradient_error": _rounded(verdict.errors.get(variant.name), 3),
            "computed": outcome.computed.get(variant.name, {}),
            "failure": outcome.broken.get(variant.name, ""),
        }
        outcome.rows.append(_row(case, variant, base, samples, peaks, limits, facts))
    return outcome


def _interleaved(
    case: Case, variants: list[Variant], repeats: int, outcome: Outcome, progress: Callable[[str], None]
) -> dict[str, list[float]]:
    """Seconds per call of every variant; the order changes from round to round. One without memory is left out."""
    runs: dict[str, Run] = {}
    stream = torch.cuda.Stream() if case.graph and case.device != "cpu" else None
    for variant in variants:
        progress(f"warm-up of {variant.name}")
        try:
            with torch.cuda.stream(stream):
                runs[variant.name] = _warmed_up(case, variant, outcome)
        except Exception as error:
            if not gate.out_of_memory(error):
                raise
            outcome.broken[variant.name] = f"out of memory at length {case.length}"
            gc.collect()
    if outcome.failures:
        return {}
    for variant in [v for v in variants if v.name in runs and stream is not None]:
        try:
            with gate.on_backend(variant):
                runs[variant.name] = captured(runs[variant.name], stream)
            outcome.graphed.add(variant.name)
        except RuntimeError as error:  # calls from Python instead would be the host's time
            outcome.broken[variant.name] = f"its graph could not be captured: {error}"
            del runs[variant.name]
    variants = [variant for variant in variants if variant.name in runs]
    numbers = dict.fromkeys(runs, 1)
    if not any(run.reset for run in runs.values()):
        for v in variants:
            seconds = _sample(case, v, runs[v.name], 1)
            numbers[v.name] = min(1000, max(1, math.ceil(case.seconds / seconds)))
    samples: dict[str, list[float]] = {v.name: [] for v in variants}
    gc.collect()
    gc.freeze()  # objects that live by now need not be searched before every sample
    try:
        for i in range(repeats):
            progress(f"round {i + 1} of {repeats}")
            for variant in variants[i % len(variants) :] + variants[: i % len(variants)]:
                name = variant.name
                if name in outcome.broken or (variant.rounds is not None and i >= variant.rounds):
                    continue
                try:
                    samples[name].append(_sample(case, variant, runs[name], numbers[name]))
                except Exception as error:
                    if not gate.out_of_memory(error):
                        raise
                    outcome.broken[name] = f"out of memory at length {case.length}, round {i + 1}"
                    del samples[name], runs[name]
    finally:
        gc.unfreeze()
    return samples


def _warmed_up(case: Case, variant: Variant, outcome: Outcome) -> Run:
    with gate.on_backend(variant):
        run = variant.make(case.length)
        with coverage() as ran:
            gradients = run.call()
        if shares := ran.shares():
            outcome.computed[variant.name] = {part: float(f"{n:.4g}") for part, n in shares.items()}
        if not all(g is None or bool(torch.isfinite(g).all()) for g in gradients):
            outcome.failures.append(f"{variant.name}: a gradient is not finite at length {case.length}")
        if run.reset:
            run.reset()
    return run


def captured(run: Run, stream: torch.cuda.Stream | None) -> Run:
    """The same call, replayed from a CUDA graph: the time of the device, without Python.

    Args:
        run: made and called before on `stream`, on which it is captured: a backward runs on the stream of its forward.
        stream: not the default one.

    Raises:
        RuntimeError: the call does something that a graph cannot hold.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = run.call()

    def replay() -> Gradients:
        graph.replay()
        return results

    return Run(replay)


def _sample(case: Case, variant: Variant, run: Run, number: int) -> float:
    """Seconds per call, over `number` calls with the garbage collector kept away."""
    gc.collect()
    gc.disable()
    try:
        with gate.on_backend(variant):
            _wait(case.device)
            start = time.perf_counter()
            for _ in range(number):
                run.call()
            _wait(case.device)
            return (time.perf_counter() - start) / number
    finally:
        gc.enable()
        if run.reset:
            run.reset()


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def peak_in_new_process(case: Case, variant: Variant) -> int | None:
    """Peak bytes of one call of a variant of a registered case above its inputs and parameters."""
    command = [sys.executable, "-m", f"{__package__}.peak", case.suite, case.family, case.dtype]
    command += [str(case.length), case.part, case.device, variant.name, str(torch.get_num_threads())]
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    if done.returncode:
        raise RuntimeError(
            f"the peak memory of {variant.name} was not measured: {done.stderr.strip()[-2000:]}"
        )
    peak: int | None = json.loads(done.stdout.splitlines()[-1])
    return peak


def _row(
    case: Case,
    variant: Variant,
    base: str,
    samples: Mapping[str, list[float]],
    peaks: Mapping[str, int | None],
    ceilings: Ceilings | None,
    facts: dict[str, Any],
) -> Row:
    times = samples.get(variant.name, [])
    least = min(times, default=None)
    fastest = min(samples[base]) if samples.get(base) else None
    peak = peaks.get(variant.name)
    flops, moved = _over(variant.flops, least), _over(variant.bytes, least)
    flop_share = _over(flops, ceilings.flops) if ceilings else None
    byte_share = _over(moved, ceilings.bytes) if ceilings else None
    numbers = {
        "ratio": _over(least, fastest),
        "peak_ratio": _over(peak, peaks.get(base)),
        "extra_bytes": None if peak is None else peak - (variant.gradient_bytes or 0),
        "ms": _over(least, 1e-3),
        "copy_ratio": _over(1.0, byte_share),
        **{f"over {name}": _over(least, min(other)) for name, other in samples.items() if other},
    }
    bounds = {name: limit for name, limit in variant.bounds.items() if numbers[name] is not None}
    held = [float(numbers[name] or 0) <= limit for name, limit in bounds.items()]
    if variant.peer is not None and least is not None and samples.get(variant.peer):
        peer = min(samples[variant.peer])
        bounds[f"ratio of {variant.peer}"] = _rounded(_over(peer, fastest)) or 0.0
        held.append(least < peer)
    roofs = {"gflop_per_s": ceilings.flops / 1e9, "gb_per_s": ceilings.bytes / 1e9} if ceilings else {}
    return Row(
        suite=case.suite,
        family=case.family,
        config={**case.config, **({} if case.part == "both" else {"part": case.part})},
        length=case.length,
        variant=variant.name,
        device=case.device,
        dtype=case.dtype,
        backend="+".join(sorted(set(facts["ops"].values()))) or "torch",
        min_ms=_rounded(numbers["ms"]),
        median_ms=_rounded(1e3 * statistics.median(times)) if times else None,
        base=base,
        ratio=_rounded(numbers["ratio"]),
        gflop_per_s=_rounded(_over(flops, 1e9)),
        gb_per_s=_rounded(_over(moved, 1e9)),
        flop_share=_rounded(flop_share),
        byte_share=_rounded(byte_share),
        ceilings={name: float(f"{rate:.4g}") for name, rate in roofs.items()},
        peak_bytes=peak,
        gradient_bytes=variant.gradient_bytes,
        peak_ratio=_rounded(numbers["peak_ratio"]),
        bounds=bounds,
        passed=False if facts["failure"] and variant.bounds else all(held) if bounds else None,
        repeats=len(times),
        seed=SEED,
        round_ratios=[float(f"{a / b:.4g}") for a, b in zip(times, samples.get(base, []))],
        **facts,
    )


def _over(a: float | None, b: float | None) -> float | None:
    """a / b, None where either is not known."""
    return a / b if a is not None and b else None


def _rounded(x: float | None, digits: int = 4) -> float | None:
    """Four significant digits: more would be noise."""
    return None if x is None else float(f"{x:.{digits}g}")
