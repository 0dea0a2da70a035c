"""Measuring a case: gate, interleaved timing, peak memory in fresh processes, rows."""

from __future__ import annotations

import contextlib
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

from . import gate
from .case import SEED, Case, Gradients, Run, Variant
from .ceilings import Ceilings, measured
from .row import Row

#: a timed sample of a short variant repeats it until it lasts about this long
SAMPLE_SECONDS = 0.02


@dataclass
class Outcome:
    """What came of one case.

    Attributes:
        rows: one per variant; none when the gate is red.
        failures: why the gate is red, or why nothing could be measured.
        left_out: optional variant -> why it cannot run here.
        broken: variant -> why it gave no numbers; each has a row that says so.
        graphed: variants whose calls were replayed from a graph.
        gate: whether `failures` are the gate's.
    """

    case: Case
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    graphed: set[str] = field(default_factory=set)
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
        peak: measure memory everywhere, nowhere, or (None) where the case asks for it.
        progress: told what is about to happen.
    """
    progress("gate")
    verdict = gate.check(case)
    outcome = Outcome(case, failures=verdict.failures, left_out=verdict.left_out, broken=verdict.broken)
    if outcome.failures:
        return outcome
    variants = [v for v in case.variants if v.name not in verdict.left_out and v.name not in verdict.broken]
    limits = None
    if case.timed and any(v.flops or v.bytes for v in variants):
        progress("what the machine reaches")
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
        wrong, ops = verdict.errors.get(variant.name), verdict.ops.get(variant.name, {})
        timing = "graph" if variant.name in outcome.graphed else "calls"
        facts = {**environment, "timing": timing}
        failure = outcome.broken.get(variant.name, "")
        outcome.rows.append(_row(case, variant, base, samples, peaks, wrong, ops, limits, facts, failure))
    return outcome


def _interleaved(
    case: Case, variants: list[Variant], repeats: int, outcome: Outcome, progress: Callable[[str], None]
) -> dict[str, list[float]]:
    """Seconds per call of every variant; the order changes from round to round. One without memory is left out."""
    runs: dict[str, Run] = {}
    for variant in variants:
        progress(f"warm-up of {variant.name}")
        try:
            runs[variant.name] = _warmed_up(case, variant, outcome)
        except Exception as error:
            if not gate.out_of_memory(error):
                raise
            outcome.broken[variant.name] = f"out of memory at length {case.length}"
            gc.collect()
    if outcome.failures:
        return {}
    variants = [variant for variant in variants if variant.name in runs]
    if case.graph and case.device != "cpu":
        for variant in variants:
            with (
                gate.on_backend(variant),
                contextlib.suppress(RuntimeError),
            ):  # torch's own op may not allow it
                runs[variant.name] = captured(runs[variant.name])
                outcome.graphed.add(variant.name)
    numbers = dict.fromkeys(runs, 1)
    if not any(run.reset for run in runs.values()):
        for v in variants:
            seconds = _sample(case, v, runs[v.name], 1)
            numbers[v.name] = min(1000, max(1, math.ceil(SAMPLE_SECONDS / seconds)))
    samples: dict[str, list[float]] = {v.name: [] for v in variants}
    gc.collect()
    gc.freeze()  # what lives by now need not be searched before every sample
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
        if not all(g is None or bool(torch.isfinite(g).all()) for g in run.call()):
            outcome.failures.append(f"{variant.name}: a gradient is not finite at length {case.length}")
        if run.reset:
            run.reset()
    return run


def captured(run: Run) -> Run:
    """The same call, replayed from a CUDA graph: what the device takes for it, without Python."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run.call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
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
    found: int | None = json.loads(done.stdout.splitlines()[-1])
    return found


def _row(
    case: Case,
    variant: Variant,
    base: str,
    samples: Mapping[str, list[float]],
    peaks: Mapping[str, int | None],
    error: float | None,
    ops: dict[str, str],
    limits: Ceilings | None,
    environment: Mapping[str, Any],
    failure: str,
) -> Row:
    times = samples.get(variant.name, [])
    least = min(times) if times else None
    ratio = least / min(samples[base]) if least is not None else None
    peak, base_peak = peaks.get(variant.name), peaks.get(base)
    peak_ratio = peak / base_peak if peak and base_peak else None
    extra = peak - (variant.gradient_bytes or 0) if peak is not None else None
    flops = variant.flops / least if variant.flops and least else None
    moved = variant.bytes / least if variant.bytes and least else None
    flop_share = flops / limits.flops if flops and limits else None
    byte_share = moved / limits.bytes if moved and limits else None
    found = {
        "ratio": ratio,
        "peak_ratio": peak_ratio,
        "extra_bytes": extra,
        "ms": None if least is None else 1e3 * least,
        "copy_ratio": None if byte_share is None else 1 / byte_share,
    }
    bounds = {name: limit for name, limit in variant.bounds.items() if found[name] is not None}
    held = [float(found[name] or 0) <= limit for name, limit in bounds.items()]
    if variant.rival is not None and least is not None and samples.get(variant.rival):
        rival = min(samples[variant.rival]) / min(samples[base])
        bounds[f"ratio of {variant.rival}"] = _rounded(rival)
        held.append(ratio is not None and ratio < rival)
    return Row(
        suite=case.suite,
        family=case.family,
        config={**case.config, **({} if case.part == "both" else {"part": case.part})},
        length=case.length,
        variant=variant.name,
        device=case.device,
        dtype=case.dtype,
        backend="+".join(sorted(set(ops.values()))) or "torch",
        ops=ops,
        min_ms=None if least is None else _rounded(1e3 * least),
        median_ms=_rounded(1e3 * statistics.median(times)) if times else None,
        base=base,
        ratio=None if ratio is None else _rounded(ratio),
        gflop_per_s=_rounded(flops / 1e9) if flops else None,
        gb_per_s=_rounded(moved / 1e9) if moved else None,
        flop_share=_rounded(flop_share) if flop_share else None,
        byte_share=_rounded(byte_share) if byte_share else None,
        ceilings={"gflop_per_s": _rounded(limits.flops / 1e9), "gb_per_s": _rounded(limits.bytes / 1e9)}
        if limits
        else {},
        peak_bytes=peak,
        gradient_bytes=variant.gradient_bytes,
        peak_ratio=None if peak_ratio is None else _rounded(peak_ratio),
        gradient_error=None if error is None else float(f"{error:.3g}"),
        bounds=bounds,
        passed=False if failure and variant.bounds else all(held) if bounds else None,
        repeats=len(times),
        seed=SEED,
        round_ratios=[_rounded(a / b) for a, b in zip(times, samples.get(base, []))],
        failure=failure,
        **environment,
    )


def _rounded(x: float) -> float:
    """Four significant digits: more would be noise."""
    return float(f"{x:.4g}")
